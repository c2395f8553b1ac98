"""Sizes of the slab's rows: those of the largest store that any prompt's split may need.

Letters: H query heads, Hkv KV heads, D head dim, Dv value dim, P page size, k tokens read.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..core.index import index_of
from ..core.pages import TILE_PAGES, index_dtype_of, page_count
from ..state.compress import kept_when_full

# Splits are sampled at every so many prompt lengths.
_STRIDE = 16

# Slots of a row come in multiples, so that the rows of each tensor begin at multiples of as many bytes.
ALIGNMENT = 16

# Keys, values and page bounds of a row share memory: the more bounds a split has, the fewer tokens.
SHARED, SHARING = "tokens", ("keys", "values", "bounds")

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
    """Return the splits of prompts of up to `max_prompt` tokens but for what they keep, and the slots of their rows."""
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
    most: dict[str, Any] = {}
    for name in ("page_size", "channels", "top_k"):
        found = {getattr(split, name) for split, _ in splits}
        most[name] = None if found == {None} else max(value or 0 for value in found)
    rule = replace(first, **most)
    same = all(replace(split, **most) == rule for split, _ in splits)
    return RowSizes(slots, pages, rule if same else None)


def memory_sizes(configs: Iterable[RocketKVConfig], shape: LayerShape, max_prompt: int) -> dict[str, int]:
    """Return the bytes of a row of each tensor; keys, values and page bounds share SHARED."""
    found: dict[str, int] = {}
    for config in configs:
        for split, capacity in _splits(config, shape, max_prompt):
            own = {
                name: count * dtype_of(name, config, shape).itemsize
                for name, count in _elements(config, split, shape, capacity).items()
            }
            together = sum(own.pop(name, 0) for name in SHARING)
            lines = TILE_PAGES * dtype_of("bounds", config, shape).itemsize
            unit = math.lcm(shape.head_dim * shape.dtype.itemsize, lines, ALIGNMENT)
            own[SHARED] = -(-together // unit) * unit
            for name, size in own.items():
                found[name] = max(found.get(name, 0), size)
    return found
