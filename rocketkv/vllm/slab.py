"""The slab: memory of the compressed rows of one layer, allocated once; and the steps that run on its rows.

A row is the static store of one sequence (`rocketkv.state`): stage 1 fills it when the prompt has been read, and decode
steps read and write it. A store's tensors are views: of each tensor of the slab, the beginning of its row, which is as
long as the largest store that any prompt's split may need.

The kernels decode any rows in one step (`kernels/rows.py`). What they need of a row lies on the device: its tokens and
its clock, which they raise themselves, and its rule, which is written when its prompt ends.

Letters: B rows of a step, R rows of the slab, H query heads, Hkv KV heads, D head dim, Dv value dim, S tokens of the
prompt, W observation window, P page size, k tokens read.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..core.decode import DecodeBuffers
from ..core.index import index_of
from ..core.pages import TILE_PAGES, index_dtype_of, movable, page_count
from ..core.params import AttentionParams
from ..core.token_index import TokenIndex
from ..dispatch import Workspaces, decode_step, eviction_ops, run_kernels, slab_workspace
from ..state.compress import close_prompt_by, evict_generated, kept_when_full
from ..state.decoding import DecodeTokens
from ..state.store import KVStore

# Splits are sampled at every so many prompt lengths.
_STRIDE = 16

# Slots of a row come in multiples, so that the rows of each tensor begin at multiples of as many bytes.
ALIGNMENT = 16

# Dtypes of the tensors that do not have the keys' dtype.
_DTYPES = {
    "positions": torch.int32,
    "seq_lens": torch.int32,
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


@functools.lru_cache(maxsize=64)
def _splits(config: RocketKVConfig, shape: LayerShape, max_prompt: int) -> tuple[tuple[BudgetSplit, int], ...]:
    """Return the splits of prompts of up to `max_prompt` tokens, apart from what they keep, and the slots of their rows."""
    lengths = [*range(1, max_prompt, _STRIDE), max_prompt]
    splits = [config.split_for(length, shape.head_dim) for length in lengths]
    kept = [min(split.kept_tokens or length, length) for split, length in zip(splits, lengths, strict=True)]
    found: dict[tuple[BudgetSplit, int], None] = {}
    for i, split in enumerate(splits):
        # Between samples kept tokens rise or fall, rounded down.
        slots = max(kept[max(i - 1, 0) : i + 2]) + 1 + (config.decode_capacity or 0)
        found[replace(split, kept_tokens=1), -(-slots // ALIGNMENT) * ALIGNMENT] = None
    return tuple(found)


def _elements(config: RocketKVConfig, split: BudgetSplit, shape: LayerShape, capacity: int) -> dict[str, int]:
    """Return the elements of each tensor of a row."""
    kv_heads = shape.kv_heads
    found = {
        "keys": kv_heads * capacity * shape.head_dim,
        "values": kv_heads * capacity * shape.value_dim,
        "positions": kv_heads * capacity,
        "seq_lens": kv_heads,
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


@dataclass(frozen=True)
class RowSizes:
    """The largest sizes of a row under one config.

    Attributes:
        slots: of a KV head.
        pages: units that a decode step scores.
        split: a split with the largest page size, channels and k; None if splits differ in more than that, and in what
            stage 1 keeps.
    """

    slots: int
    pages: int
    split: BudgetSplit | None


@functools.lru_cache(maxsize=64)
def row_sizes(config: RocketKVConfig, shape: LayerShape, max_prompt: int) -> RowSizes:
    """Return the largest sizes of rows that hold prompts of up to `max_prompt` tokens."""
    splits = _splits(config, shape, max_prompt)
    slots = max(capacity for _, capacity in splits)
    pages = max(page_count(capacity, split.page_size) for split, capacity in splits)
    first = splits[0][0]
    most = {}
    for name in ("page_size", "channels", "top_k"):
        found = {getattr(split, name) for split, _ in splits}
        most[name] = None if found == {None} else max(value or 0 for value in found)
    rule = replace(first, **most)
    same = all(replace(split, **most) == rule for split, _ in splits)
    return RowSizes(slots, pages, rule if same else None)


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of a step, for the kernels; see `kernels/operands.py`.

    Attributes:
        rows: [B] int32, rows of the slab, negative for none.
        rules: [R, 4] int32: capacity, P, channels and k of each row.
        row_slots: slots from one row to the next.
        row_lines: lines of the page index from one row to the next; 0 without one.
    """

    rows: Tensor
    rules: Tensor
    row_slots: int
    row_lines: int


