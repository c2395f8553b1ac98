"""The interface of the two indexes of stage 2: the page index and the sketch index.

An index is a small frozen object that builds, updates and scores, and a tuple of tensors in the order of its `names`,
which the store owns. So stores, snapshots and files treat both indexes alike.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, U units (pages, or single tokens).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .params import AttentionParams


class TokenIndex(Protocol):
    """An index that estimates logits of stored tokens, one per unit: a page, or a single token of a sketch.

    Attributes:
        names: names of its tensors, in order.
        slotted: names of the tensors whose third dimension follows the slots of the key buffer.
    """

    names: ClassVar[tuple[str, ...]]
    slotted: ClassVar[tuple[str, ...]]

    def build(
        self,
        keys: Tensor,
        queries: Tensor,
        tokens: int,
        lengths: Tensor | None,
        dtype: torch.dtype | None,
        write_sketch: Callable[..., None] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the index tensors of a key buffer [B, Hkv, capacity, D].

        Args:
            keys: the buffer.
            queries: [B, H, W, D], the queries of the observation window, zeros at padding.
            tokens: slots that the longest row fills.
            lengths: [B, Hkv] int32, tokens of each row, or None if all rows have `tokens`.
            dtype: dtype of page bounds, or None for the dtype of the keys.
            write_sketch: a backend's `sketch.write_tokens`, or None for the reference.
        """
        ...

    def grow(self, tensors: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
        """Return the tensors with room for `capacity` slots, at least as many as before."""
        ...

    def append(
        self, tensors: Sequence[Tensor], keys: Tensor, lengths: Tensor, slot: int | None, count: int = 1
    ) -> None:
        """Index the last tokens of every row, in place and without a host sync.

        Args:
            tensors: the index tensors.
            keys: [B, Hkv, capacity, D], which include the tokens.
            lengths: [B, Hkv] int32, tokens of each row, the new ones included.
            slot: the first new token's slot in all rows, or None if rows differ.
            count: number of new tokens.
        """
        ...

    def rebuild(self, tensors: Sequence[Tensor], keys: Tensor, tokens: int) -> None:
        """Recompute the index of the first `tokens` slots of keys [B, Hkv, capacity, D], in place."""
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
        """Estimate the logits of all units.

        Args:
            query: [B, H, D], or [B, n H, D] in a verify step of n queries (`rocketkv.core.verify`).
            tensors: the index tensors.
            keys: [B, Hkv, capacity, D], the buffer of stored keys.
            params: the model's attention parameters.
            stored: N, tokens of the longest row.
            lengths: [B, Hkv], or [B, n Hkv], int32, tokens that each query sees; None if every one sees N.

        Returns:
            [B, H, U], or [B, n H, U], float32; arbitrary beyond a query's tokens.
        """
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
            nominal: whether to count as budgets do (16 bits, only the pages in use), or the bytes that kernels read
                (whole tiles).
        """
        ...
