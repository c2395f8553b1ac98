"""Small tensors that are the same at every decode step.

On a CPU to make one takes about as long as an operation that matters, and so does an operation with a number of
Python's, which becomes a tensor first. A step has dozens of either in every layer.
"""

import functools

import torch
from torch import Tensor

MOST_STEPS = 8192  # what is kept stays small: 64 tensors of 64 KiB at most


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # it may be used in a later call that is not in inference mode
def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a number as a tensor [] on the CPU, which stands beside tensors of any device; do not write into it."""
    return torch.tensor(value, dtype=dtype, device="cpu")  # whatever the default device is


def steps(count: int, step: int, device: torch.device) -> Tensor:
    """Return the first multiples of `step` from 0 on, [count] int64; do not write into it."""
    # Elsewhere a graph that is being captured would keep them in memory of its own.
    if device.type == "cpu" and count <= MOST_STEPS:
        return _steps(count, step)
    return torch.arange(0, count * step, step, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _steps(count: int, step: int) -> Tensor:
    return torch.arange(0, count * step, step, device="cpu")