class LayerSlab:
    """Rows of one layer.

    Attributes:
        shape: heads and dtype of the layer.
        max_prompt: most tokens of a prompt.
        memory: by name, the tensors of all rows, [R, elements of a row].
        rules: [R, 4] int32: capacity, P, channels and k of each row.
        clock: [R] int32, tokens of each row's sequence.
        newest: [R, H, D], queries of a step's tokens, which CUDA graphs write; see `graphs`.
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
        self.shape, self.max_prompt = shape, max_prompt
        sizes: dict[str, int] = {}
        configs = list(configs)
        for config in configs:
            for split, capacity in _splits(config, shape, max_prompt):
                for name, count in _elements(config, split, shape, capacity).items():
                    sizes[name] = max(sizes.get(name, 0), count)
        with torch.inference_mode(False):
            # Written at once, so that the memory is in use when vLLM measures it.
            self.memory = {
                name: _empty(rows, count, dtype_of(name, configs[0], shape), device) for name, count in sizes.items()
            }
            self.rules = torch.zeros(rows, 4, dtype=torch.int32, device=device)
            self.clock = torch.zeros(rows, dtype=torch.int32, device=device)
            self.newest = torch.zeros(rows, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return sum(tensor.nbytes for tensor in (*self.memory.values(), self.rules, self.clock, self.newest))

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
            ValueError: they take more room than a row has.
        """
        views = {}
        for name, tensor in decoding.tensors().items():
            place = self.memory[name][row, : tensor.numel()]
            if place.numel() < tensor.numel():
                raise ValueError(f"rocketkv: a row of the slab has {place.numel()} elements for {name}, too few")
            views[name] = place.view(tensor.shape)
            movable(views[name]).copy_(movable(tensor))
        self.clock[row : row + 1].copy_(clock)
        decoding.buffers = decoding.buffers._replace(clock=self.clock[row : row + 1])
        decoding.set_tensors(views)
        split, capacity = decoding.split, decoding.keys.shape[2]
        rule = capacity, split.page_size, split.channels or 0, split.top_k or capacity
        self.rules[row].copy_(torch.tensor(rule, dtype=torch.int32))

    def decode(
        self,
        rows: Tensor,
        config: RocketKVConfig,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        params: AttentionParams,
        workspaces: Workspaces,
    ) -> bool:
        """Append one token to each of some rows, and attend to the tokens that stage 2 selects, by the kernels.

        The launches do not depend on the number of rows, nor on anything that the host knows of them, so they can be
        captured in a CUDA graph.

        Args:
            rows: [B] int32 on the device; where negative, nothing is read or written.
            config: the layer's settings.
            query: [B, H, D], after rotary embedding.
            key: [B, Hkv, D], after rotary embedding.
            value: [B, Hkv, Dv].
            out: [B, H, Dv] in the query's dtype; written.
            params: the model's attention parameters.
            workspaces: shared by the layers.

        Returns:
            Whether the kernels support the layer; if not, nothing is done.
        """
        space = self.workspace(config, query.shape[0], workspaces)
        if space is None:
            return False
        buffers = self._buffers(index_of(row_sizes(config, self.shape, self.max_prompt).split))
        run_kernels(query, key, value, buffers, space, params, out, self._step_rows(rows))
        return True

    def workspace(self, config: RocketKVConfig, batch: int, workspaces: Workspaces) -> Any:
        """Return the kernels' workspace for steps of so many rows, or warn and return None if they support none."""
        sizes, shape = row_sizes(config, self.shape, self.max_prompt), self.shape
        if sizes.split is None:
            workspaces.warn("decode steps of this layer run row by row: splits of this method differ in kind")
            return None
        most = 1 << (batch - 1).bit_length()  # one for all numbers of rows up to a power of two
        stored = most, shape.kv_heads, sizes.slots, shape.head_dim
        return slab_workspace(stored, (shape.heads, shape.value_dim, sizes.pages), sizes.split, self.keys, workspaces)

    @property
    def keys(self) -> Tensor:
        """The keys of all rows, [R, Hkv * slots * D]."""
        return self.memory["keys"]

    def _buffers(self, index: TokenIndex | None) -> DecodeBuffers:
        memory, rows = self.memory, len(self.rules)
        ring = memory.get("query_ring")
        return DecodeBuffers(
            *(memory[name] for name in ("keys", "values", "positions", "seq_lens")),
            tuple(memory[name] for name in (() if index is None else index.names)),
            **{name: memory.get(name) for name in ("value_sum", "residual_bias", "missed")},
            query_ring=None if ring is None else ring.view(rows, self.shape.heads, -1, self.shape.head_dim),
            clock=self.clock,
        )

    def _step_rows(self, rows: Tensor) -> StepRows:
        bounds = self.memory.get("bounds")
        lines = 0 if bounds is None else bounds.stride(0) // TILE_PAGES
        return StepRows(rows, self.rules, self.keys.stride(0) // self.shape.head_dim, lines)


def _empty(rows: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, count * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)


def make_room(
    store: KVStore, config: RocketKVConfig, seen: int, params: AttentionParams, workspaces: Workspaces
) -> int:
    """Re-evict generated tokens of a full row.

    Args:
        store: the row's store.
        config: the layer's settings.
        seen: tokens of the sequence; the host has not counted those that `LayerSlab.decode` appended.
        params: the model's attention parameters.
        workspaces: shared by the layers.

    Returns:
        The tokens that the row has room for.

    Raises:
        ValueError: generated tokens are not re-evicted under these settings.
    """
    store.lens.advance(seen - store.lens.seen)
    kept = kept_when_full(config, store.decoding.split)
    if kept is None:
        raise ValueError(store.out_of_room())
    ops = eviction_ops(store.decoding.keys, backend=config.backend, workspaces=workspaces)
    evict_generated(store, kept, params, kernel_size=config.stage_1_kernel_size, ops=ops)
    return store.capacity - store.lens.longest


def decode_row(
    store: KVStore,
    config: RocketKVConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    workspaces: Workspaces,
) -> Tensor:
    """Append one token to a row that is not full, and attend to the tokens that stage 2 selects.

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
    return decode_step(query, key, value, store, params, backend=config.backend, workspaces=workspaces)
