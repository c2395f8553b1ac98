"""The slab: memory of the compressed rows of one layer, allocated once; and the steps that run on a row.

A row is the static store of one sequence (`rocketkv.state`): stage 1 fills it when the prompt has been read, and decode
steps read and write it. Each row is as long as the largest store that any prompt's split may need; a store's tensors
are views of it, one after another.

Letters: H query heads, Hkv KV heads, D head dim, Dv value dim, S tokens of the prompt, W observation window.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..core.index import index_of
from ..core.pages import index_dtype_of, movable
from ..core.params import AttentionParams
from ..dispatch import Workspaces, decode_step, eviction_ops
from ..state.compress import close_prompt_by, evict_generated, kept_when_full
from ..state.decoding import DecodeTokens
from ..state.store import KVStore

# Splits are sampled at every so many prompt lengths; between two of them, the kept tokens differ by less.
_STRIDE = 16

# Of each tensor in a row, in bytes.
ALIGNMENT = 16

# Dtypes of the tensors that do not have the keys' dtype.
_DTYPES = {
    "positions": torch.int32,
    "seq_lens": torch.int32,
    "clock": torch.int32,
    "value_sum": torch.float64,
    "residual_bias": torch.float32,
    "missed": torch.float32,
    "codes": torch.uint8,
    "scales": torch.bfloat16,
    "mean": torch.float32,
    "balance": torch.bfloat16,
}


@dataclass(frozen=True)
class LayerShape:
    """Heads and dtype of a layer, on this rank.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv.
        dtype: dtype of keys and values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype


def row_bytes(config: RocketKVConfig, shape: LayerShape, max_prompt: int) -> int:
    """Return the bytes of a row that holds any prompt of up to `max_prompt` tokens."""
    lengths = {*range(1, max_prompt + 1, _STRIDE), max_prompt}
    return max(_bytes(config, config.split_for(length, shape.head_dim), shape, length) for length in lengths)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(config: RocketKVConfig, split: BudgetSplit, shape: LayerShape, length: int) -> int:
    """Return the bytes of a row for one split."""
    found = _elements(config, split, shape, length)
    return sum(_aligned(count * dtype_of(name, config, shape).itemsize) for name, count in found.items())


def _elements(config: RocketKVConfig, split: BudgetSplit, shape: LayerShape, length: int) -> dict[str, int]:
    kept = min(length if split.kept_tokens is None else split.kept_tokens, length) + _STRIDE
    capacity = kept + (config.decode_capacity or 0)
    kv_heads = shape.kv_heads
    found = {
        "keys": kv_heads * capacity * shape.head_dim,
        "values": kv_heads * capacity * shape.value_dim,
        "positions": kv_heads * capacity,
        "seq_lens": kv_heads,
        "clock": 1,
    }
    index = index_of(split)
    for name in () if index is None else index.names:
        found[name] = kv_heads * math.prod(index.shape(name, capacity, shape.head_dim)) if index is not None else 0
    if split.residual:
        found["value_sum"] = kv_heads * shape.value_dim
        found["missed"] = shape.heads
    if split.calibrated:
        found["residual_bias"] = shape.heads
    if kept_when_full(config, split) is not None:
        found["query_ring"] = shape.heads * config.window_size * shape.head_dim
    return found


def dtype_of(name: str, config: RocketKVConfig, shape: LayerShape) -> torch.dtype:
    """Return the dtype of a tensor of a row."""
    if name == "bounds":
        return index_dtype_of(config.index_dtype) or shape.dtype
    return _DTYPES.get(name, shape.dtype)


class LayerSlab:
    """Rows of one layer.

    Attributes:
        shape: heads and dtype of the layer.
        memory: [rows, bytes] uint8; a row's tensors lie in it one after another.
    """

    def __init__(
        self,
        configs: Iterable[RocketKVConfig],
        shape: LayerShape,
        *,
        rows: int,
        max_prompt: int,
        device: torch.device,
    ) -> None:
        """Allocate the rows for a layer that may have any of these settings."""
        self.shape = shape
        size = max(row_bytes(config, shape, max_prompt) for config in configs)
        with torch.inference_mode(False):
            # Written at once, so that the memory is in use when vLLM measures it.
            self.memory = torch.empty(rows, size, dtype=torch.uint8, device=device).zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return self.memory.nbytes

    def close(
        self,
        row: int,
        config: RocketKVConfig,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        params: AttentionParams,
        workspaces: Workspaces,
    ) -> KVStore:
        """Run stage 1 on a prompt, and return its store, whose tensors are views of a row.

        Args:
            row: the row; what it held is overwritten.
            config: the layer's settings.
            keys: [1, Hkv, S, D], after rotary embedding.
            values: [1, Hkv, S, Dv].
            queries: [1, H, <= W, D], of the prompt's last tokens.
            params: the model's attention parameters.
            workspaces: shared by the layers.
        """
        store = KVStore()
        store.extend(keys, values)
        store.prompt.queries = queries
        ops = eviction_ops(keys, backend=config.backend, workspaces=workspaces)
        close_prompt_by(store, config, config.split_for(keys.shape[2], keys.shape[3]), params, ops)
        self._adopt(row, store.decoding, store.clock())
        return store

    @torch.inference_mode(False)
    def _adopt(self, row: int, decoding: DecodeTokens, clock: Tensor) -> None:
        """Copy a store's tensors into the row, and let the store have the views of it.

        Raises:
            ValueError: they take more bytes than a row has.
        """
        tensors = decoding.tensors() | {"clock": clock}
        memory, first = self.memory[row], 0
        views = {}
        for name, tensor in tensors.items():
            place = memory[first : first + tensor.nbytes]
            if place.numel() < tensor.nbytes:
                raise ValueError(f"rocketkv: a row of the slab has {memory.numel()} bytes, too few for {name}")
            views[name] = place.view(tensor.dtype).view(tensor.shape)
            movable(views[name]).copy_(movable(tensor))
            first += _aligned(tensor.nbytes)
        decoding.buffers = decoding.buffers._replace(clock=views.pop("clock"))
        decoding.set_tensors(views)


def decode_row(
    store: KVStore,
    config: RocketKVConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    workspaces: Workspaces,
) -> Tensor:
    """Append one token to a row and attend to the tokens that stage 2 selects; re-evict generated tokens if it is full.

    Args:
        store: the row's store.
        config: the layer's settings.
        query: [1, H, D], after rotary embedding.
        key: [1, Hkv, D], after rotary embedding.
        value: [1, Hkv, Dv].
        params: the model's attention parameters.
        workspaces: shared by the layers.

    Returns:
        [1, H, Dv] in the query's dtype.
    """
    kept = kept_when_full(config, store.decoding.split)
    if store.lens.longest >= store.capacity and kept is not None:
        ops = eviction_ops(store.decoding.keys, backend=config.backend, workspaces=workspaces)
        evict_generated(store, kept, params, kernel_size=config.stage_1_kernel_size, ops=ops)
    return decode_step(query, key, value, store, params, backend=config.backend, workspaces=workspaces)
