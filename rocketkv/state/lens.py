"""Token counts of a store, as the host knows them."""

import torch
from torch import Tensor


class SeqLens:
    """Token counts of one layer on the host.

    The host counts in parallel, so that no step reads the device. Steps of a CUDA graph replay or of a compiled forward
    increment only the device's clock; `settle` adds those steps when a count is read.

    Attributes:
        seen: tokens of the sequence so far, padding and evicted ones included.
        longest: N, tokens that the longest row stores.
        shortest: tokens that the shortest row stores.
        uncounted: whether the device may have run steps that the host did not count.
        captured: whether a CUDA graph may run more of them at any time.
    """

    def __init__(self) -> None:
        self.seen = self.longest = self.shortest = 0
        self.uncounted = self.captured = False

    def advance(self, steps: int = 1) -> None:
        """Count `steps` tokens that were appended to every row."""
        self.seen += steps
        self.longest += steps
        self.shortest += steps

    def settle(self, clock: Tensor, capacity: int) -> bool:
        """Count the steps that only the device has counted; waits for the device.

        Args:
            clock: [1] int32, tokens of the sequence.
            capacity: slots of the buffers.

        Returns:
            Whether the buffers had room for all of them; if not, nothing is counted.
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
