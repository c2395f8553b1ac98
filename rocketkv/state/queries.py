"""The last queries of a prompt, and the query ring: those of the last W tokens while decoding, to rank generated ones.

The ring itself is a tensor [B, H, W, D] of the decode buffers; the query of token i is at place i mod W.

Letters: B batch, H query heads, D head dim, n tokens of a forward, W query ring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SavedRing:
    """The query ring before a verify step, and the queries of that step.

    Attributes:
        seen: tokens of the sequence before the step.
        start: `QueryRing.start` before the step.
        ring: [B, H, W, D], a copy.
        query: [B, H, n, D], the step's queries.
    """

    seen: int
    start: int
    ring: Tensor
    query: Tensor


@dataclass(eq=False)
class QueryRing:
    """Host state of a query ring.

    Attributes:
        start: tokens of the sequence before the first query in the ring.
        saved: the state before a verify step, which a crop restores; or None.
    """

    start: int
    saved: SavedRing | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the saved state."""
        held = () if self.saved is None else (self.saved.ring, self.saved.query)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def count(self, ring: Tensor, seen: int) -> int:
        """Return the number of queries in the ring."""
        return min(ring.shape[2], seen - self.start)

    def last(self, ring: Tensor, seen: int) -> Tensor:
        """Return the queries [B, H, <= W, D] of the last tokens, in order."""
        size = ring.shape[2]
        place = torch.arange(max(self.start, seen - size), seen, device=ring.device) % size
        return ring.index_select(2, place)

    def save(self, ring: Tensor, query: Tensor, seen: int) -> None:
        """Save the state before a verify step of queries [B, H, n, D], some of which a crop may remove."""
        self.saved = SavedRing(seen, self.start, ring.clone(), query.detach())

    def crop(self, ring: Tensor, seen: int, length: int) -> None:
        """Drop the queries of tokens `length` to `seen`; a saved state restores the queries that they overwrote."""
        saved = self.saved
        if saved is None or not saved.seen <= length <= saved.seen + saved.query.shape[2]:
            # The dropped queries have overwritten earlier ones.
            self.start = min(max(self.start, seen - ring.shape[2]), length)
            return
        first = max(saved.seen, length - ring.shape[2])
        place = torch.arange(first, length, device=ring.device) % ring.shape[2]
        kept = saved.query[:, :, first - saved.seen : length - saved.seen].to(ring.dtype)
        ring.copy_(saved.ring.index_copy(2, place, kept))
        self.start = saved.start


def last_of_window(before: Tensor | None, newest: Tensor, size: int) -> Tensor:
    """Return the queries, or outputs, [B, H, <= size, D] of the last tokens of a prompt that is read in chunks.

    Args:
        before: those of earlier chunks, or None.
        newest: [B, H, n, D], of the newest chunk.
        size: number of tokens to keep.
    """
    recent = newest[:, :, -size:].detach()
    if before is not None and recent.shape[2] < size:
        recent = torch.cat((before, recent), dim=2)[:, :, -size:]
    # A copy: a slice would keep those of the whole prompt alive.
    return recent.clone() if recent.shape[2] < newest.shape[2] else recent


@torch.inference_mode(False)  # a ring may be written in a later call that is not in inference mode
def make_ring(queries: Tensor, size: int, seen: int) -> tuple[Tensor, QueryRing]:
    """Copy the last queries [B, H, n, D] into a query ring [B, H, size, D], after `seen` tokens of the sequence."""
    count = min(queries.shape[2], size)
    ring = queries.new_zeros(*queries.shape[:2], size, queries.shape[3])
    place = torch.arange(seen - count, seen, device=queries.device) % size
    return ring.index_copy_(2, place, queries[:, :, -count:]), QueryRing(seen - count)
