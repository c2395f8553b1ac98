"""The cases of `rocketkv bench kernels`: one layer in the middle of decoding, its buffers and the bytes it moves.

Letters: B batch, H query heads, Hkv KV heads, D head dim, S tokens of the prompt, N stored tokens, t token budget,
W observation window, P page size, k tokens read.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...budget import BudgetSplit, sketch_bytes
from ...config import RocketKVConfig
from ...core.pages import TILE_PAGES, index_rows, tile_count
from ...core.params import AttentionParams
from ...state.compress import close_prompt
from ...state.stats import step_bytes
from ...state.store import KVStore
from .gpu_timing import COPY_BYTES, sets_for

METHODS = ("rocketkv", "rocketkv+")
# Attention that looks at few tokens, as real attention does: otherwise one token more or less would not show.
SHARPNESS = 3.0


@dataclass(frozen=True)
class LayerShape:
    """The layer of all cases; by default Llama-3.1-8B's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 32
    reserve: int = 128
    kernel_size: int = 63


TINY_LAYER = LayerShape(heads=4, kv_heads=2, head_dim=32, window=8, reserve=8, kernel_size=7)


@dataclass(frozen=True)
class Case:
    """Batch, prompt and budget; `ties` gives every token the same score."""

    batch: int
    context: int
    token_budget: int
    ties: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}/{self.token_budget}" + ("/ties" if self.ties else "")

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read `BATCHxCONTEXT/BUDGET`, with the suffix `/ties` for equal scores.

        Raises:
            ValueError: it is written otherwise.
        """
        found = re.fullmatch(r"(\d+)x(\d+)/(\d+)(/ties)?", text.strip())
        if found is None:
            raise ValueError(f"a case is BATCHxCONTEXT/BUDGET, as 8x32768/1024 (or 8x32768/1024/ties); got {text!r}")
        batch, context, token_budget = (int(part) for part in found.groups()[:3])
        if not batch:
            raise ValueError(f"batch must be at least 1, got {text!r}")
        return cls(batch, context, token_budget, found[4] is not None)

    def tiny(self) -> "Case":
        """Return a case of the same kind that the interpreter can run."""
        return Case(min(self.batch, 2), max(128, self.context // 128), max(32, self.token_budget // 16), self.ties)


def config_of(case: Case, layer: LayerShape, method: str = METHODS[0]) -> RocketKVConfig:
    """Return the settings of a method for a case."""
    return RocketKVConfig(
        method=method,
        token_budget=case.token_budget,
        decode_reserve=layer.reserve,
        window_size=layer.window,
        kernel_size=layer.kernel_size if method == METHODS[0] else None,
    )


def split_of(case: Case, layer: LayerShape, method: str = METHODS[0]) -> BudgetSplit:
    """Return the budget split of a case.

    Raises:
        ValueError: the budget is so large that nothing is selected, or too small for the method.
    """
    split = config_of(case, layer, method).split_for(case.context, layer.head_dim)
    # A sketch may have room for the whole of a short prompt.
    most = case.context - 1 if split.sketch_bits is None else case.context
    if split.kept_tokens is None or not case.token_budget < split.kept_tokens <= most:
        raise ValueError(
            f"case {case}: {method} stores {split.kept_tokens} of {case.context} tokens, and a step may read "
            f"{case.token_budget}: nothing is selected; lower the budget or raise the context"
        )
    return split


def kernel_name(method: str, kernel: str) -> str:
    """Return the name of a kernel's arm in the steps of a method."""
    return kernel if method == METHODS[0] else f"{kernel} ({method})"


def moved_bytes(case: Case, layer: LayerShape, itemsize: int) -> dict[str, int]:
    """Return the bytes of keys, values and index that a call reads, by arm; a step's are those of its first token."""
    rows, dims, sizes = case.batch * layer.kv_heads, (layer.head_dim, layer.head_dim), (itemsize, itemsize)
    moved = {"dense": rows * step_bytes(None, case.context, dims, sizes)}
    for method in METHODS:
        split = split_of(case, layer, method)
        stored = (split.kept_tokens or 0) + 1
        step = step_bytes(split, stored, dims, sizes)
        attended = min(split.top_k or stored, stored) * sum(dims) * itemsize
        first = "append_score" if split.sketch_bits is None else "append_sketch"
        moved[method] = rows * step
        moved[kernel_name(method, first)] = rows * (step - attended)
        moved[kernel_name(method, "select_attend")] = rows * attended
    return moved


def set_counts(case: Case, layer: LayerShape, itemsize: int, cache_bytes: int) -> dict[str, int]:
    """Return the numbers of dense sets and of each method's that keep all reads out of the L2 cache."""
    moved = moved_bytes(case, layer, itemsize)
    return {name: sets_for(moved[name], cache_bytes) for name in ("dense", *METHODS)}


