"""The queries of a sequence's last tokens, by which stage 1 ranks: those of a prompt, and those of what is decoded.

Letters: B batch, H query heads, D head dim, n tokens of a forward, W observation window.
"""

import torch
from torch import Tensor

from .counts import TokenCounts


class QueryWindow(TokenCounts):
    """What a layer's store remembers of queries.

    Attributes:
        window: in a prompt, the queries [B, H, <= W, D] of its last tokens. While decoding, a ring [B, H, W, D] in
            which the query of token i is at place i mod W, written in place; or None where nobody will rank by it.
        closed: whether the prompt is over.
    """

    window: Tensor | None
    closed: bool
    _ring_from: int  # tokens of the sequence before the first whose query the ring holds
    # Before several tokens at once: tokens seen, `_ring_from`, a copy of the ring, and the queries of those tokens.
    _earlier: tuple[int, int, Tensor, Tensor] | None = None

    def remember_queries(self, query: Tensor, window_size: int) -> None:
        """Keep the queries [B, H, n, D] of the last W tokens of the prompt so far."""
        recent = query[:, :, -window_size:].detach()
        if self.window is not None and recent.shape[2] < window_size:
            recent = torch.cat((self.window, recent), dim=2)[:, :, -window_size:]
        # A copy: a slice would keep the queries of the whole prompt alive.
        self.window = recent.clone() if recent.shape[2] < query.shape[2] else recent

    @torch.inference_mode(False)  # a ring may be written in a later call that is not in inference mode
    def close_window(self, size: int) -> None:
        """Turn a prompt's window into a ring of `size` queries, or into nothing where that is 0."""
        window, self._earlier = self.window, None
        if window is None or size == 0:
            self.window = None
            return
        count = min(window.shape[2], size)
        self._ring_from = self.seen - count
        ring = window.new_zeros(*window.shape[:2], size, window.shape[3])
        place = torch.arange(self._ring_from, self.seen, device=window.device) % size
        self.window = ring.index_copy_(2, place, window[:, :, -count:])

    def note_query(self, query: Tensor) -> None:
        """Remember the query [B, H, D] of the token that is about to be appended, if there is a ring."""
        if self.closed and self.window is not None:
            self.window.select(2, self.seen % self.window.shape[2]).copy_(query.detach())

    def foresee_queries(self, query: Tensor) -> None:
        """Hold on to the ring as it is and to the queries [B, H, n, D] of tokens that are about to be appended.

        Some of them may be taken back, as drafts are: then a crop leaves the ring as if those had never come.
        """
        if self.closed and self.window is not None:
            self._earlier = (self.seen, self._ring_from, self.window.clone(), query.detach())

    def forget_foreseen(self) -> None:
        """Let go of what `foresee_queries` holds on to."""
        self._earlier = None

    @property
    def held_back(self) -> tuple[Tensor, ...]:
        """What `foresee_queries` holds on to."""
        return () if self._earlier is None else self._earlier[2:]

    @property
    def remembered(self) -> int:
        """How many queries the ring holds, of the last tokens."""
        return 0 if not self.closed or self.window is None else min(self.window.shape[2], self.seen - self._ring_from)

    def last_queries(self) -> Tensor | None:
        """Return the queries [B, H, <= W, D] of the last tokens from the ring, in their order, or None without one."""
        if not self.closed or self.window is None:
            return None
        size, seen = self.window.shape[2], self.seen
        place = torch.arange(max(self._ring_from, seen - size), seen, device=self.window.device) % size
        return self.window.index_select(2, place)

    def crop_window(self, removed: int) -> None:
        """Forget the queries of the last `removed` tokens, before those are uncounted."""
        if self.window is None:
            return
        if self.closed and not self._restore_ring(self.seen - removed):
            # They have taken the places of those before them.
            self._ring_from = min(max(self._ring_from, self.seen - self.window.shape[2]), self.seen - removed)
        elif not self.closed:
            self.window = self.window[:, :, : max(0, self.window.shape[2] - removed)]

    def _restore_ring(self, length: int) -> bool:
        """Write the queries of the last of `length` tokens into the ring, if they are at hand; return whether so."""
        if self._earlier is None or self.window is None:
            return False
        start, ring_from, ring, query = self._earlier
        if not start <= length <= start + query.shape[2]:
            return False
        size = ring.shape[2]
        first = max(start, length - size)
        place = torch.arange(first, length, device=ring.device) % size
        kept = query[:, :, first - start : length - start].to(ring.dtype)
        self.window.copy_(ring.index_copy(2, place, kept))
        self._ring_from = ring_from
        return True
