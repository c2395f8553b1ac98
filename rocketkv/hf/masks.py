"""Attention masks that are evaluated for a block of queries at a time: no S x S mask is built.

Letters: B batch, Hkv KV heads, S tokens of a sequence so far, n queries of this forward, N stored tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.dense import VisibleBlock

# (batch, head, query position, key position), broadcastable index tensors, to bool: transformers' mask functions.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class LazyMask:
    """A model's attention mask, kept as a function until a block of it is needed.

    It replaces a mask tensor in a model's forward, so it implements the few tensor methods that models call.

    Attributes:
        mask_function: maps index tensors to bool, True where a query sees a key; ignores padding.
        padding: [B, >= kv_offset + kv_length] bool, True at tokens, or None.
        batch_size: B.
        query_length: n.
        query_offset: position of the first query; an int, or a tensor in static caches.
        kv_length: keys of this layer.
        kv_offset: position of the first key.
        causal: whether the mask is plain causal, apart from padding.
        window: tokens that a query sees if the mask is causal with a sliding window, apart from padding; else None.
        device: device of the blocks.
        dtype: dtype reported to models.
    """

    mask_function: MaskFunction
    padding: Tensor | None
    batch_size: int
    query_length: int
    query_offset: int | Tensor
    kv_length: int
    kv_offset: int
    causal: bool
    device: torch.device
    dtype: torch.dtype = torch.bool
    window: int | None = None
    _padded: bool | None = field(default=None, repr=False)
    _starts: tuple[tuple[int, ...], bool] | None = field(default=None, repr=False)
    _longest: dict[int, int] = field(default_factory=dict, repr=False)
    _rows: dict[tuple[int, int | None], VisibleBlock] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape that the mask tensor would have."""
        return self.batch_size, 1, self.query_length, self.kv_length

    @property
    def ndim(self) -> int:
        """Four, as of the mask tensor."""
        return 4

    def dim(self) -> int:
        """Return four, as of the mask tensor."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """Return the shape that the mask tensor would have, or one side of it."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> "LazyMask":
        """Return itself: its function may refer to tensors of this device; blocks move to the layer's device."""
        return self

    def contiguous(self) -> "LazyMask":
        """Return itself."""
        return self

    @property
    def padded(self) -> bool:
        """Whether any key is padding. Waits for the device once per forward, so only prefill may use it."""
        if self._padded is None:
            self._padded = self.padding is not None and not bool(self._key_padding().all())
        return self._padded

    @property
    def offset(self) -> int | Tensor:
        """Position of the first query, an int in every prompt. May wait for the device once per forward."""
        if isinstance(self.query_offset, Tensor) and self.query_length > 1:
            self.query_offset = int(self.query_offset)
        return self.query_offset

    @property
    def plain(self) -> bool:
        """Whether the mask is plain: causal, with the queries at the end of the keys, and no padding.

        Then attention needs no mask, for one query or if queries and keys are the same tokens.
        """
        if not self.causal or self.query_length not in (1, self.kv_length):
            return False
        offset = self.offset
        if not isinstance(offset, int) or offset + self.query_length != self.kv_offset + self.kv_length:
            return False
        return self.padding is None or (self.query_length > 1 and not self.padded)

    @property
    def at_end(self) -> bool:
        """Whether this is a prompt's mask, with the queries at the end of the keys."""
        offset = self.offset
        last = self.kv_offset + self.kv_length
        return self.query_length > 1 and isinstance(offset, int) and offset + self.query_length == last

    def key_padding(self) -> Tensor | None:
        """Return [B, kv_length] bool, True at tokens, for this layer's keys, or None without padding."""
        return self._key_padding() if self.padded else None

    def _key_padding(self) -> Tensor:
        """Return the padding at this layer's keys, [B, kv_length]; keys that the 2D mask does not reach are padding."""
        return self._padding_between(self.kv_offset, self.kv_offset + self.kv_length)

    def _padding_between(self, start: int, stop: int) -> Tensor:
        if self.padding is None:
            raise ValueError("this mask has no padding to look up")
        found = self.padding[:, start:stop]
        missing = stop - start - found.shape[1]
        return found if missing <= 0 else torch.nn.functional.pad(found, (0, missing))

    def row_starts(self) -> tuple[int, ...] | None:
        """Return the first token of each row among this layer's keys, or None if padding lies behind a token.

        A row of only padding starts at `kv_length`. Waits for the device once per forward.
        """
        if self._starts is None:
            self._starts = (0,) * self.batch_size, True
            if self.padded:
                valid = self._key_padding()
                behind = (valid[:, :-1] & ~valid[:, 1:]).any(-1)
                found = torch.stack((valid.shape[1] - valid.sum(-1), behind), dim=-1).tolist()
                self._starts = tuple(row[0] for row in found), not any(row[1] for row in found)
        starts, left = self._starts
        return starts if left else None

    def valid_tokens(self, start: int, stop: int) -> Tensor | None:
        """Return [B, stop - start] bool, True at tokens, for sequence positions, or None without padding."""
        return self._padding_between(start, stop) if self.padded else None

    def longest_row(self, stop: int) -> int:
        """Return the longest row's tokens of the sequence's first `stop`; waits for the device once per forward."""
        if not self.padded or self.padding is None:
            return stop
        if stop not in self._longest:
            self._longest[stop] = int(self.padding[:, :stop].sum(-1).max())
        return self._longest[stop]

    def block(self, start: int, stop: int, keys: int, *, window: int | None = None) -> VisibleBlock:
        """Evaluate the mask for queries `start` to `stop` of this forward over this layer's keys.

        Args:
            start: first query.
            stop: one past the last query.
            keys: number of this layer's keys to evaluate.
            window: `mask_function` hides keys at least this far before a query, so these are skipped; or None.

        Returns:
            The range of keys, and [1 or B, 1 or H, stop - start, keys] bool.
        """
        if self.query_length == 1 and (keys, window) in self._rows:
            return self._rows[keys, window]  # all layers of a kind share one row
        first, last = 0, min(keys, self.kv_length)
        offset = self.offset
        if isinstance(offset, int):
            if window is not None:
                first = min(max(0, offset + start - window + 1 - self.kv_offset), last - 1)
            if self.causal or window is not None:
                last = max(first + 1, min(last, offset + stop - self.kv_offset))
        position = torch.arange(first, last, device=self.device) + self.kv_offset
        mask = self._evaluate(start, stop, position[None, None, None, :])
        # A decode step applies padding without asking the device whether there is any.
        if self.padding is not None and (self.query_length == 1 or self.padded):
            mask = mask & self._key_padding()[:, None, None, first:last]
        seen = VisibleBlock(first, last, mask)
        if self.query_length == 1:
            self._rows[keys, window] = seen
        return seen

    def block_at(self, start: int, stop: int, positions: Tensor) -> Tensor:
        """Evaluate the mask for queries `start` to `stop` of this forward at stored tokens.

        Args:
            start: first query.
            stop: one past the last query.
            positions: [B, Hkv, N] sequence positions, -1 where there is no token.

        Returns:
            [B, Hkv, stop - start, N] bool.
        """
        position = positions.to(self.device).long()[:, :, None, :]
        return self._evaluate(start, stop, position.clamp(min=0)) & (position >= 0)

    def _evaluate(self, start: int, stop: int, position: Tensor) -> Tensor:
        device = self.device
        batch = torch.arange(self.batch_size, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        queries = (torch.arange(start, stop, device=device) + self.offset)[None, None, :, None]
        mask = self.mask_function(batch, head, queries, position)
        return mask.expand(mask.shape[0], mask.shape[1], stop - start, position.shape[-1])