def needed_bytes(case: Case, layer: LayerShape, itemsize: int, cache_bytes: int) -> int:
    """Return the memory that a case takes: its sets, the copy's buffers, and the float64 tensors of the checks."""
    sets = set_counts(case, layer, itemsize, cache_bytes)
    dense = moved_bytes(case, layer, itemsize)["dense"]
    stores = 0
    for method in METHODS:
        split = split_of(case, layer, method)
        capacity = (split.kept_tokens or 0) + layer.reserve
        row = 2 * capacity * layer.head_dim * itemsize
        if split.sketch_bits is None:
            rows = index_rows(layer.head_dim, split.page_size)
            row += tile_count(capacity, split.page_size) * rows * TILE_PAGES * itemsize
        else:
            row += capacity * sketch_bytes(layer.head_dim, split.sketch_bits)
        stores += sets[method] * case.batch * layer.kv_heads * row
    check = 4 * (8 // itemsize) * dense // case.batch
    return sets["dense"] * dense + stores + 4 * COPY_BYTES + check


class MethodStores:
    """The compressed stores of one method in a case, as stage 1 leaves them, with room for `reserve` tokens.

    Args:
        method: its name.
        split: of the case's budget.
        stores: one for each set of buffers.
    """

    def __init__(self, method: str, split: BudgetSplit, stores: list[KVStore]) -> None:
        self.method, self.split, self.stores = method, split, stores
        self._sums = [None if (s := store.decoding.buffers.value_sum) is None else s.clone() for store in stores]

    def rewind(self) -> None:
        """Reset every store to the end of the prompt on the device, so that the next round starts alike."""
        for number, store in enumerate(self.stores):
            self.rewind_one(store, number)

    def rewind_one(self, store: KVStore, number: int = 0) -> None:
        """Reset one store, or a copy of one, to the end of the prompt on the device."""
        buffers, value_sum = store.decoding.buffers, self._sums[number]
        buffers.seq_lens.fill_(self.split.kept_tokens or 0)
        store.clock().fill_(self.split.kept_tokens or 0)
        if buffers.value_sum is not None and value_sum is not None:
            buffers.value_sum.copy_(value_sum)


class CaseBuffers:
    """The sets of one case: queries, the full cache, and the compressed stores of each method.

    Args:
        case: the case.
        layer: its layer.
        dtype: of queries, keys and values.
        device: where.
        cache_bytes: size of the device's L2 cache; None for one set, which is enough for checks.
    """

    def __init__(
        self, case: Case, layer: LayerShape, dtype: torch.dtype, device: torch.device, cache_bytes: int | None
    ) -> None:
        self.case, self.layer, self.dtype, self.device = case, layer, dtype, device
        self.params = AttentionParams(layer.head_dim**-0.5)
        self.moved = moved_bytes(case, layer, dtype.itemsize)
        counts = dict.fromkeys(("dense", *METHODS), 1)
        if cache_bytes is not None:
            counts = set_counts(case, layer, dtype.itemsize, cache_bytes)
        self.dense_sets, sets = counts["dense"], max(counts[method] for method in METHODS)
        self._generator = torch.Generator(device).manual_seed(0)
        batch, heads, kv_heads, head_dim = case.batch, layer.heads, layer.kv_heads, layer.head_dim
        self.query = [self._query(batch, heads, head_dim) for _ in range(max(sets, self.dense_sets))]
        self.window = [self._normal(batch, heads, layer.window, head_dim) for _ in range(self.dense_sets)]
        self.keys = [self._keys(batch, kv_heads, case.context, head_dim) for _ in range(self.dense_sets)]
        self.values = [self._normal(batch, kv_heads, case.context, head_dim) for _ in range(self.dense_sets)]
        self.key = [self._keys(batch, kv_heads, head_dim) for _ in range(sets)]
        self.value = [self._normal(batch, kv_heads, head_dim) for _ in range(sets)]
        self.methods = {method: self._method(method, counts[method]) for method in METHODS}

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator, dtype=self.dtype, device=self.device)

    def _query(self, *sizes: int) -> Tensor:
        if self.case.ties:  # whole numbers: sums of them are exact in any order
            return torch.randint(-4, 5, sizes, generator=self._generator, device=self.device).to(self.dtype)
        return SHARPNESS * self._normal(*sizes)

    def _keys(self, *sizes: int) -> Tensor:
        return torch.ones(sizes, dtype=self.dtype, device=self.device) if self.case.ties else self._normal(*sizes)

    def _method(self, method: str, sets: int) -> MethodStores:
        config, split = config_of(self.case, self.layer, method), split_of(self.case, self.layer, method)
        return MethodStores(method, split, [self._store(config, split) for _ in range(sets)])

    def _store(self, config: RocketKVConfig, split: BudgetSplit) -> KVStore:
        """Return a store as stage 1 leaves it: its survivors are random as well."""
        layer, batch, kept = self.layer, self.case.batch, split.kept_tokens or 0
        store = KVStore()
        store.extend(
            self._keys(batch, layer.kv_heads, kept, layer.head_dim),
            self._normal(batch, layer.kv_heads, kept, layer.head_dim),
        )
        store.prompt.remember(self.window[0], layer.window)
        sizes: dict[str, Any] = {"decode_reserve": layer.reserve, "kernel_size": config.stage_1_kernel_size}
        close_prompt(store, split, self.params, decode_capacity=layer.reserve, **sizes)
        return store
