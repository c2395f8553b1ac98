"""The decode phase of a store: compacted prompt tokens, and generated ones.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, N stored tokens, W query ring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.decode import DecodeBuffers
from ..core.residual import subtract_last, sum_values
from ..core.token_index import TokenIndex
from ..core.topk import gather_tokens, recent_positions
from .lens import SeqLens
from .prompt import larger
from .queries import QueryRing

# Least room of a rolling store. It drops half of its room when it rolls, so that rejected drafts can be cropped.
ROLLING_ROOM = 64

# Least slots by which buffers grow.
LEAST_GROWTH = 256


def decode_room(split: BudgetSplit, decode_reserve: int) -> int:
    """Return the slots for generated tokens that a store allocates when its prompt ends."""
    return max(decode_reserve, ROLLING_ROOM) if split.rolling else decode_reserve


def grown_capacity(stored: int) -> int:
    """Return the capacity that full buffers of `stored` slots grow to: the next multiple of a step.

    The step is a power of two between 1/16 and 1/8 of `stored`, but at least `LEAST_GROWTH`. So a generated token costs
    copies of at most 16 tokens, at most an eighth of large buffers is empty, and the capacity passes no power of two
    before the tokens do: kernels are compiled for powers of two, and choose in registers up to one.
    """
    step = max(LEAST_GROWTH, 1 << max(0, stored.bit_length() - 4))
    return (stored // step + 1) * step


@dataclass(eq=False, kw_only=True)
class DecodeTokens:
    """Compacted tokens of each row from slot 0 on, with room for generated tokens, and an index.

    Attributes:
        buffers: the tensors that a decode step reads and writes.
        split: the tokens and bytes that a step may read.
        index: the index that scores the stored tokens, or None.
        ring: host state of `buffers.query_ring`, or None without a ring.
        decode_capacity: in static mode, slots for generated tokens beyond the prompt's; None for buffers that grow.
        prompt_end: tokens of the sequence when the prompt ended; every row stores the tokens after it.
        prompt_stored: tokens that the longest row stored when the prompt ended.
        expected_error: upper bound of the outputs' mean relative error that the budget was chosen by, or None.
        moved: whether the prompt's end moved protected tokens before earlier ones.
        aligned: whether slot and position in the sequence are the same for every token.
    """

    buffers: DecodeBuffers
    split: BudgetSplit
    index: TokenIndex | None
    ring: QueryRing | None
    decode_capacity: int | None
    prompt_end: int
    prompt_stored: int
    expected_error: float | None = None
    moved: bool = False
    aligned: bool = False

    @property
    def keys(self) -> Tensor:
        """The keys [B, Hkv, capacity, D]."""
        return self.buffers.keys

    @property
    def values(self) -> Tensor:
        """The values [B, Hkv, capacity, Dv]."""
        return self.buffers.values

    @property
    def positions(self) -> Tensor:
        """Each slot's position in the sequence, [B, Hkv, capacity] int32."""
        return self.buffers.positions

    def named_index(self) -> dict[str, Tensor]:
        """Return the tensors of the index by name."""
        return {} if self.index is None else dict(zip(self.index.names, self.buffers.index_tensors, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, apart from the clock."""
        named = self.buffers._replace(index_tensors=(), clock=None)._asdict()
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)} | self.named_index()

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by name."""
        index = {**self.named_index(), **tensors}
        own = () if self.index is None else tuple(index[name] for name in self.index.names)
        others = {name: tensor for name, tensor in tensors.items() if name in DecodeBuffers._fields}
        self.buffers = self.buffers._replace(index_tensors=own, **others)

    @torch.inference_mode(False)
    def reserve(self, capacity: int, stored: int) -> None:
        """Move to buffers of `capacity` slots, of which `stored` are in use."""
        buffers = self.buffers
        self.buffers = buffers._replace(
            keys=larger(buffers.keys, capacity, stored),
            values=larger(buffers.values, capacity, stored),
            positions=larger(buffers.positions, capacity, stored, -1),
            index_tensors=() if self.index is None else self.index.grow(buffers.index_tensors, capacity),
        )

    def roll(self, lens: SeqLens, kept: int, slack: int) -> None:
        """Drop the oldest tokens other than sink tokens, and update the counts.

        Args:
            lens: the host's token counts.
            kept: tokens that a step attends to.
            slack: tokens to keep beyond those, so that rejected drafts can be cropped.
        """
        keys, values, positions, seq_lens = self.buffers[:4]
        count = kept + slack
        slot = torch.arange(lens.longest, device=keys.device)
        slots = recent_positions(slot < seq_lens[..., None], count, self.split.sinks or 0)
        real = slots < seq_lens[..., None]
        for buffer, tokens in zip((keys, values), gather_tokens(slots, keys, values), strict=True):
            buffer[:, :, :count] = tokens
        positions[:, :, :count] = torch.where(real, positions.gather(2, slots), -1)
        positions[:, :, count:] = -1
        seq_lens.clamp_(max=count)
        lens.longest, lens.shortest = count, min(lens.shortest, count)
        self.aligned = False

    def crop(self, lens: SeqLens, length: int, subtract: Callable[..., None] = subtract_last) -> None:
        """Drop the tokens from position `length` on, and update the counts.

        Args:
            lens: the host's token counts.
            length: tokens of the sequence to keep.
            subtract: a backend's `subtract_last`.
        """
        buffers, removed = self.buffers, lens.seen - length
        generated = length >= self.prompt_end
        if generated and buffers.value_sum is not None:
            counts = {"count": removed, "longest": lens.longest, "shortest": lens.shortest}
            subtract(buffers.value_sum, buffers.values, buffers.seq_lens, **counts)
        if self.ring is not None and buffers.query_ring is not None:
            self.ring.crop(buffers.query_ring, lens.seen, length)
        buffers.positions.masked_fill_(buffers.positions >= length, -1)
        buffers.seq_lens.copy_((buffers.positions >= 0).sum(-1))
        lens.seen = length
        if generated:
            lens.longest -= removed
            lens.shortest -= removed
        else:
            lens.set_from(buffers.seq_lens)
            self.prompt_end, self.prompt_stored = length, lens.longest
            self.sum_values(lens)
        if buffers.clock is not None:
            buffers.clock.fill_(length)

    def rebuild_index(self, lens: SeqLens) -> None:
        """Recompute the index and the sum of values, in place, after tokens were moved."""
        if self.index is not None:
            self.index.rebuild(self.buffers.index_tensors, self.keys, lens.longest)
        self.sum_values(lens)

    def sum_values(self, lens: SeqLens) -> None:
        """Recompute the sum of values, in place, after tokens were removed."""
        if self.buffers.value_sum is not None:
            lengths = None if lens.shortest == lens.longest else self.buffers.seq_lens
            self.buffers.value_sum.copy_(sum_values(self.values, lens.longest, lengths))

    def empty_behind(self, lens: SeqLens, used: int | None) -> None:
        """Clear the slots behind each row's tokens, up to slot `used` or, for None, to the end.

        Appends to rows of different lengths may leave a slot unwritten, and a masked NaN stays NaN.
        """
        first = lens.shortest
        for tensor, value in ((self.keys, 0), (self.values, 0), (self.positions, -1)):
            room = tensor[:, :, first:used]
            slot = torch.arange(first, first + room.shape[2], device=room.device)
            empty = slot >= self.buffers.seq_lens[..., None]
            room.masked_fill_(empty.view(*empty.shape, *[1] * (room.dim() - 3)), value)
