"""The largest batch that fits into a device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from .memory import is_out_of_memory

MOST = 4096  # sequences
_FINE = 16  # the result is within one part of this


def largest_batch(run: Callable[[int], object]) -> int:
    """Return a number of sequences that fits, at least 15/16 of the largest that does; 0: not even one fits.

    Args:
        run: runs a number of sequences, and raises an error that means that memory ran out, or else returns.
    """
    low, high = 0, 1
    while high <= MOST and _fits(run, high):
        low, high = high, 2 * high
    while high <= MOST and high - low > max(1, low // _FINE):
        middle = (low + high) // 2
        if _fits(run, middle):
            low = middle
        else:
            high = middle
    return low


def _fits(run: Callable[[int], object], rows: int) -> bool:
    try:
        run(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors
        return False
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
    return True
