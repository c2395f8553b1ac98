"""The slab: memory of the compressed rows of one layer, allocated once; and the steps that run on its rows.

A row is the static store of one sequence (`rocketkv.state`): stage 1 fills it when the prompt has been read, and decode
steps read and write it. A store's tensors are views of its row in each tensor of the slab (`sizes`). Keys, values and
page bounds share a tensor: keys begin a row, values follow, and bounds end it.

The kernels and the CPU step decode any rows in one step (`kernels/rows.py`). What they need of a row lies on the
device: its tokens and its clock, which they raise themselves, and its rule, which is written when its prompt ends.

Letters: B rows of a step, R rows of the slab, H query heads, Hkv KV heads, D head dim, Dv value dim, S tokens of the
prompt, W observation window, P page size, k tokens read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import backend_name
from ..config import RocketKVConfig
from ..core.decode import DecodeBuffers
from ..core.index import index_of
from ..core.pages import TILE_PAGES, movable
from ..core.params import AttentionParams
from ..core.token_index import TokenIndex
from ..dispatch import Workspaces, decode_step, eviction_ops, run_kernels, slab_workspace
from ..state.compress import close_prompt_by, evict_generated, kept_when_full
from ..state.decoding import DecodeTokens
from ..state.store import KVStore
from .sizes import SHARED, LayerShape, dtype_of, memory_sizes, row_sizes


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of a step, for the kernels; see `kernels/operands.py`.

    Attributes:
        rows: [B] int32, rows of the slab, negative for none.
        rules: [R, 4] int32: capacity, P, channels and k of each row.
        row_tokens: keys that have room from one row to the next, in the memory of keys, values and page bounds.
        row_slots: slots from one row to the next, in all other tensors.
        row_lines: lines of 128 page bounds from one row to the next, in the shared memory.
    """

    rows: Tensor
    rules: Tensor
    row_tokens: int
    row_slots: int
    row_lines: int


class LayerSlab:
    """Rows of one layer.

    Attributes:
        shape: heads and dtype of the layer.
        max_prompt: most tokens of a prompt.
        memory: by name, the tensors of all rows, [R, elements of a row].
        bounds: that of keys and values, in the dtype of page bounds, which share it.
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
        """Allocate the rows for a layer that may have any of these settings.

        Raises:
            ValueError: keys and values differ in width.
        """
        if shape.value_dim != shape.head_dim:
            raise ValueError(f"rocketkv: values must be as wide as keys, got {shape.value_dim} and {shape.head_dim}")
        self.shape, self.max_prompt = shape, max_prompt
        configs = list(configs)
        sizes = memory_sizes(configs, shape, max_prompt)
        with torch.inference_mode(False):
            # Written at once, so that the memory is in use when vLLM measures it.
            self.memory = {
                name: torch.zeros(rows, size, dtype=torch.uint8, device=device).view(dtype_of(name, configs[0], shape))
                for name, size in sizes.items()
            }
            self.bounds = self.keys.view(dtype_of("bounds", configs[0], shape))
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
        views, tensors = {}, decoding.tensors()
        kept, bounds = tensors["keys"].numel(), tensors.get("bounds")
        last = 0 if bounds is None else bounds.numel()
        places = {"keys": self.keys[row], "values": self.keys[row, kept:], "bounds": self.bounds[row, -last:]}
        if 2 * kept * self.keys.itemsize + last * self.bounds.itemsize > self.keys[row].nbytes:
            raise ValueError(f"rocketkv: a row of the slab has {self.keys[row].nbytes} bytes for its tokens, too few")
        for name, tensor in tensors.items():
            place = (places[name] if name in places else self.memory[name][row])[: tensor.numel()]
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
        """Append one token to each of some rows, and attend to the tokens that stage 2 selects, in one step.

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
            Whether the kernels, or the CPU step, support the layer; if not, nothing is done.
        """
        space = self.workspace(config, query.shape[0], workspaces)
        if space is None:
            return False
        buffers = self._buffers(index_of(row_sizes(config, self.shape, self.max_prompt).split))
        run_kernels(query, key, value, buffers, space, params, out, self._step_rows(rows))
        return True

    def workspace(self, config: RocketKVConfig, batch: int, workspaces: Workspaces) -> Any:
        """Return the backend's workspace for steps of so many rows, or warn and return None if it supports none."""
        sizes, shape = row_sizes(config, self.shape, self.max_prompt), self.shape
        if sizes.split is None:
            workspaces.warn("decode steps of this layer run row by row: splits of this method differ in kind")
            return None
        most = 1 << (batch - 1).bit_length()  # one for all numbers of rows up to a power of two
        stored = most, shape.kv_heads, sizes.slots, shape.head_dim
        most_of = shape.heads, shape.value_dim, sizes.pages
        backend = backend_name(self.keys.device, config.backend)
        found = slab_workspace(backend, stored, most_of, sizes.split, self.keys, workspaces)
        if isinstance(found, str):
            workspaces.warn(f"decode steps of this layer run row by row on PyTorch, not on the kernels: {found}")
            return None
        return found

    @property
    def keys(self) -> Tensor:
        """The memory of keys, values and page bounds of all rows, [R, elements], in the keys' dtype."""
        return self.memory[SHARED]

    def _buffers(self, index: TokenIndex | None) -> DecodeBuffers:
        memory = {**self.memory, "bounds": self.bounds}
        ring = memory.get("query_ring")
        return DecodeBuffers(
            keys=self.keys,
            values=self.keys,
            positions=memory["positions"],
            seq_lens=memory["seq_lens"],
            index_tensors=tuple(memory[name] for name in (() if index is None else index.names)),
            value_sum=memory.get("value_sum"),
            residual_bias=memory.get("residual_bias"),
            missed=memory.get("missed"),
            query_ring=None if ring is None else ring.view(len(ring), self.shape.heads, -1, self.shape.head_dim),
            clock=self.clock,
        )

    def _step_rows(self, rows: Tensor) -> StepRows:
        tokens = self.keys.stride(0) // self.shape.head_dim
        slots = self.memory["positions"].stride(0)
        return StepRows(rows, self.rules, tokens, slots, self.bounds.stride(0) // TILE_PAGES)


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
