"""The seam between the two indexes of stage 2: pages of key bounds, and a sketch of every key.

An index is a small frozen object, which knows how to build, update and score, and a tuple of tensors in the order of
its `names`, which a store holds. So stores, snapshots and files treat both kinds alike.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, U units that have one score each.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .params import AttentionParams


class TokenIndex(Protocol):
    """An index that scores stored tokens, one score a unit (a page, or one token of a sketch).

    Attributes:
        names: names of its tensors, in order.
        slotted: names of the tensors whose third dimension follows the slots of the key buffer.
    """

    names: ClassVar[tuple[str, ...]]
    slotted: ClassVar[tuple[str, ...]]

    def build(self, keys: Tensor, tokens: int, lengths: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """Return the tensors of an index of a key buffer [B, Hkv, capacity, D].

        Args:
            keys: the buffer.
            tokens: slots that the longest row fills.
            lengths: [B, Hkv] int32, tokens of each row, or None where all rows have `tokens`.
            dtype: dtype of page bounds, or None for the keys'.
        """
        ...

    def grow(self, tensors: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
        """Return the tensors with room for a buffer of at least as many slots as before."""
        ...

    def append(self, tensors: Sequence[Tensor], keys: Tensor, lengths: Tensor, slot: int | None) -> None:
        """Index the last token of every row, in place and without a host sync.

        Args:
            tensors: the index's.
            keys: [B, Hkv, capacity, D], the token included.
            lengths: [B, Hkv] int32, tokens of each row, the new one included.
            slot: the token's slot in all rows, or None where rows differ.
        """
        ...

    def rebuild(self, tensors: Sequence[Tensor], keys: Tensor, tokens: int) -> None:
        """Index the first `tokens` slots of keys [B, Hkv, capacity, D] anew, in place, after tokens were moved."""
        ...

    def score(
        self,
        query: Tensor,
        tensors: Sequence[Tensor],
        keys: Tensor,
        params: AttentionParams,
        *,
        stored: int,
        lengths: Tensor | None,
    ) -> Tensor:
        """Estimate the logits [B, H, U] float32 of all units; values beyond a row's length are arbitrary."""
        ...

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """Return a tensor's shape after [B, Hkv], for a buffer of `capacity` slots."""
        ...

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """Return the bytes of all tensors per row and KV head; page bounds have `itemsize` bytes."""
        ...

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """Return the bytes that scoring N tokens reads per row and KV head.

        Args:
            stored: N.
            head_dim: D.
            itemsize: bytes of a page bound.
            nominal: whether to count whole pages in 16 bits, as budgets do, or whole tiles, as they are read.
        """
        ...
