"""How many tokens a store holds, as the host knows it and as the device does.

The host counts along, so that no step asks the device. But steps that a CUDA graph replays, or that a compiled forward
runs, raise the device's counts alone: after those the host learns of them when somebody asks.
"""

import torch
from torch import Tensor


class TokenCounts:
    """The counts of one layer's tokens.

    Attributes:
        keys: [B, Hkv, capacity, D], or None before the first token.
        decode_capacity: in static mode, slots for generated tokens beyond the last prompt's survivors; else None.
        ticks: [1] int32, the tokens seen, on the device; None before anything there reads it.
    """

    keys: Tensor | None
    decode_capacity: int | None
    ticks: Tensor | None
    _seen: int
    _stored: int
    _shortest: int
    _clock_shows: int  # what `ticks` say, as far as the host knows
    _uncounted: bool  # whether the device has taken steps that the host did not count
    _captured: bool  # whether it may take more at any time, by a CUDA graph

    def _clear_counts(self) -> None:
        self.decode_capacity = None
        self._seen = self._stored = self._shortest = self._clock_shows = 0
        self.ticks = None
        self._uncounted = self._captured = False

    @property
    def seen(self) -> int:
        """Tokens of the sequence so far, padding and evicted ones included."""
        self._count()
        return self._seen

    @seen.setter
    def seen(self, count: int) -> None:
        self._seen = count

    @property
    def stored(self) -> int:
        """N, slots in use of the longest row."""
        self._count()
        return self._stored

    @stored.setter
    def stored(self, count: int) -> None:
        self._stored = count

    @property
    def shortest(self) -> int:
        """Slots in use of the shortest row."""
        self._count()
        return self._shortest

    @shortest.setter
    def shortest(self, count: int) -> None:
        self._shortest = count

    @property
    def counted(self) -> bool:
        """Whether the host knows the counts without asking the device."""
        return not (self._uncounted or self._captured)

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return 0 if self.keys is None else self.keys.shape[2]

    def _count(self) -> None:
        """Take the device's steps into the host's counts, where there are some that it did not count."""
        if self.counted or self.ticks is None:
            return
        steps = int(self.ticks) - self._seen
        if self._stored + steps > self.capacity:
            raise ValueError(self.at_end())
        self._uncounted = False
        self._seen += steps
        self._stored += steps
        self._shortest += steps
        self._clock_shows = self._seen

    def at_end(self) -> str:
        """Return what to say where a static store has no room for a token."""
        return (
            f"the cache has room for decode_capacity={self.decode_capacity} generated tokens, and all of it is used; "
            "raise decode_capacity to the tokens that you will generate, or leave it None for a cache that grows; with "
            "when_full='evict' and a method that evicts by attention, twice window_size is enough for any length"
        )

    def advance(self, *, clocked: bool = False) -> None:
        """Count one token more in every row, as a decode step has done on the device.

        Args:
            clocked: whether that step has raised the device's clock as well.
        """
        self._seen += 1
        self._stored += 1
        self._shortest += 1
        if clocked:
            self._clock_shows = self._seen

    def advance_uncounted(self, *, captured: bool) -> None:
        """Note that the device takes a step, or will, which the host does not count.

        Args:
            captured: whether it is a CUDA graph that takes it, as often as it is replayed.
        """
        if captured:
            self._captured = True
        self._uncounted = True

    def count_step(self) -> None:
        """Count one step that was noted as uncounted, where it is known to be the only one."""
        self._uncounted = False
        self.advance(clocked=True)

    def clock(self) -> Tensor:
        """Return [1] int32, the tokens seen, on the device, where kernels read and raise it; it never moves.

        Raises:
            ValueError: there are no tokens.
        """
        if self.keys is None:
            raise ValueError("there are no tokens")
        seen = self.seen
        if self.ticks is None:
            with torch.inference_mode(False):
                self.ticks = torch.full((1,), seen, dtype=torch.int32, device=self.keys.device)
        elif self._clock_shows != seen:
            self.ticks.fill_(seen)
        self._clock_shows = seen
        return self.ticks
