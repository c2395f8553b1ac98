"""Copies of tokens between devices, which overlap computation where they can.

Letters: B batch, Hkv KV heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Fetched:
    """A copy to a device in progress.

    Attributes:
        tensors: keys, values, and positions if there are any.
        seen: tokens copied.
        room: slots behind them.
        stream: that copies, and later copies for other layers; None if the copy is complete.
        done: recorded on the stream behind this copy alone.
    """

    tensors: list[Tensor]
    seen: int
    room: int
    stream: "torch.cuda.Stream | None" = None
    done: "torch.cuda.Event | None" = None

    def arrived(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and positions; the current stream waits for them, and for no later copy."""
        if self.done is not None:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self.done)
        return self.tensors[0], self.tensors[1], self.tensors[2] if len(self.tensors) > 2 else None


def overlaps(device: torch.device) -> bool:
    """Whether copies to a device overlap its computation, so that they should start early."""
    return device.type == "cuda"


def buffer_like(tensor: Tensor, capacity: int, count: int, device: torch.device) -> Tensor:
    """Return a buffer of `capacity` slots with a tensor's first `count` slots; pinned on the host of a GPU."""
    pinned = device.type == "cpu" and (tensor.is_cuda or tensor.is_pinned())
    value = 0 if tensor.is_floating_point() else -1
    shape = (*tensor.shape[:2], capacity, *tensor.shape[3:])
    buffer = torch.full(shape, value, dtype=tensor.dtype, device=device, pin_memory=pinned)
    if count:
        buffer[:, :, :count].copy_(tensor[:, :, :count])
    return buffer


def copy_tokens(target: Tensor, source: Tensor) -> None:
    """Copy [B, Hkv, n, ...]; between a GPU and pinned host memory, without waiting.

    There it copies head by head: PyTorch copies non-contiguous tensors through memory that is not pinned.
    """
    if target.is_cuda == source.is_cuda:
        target.copy_(source)
        return
    for row, from_row in zip(target, source, strict=True):
        for tokens, given in zip(row, from_row, strict=True):
            tokens.copy_(given, non_blocking=True)
