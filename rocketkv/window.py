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
        window = self.window
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
        if self.closed:
            # They have taken the places of those before them.
            self._ring_from = min(max(self._ring_from, self.seen - self.window.shape[2]), self.seen - removed)
        else:
            self.window = self.window[:, :, : max(0, self.window.shape[2] - removed)]
