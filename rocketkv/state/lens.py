"""How many tokens a store has seen and stores, as the host knows it."""

import torch
from torch import Tensor


class SeqLens:
    """Counts of one layer's tokens on the host.

    The host counts along, so that no step asks the device. But steps that a CUDA graph replays, or that a compiled
    forward runs, raise only the device's clock; `settle` adds those when somebody asks.

    Attributes:
        seen: tokens of the sequence so far, padding and evicted ones included.
        longest: N, tokens that the longest row stores.
        shortest: tokens that the shortest row stores.
        uncounted: whether the device may have taken steps that the host did not count.
        captured: whether a CUDA graph may take more at any time.
    """

    def __init__(self) -> None:
        self.seen = self.longest = self.shortest = 0
        self.uncounted = self.captured = False

    def advance(self, steps: int = 1) -> None:
        """Count tokens that every row has got."""
        self.seen += steps
        self.longest += steps
        self.shortest += steps

    def settle(self, clock: Tensor, capacity: int) -> bool:
        """Count the steps that only the device knows of; waits for it.

        Args:
            clock: [1] int32, tokens of the sequence.
            capacity: slots of the buffers.

        Returns:
            Whether all of them had room; if not, nothing is counted.
        """
        steps = int(clock) - self.seen
        if self.longest + steps > capacity:
            return False
        self.uncounted = self.captured  # a graph may be replayed at any time
        self.advance(steps)
        return True

    def set_from(self, seq_lens: Tensor) -> None:
        """Read the longest and the shortest row from [B, Hkv]; waits for the device."""
        self.shortest, self.longest = (int(n) for n in torch.stack(seq_lens.aminmax()).tolist())

    def copy(self) -> "SeqLens":
        """Return an independent copy."""
        other = SeqLens()
        other.__dict__.update(self.__dict__)
        return other
