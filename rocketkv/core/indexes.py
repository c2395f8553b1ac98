"""Both makes of stage 2's index behind one seam: pages of min/max bounds, and the sketch of every key.

An index is a few tensors beside the buffer of keys, by name, which a store holds with all others; what is done to them
is a function of the split and of the keys. So a store, a snapshot and a file need not know which make it is.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, P page size, U units that have a score each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..budget import BudgetSplit, sketch_bytes
from .attention import score
from .pages import (
    TILE_PAGES,
    build_index,
    close_page,
    close_pages,
    grow_index,
    index_rows,
    movable,
    page_count,
    tile_count,
)
from .sketch import Sketch, build_sketch, code_bytes, grow_sketch, rotation, score_sketch, write_tokens

Parts = Mapping[str, Tensor]


class Index(Protocol):
    """What a make of index can do; `parts` are its tensors by name, `names` in their order.

    Attributes:
        names: of the tensors.
        slotted: those of them whose third dimension belongs to the slots of the buffer of keys.
    """

    names: ClassVar[tuple[str, ...]]
    slotted: ClassVar[tuple[str, ...]]

    def build(self, keys: Tensor, tokens: int, lengths: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Return the parts of an index of a buffer of keys [B, Hkv, capacity, D].

        Args:
            keys: the buffer.
            tokens: how many of its slots the longest row fills.
            lengths: [B, Hkv] int32, tokens of each row, or None where all have as many.
            dtype: of pages' bounds, or None for the keys'.
        """
        ...

    def grow(self, parts: Parts, capacity: int) -> dict[str, Tensor]:
        """Return the parts with room for a buffer of `capacity` slots, which has as many as they have or more."""
        ...

    def append(self, parts: Parts, keys: Tensor, lengths: Tensor, slot: int | None) -> None:
        """Take in the last token of every row, in place and without a host sync.

        Args:
            parts: of the index.
            keys: [B, Hkv, capacity, D], the token among them.
            lengths: [B, Hkv] int32, tokens of each row, that one included.
            slot: where it is in all rows, or None where rows differ.
        """
        ...

    def rebuild(self, parts: Parts, keys: Tensor, tokens: int) -> None:
        """Write the index of the first `tokens` slots of keys [B, Hkv, capacity, D] anew, after tokens were moved."""
        ...

    def score(
        self,
        query: Tensor,
        parts: Parts,
        keys: Tensor,
        *,
        stored: int,
        lengths: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Estimate the logits [B, H, U] float32 of the units of stored tokens; arbitrary beyond a row's length."""
        ...

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """Return the shape of a part behind [B, Hkv], for a buffer of `capacity` slots."""
        ...

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """Return the bytes of all parts per row and KV head; pages' bounds have `itemsize` bytes."""
        ...

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """Return the bytes that scoring N tokens reads per row and KV head.

        Args:
            stored: N.
            head_dim: D.
            itemsize: bytes of a page's bound.
            nominal: whether to count as budgets do, by pages and in 16 bits, or as the index is read, by whole tiles.
        """
        ...


@dataclass(frozen=True)
class PageIndex:
    """The bounds of pages of P tokens, scored on r channels: see `rocketkv.core.pages`."""

    page_size: int
    channels: int
    names: ClassVar[tuple[str, ...]] = ("index",)
    slotted: ClassVar[tuple[str, ...]] = names

    def build(self, keys: Tensor, tokens: int, lengths: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """See `Index`."""
        return {"index": build_index(keys, tokens, self.page_size, dtype)}

    def grow(self, parts: Parts, capacity: int) -> dict[str, Tensor]:
        """See `Index`."""
        return {"index": grow_index(parts["index"], capacity, self.page_size)}

    def append(self, parts: Parts, keys: Tensor, lengths: Tensor, slot: int | None) -> None:
        """See `Index`."""
        if slot is None:
            close_pages(parts["index"], keys, lengths, self.page_size)
        elif (slot + 1) % self.page_size == 0:
            close_page(parts["index"], keys, slot // self.page_size, self.page_size)

    def rebuild(self, parts: Parts, keys: Tensor, tokens: int) -> None:
        """See `Index`."""
        bounds = parts["index"]
        movable(bounds).copy_(movable(build_index(keys, tokens, self.page_size, bounds.dtype)))

    def score(
        self,
        query: Tensor,
        parts: Parts,
        keys: Tensor,
        *,
        stored: int,
        lengths: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """See `Index`."""
        return score(
            query,
            parts["index"],
            keys,
            stored=stored,
            lengths=lengths,
            page_size=self.page_size,
            channels=self.channels,
            scaling=scaling,
            softcap=softcap,
        )

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """See `Index`."""
        return tile_count(capacity, self.page_size), index_rows(head_dim, self.page_size), TILE_PAGES

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """See `Index`."""
        return math.prod(self.shape("index", capacity, head_dim)) * itemsize

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """See `Index`."""
        pages = page_count(stored, self.page_size) if nominal else tile_count(stored, self.page_size) * TILE_PAGES
        return pages * self.channels * itemsize


@dataclass(frozen=True)
class SketchIndex:
    """The sketch of every key in some bits a channel: see `rocketkv.core.sketch`.

    Its mean is that of the prompt's survivors and stays, so that a token's sketch depends on nothing but the token.
    """

    bits: int
    names: ClassVar[tuple[str, ...]] = ("codes", "scales", "mean")
    slotted: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def build(self, keys: Tensor, tokens: int, lengths: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """See `Index`."""
        return build_sketch(keys, tokens, rotation(keys.shape[3], keys.device), self.bits, lengths)._asdict()

    def grow(self, parts: Parts, capacity: int) -> dict[str, Tensor]:
        """See `Index`."""
        return grow_sketch(Sketch(**parts), capacity)._asdict()

    def append(self, parts: Parts, keys: Tensor, lengths: Tensor, slot: int | None) -> None:
        """See `Index`."""
        turn = rotation(keys.shape[3], keys.device)
        if slot is not None:
            write_tokens(Sketch(**parts), keys.narrow(2, slot, 1), slot, turn, self.bits)
            return
        last = (lengths.long() - 1).clamp(min=0)
        own = keys.gather(2, last[..., None, None].expand(-1, -1, 1, keys.shape[3]))
        write_tokens(Sketch(**parts), own, last, turn, self.bits)

    def rebuild(self, parts: Parts, keys: Tensor, tokens: int) -> None:
        """See `Index`."""
        write_tokens(Sketch(**parts), keys[:, :, :tokens], 0, rotation(keys.shape[3], keys.device), self.bits)

    def score(
        self,
        query: Tensor,
        parts: Parts,
        keys: Tensor,
        *,
        stored: int,
        lengths: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """See `Index`."""
        return score_sketch(query, Sketch(**parts), self.bits, stored=stored, scaling=scaling, softcap=softcap)

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """See `Index`."""
        shapes = {"codes": (capacity, code_bytes(head_dim, self.bits)), "scales": (capacity,), "mean": (head_dim,)}
        return shapes[name]

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """See `Index`."""
        return capacity * sketch_bytes(head_dim, self.bits) + head_dim * torch.float32.itemsize

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """See `Index`."""
        mean = head_dim * (torch.bfloat16 if nominal else torch.float32).itemsize
        return stored * sketch_bytes(head_dim, self.bits) + mean


INDEX_TENSORS = (*PageIndex.names, *SketchIndex.names)
"""The tensors of every make, by the names that a store gives them."""


def index_of(split: BudgetSplit | None) -> Index | None:
    """Return the index that a split asks for, or None where nothing is scored."""
    if split is None:
        return None
    if split.sketch_bits is not None:
        return SketchIndex(split.sketch_bits)
    return None if split.channels is None else PageIndex(split.page_size, split.channels)
