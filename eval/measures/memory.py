"""Peaks of memory, bytes of a cache, and errors that mean that memory ran out."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from ...state.stats import CacheStats
from ..records import CostDict

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # proc(5): writing it to clear_refs resets the peak, VmHWM, to the resident bytes

# Messages in addition to torch.OutOfMemoryError: the CPU allocator on Linux and on Windows, the driver, cuBLAS, MPS.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


class OutOfMemory(RuntimeError):  # noqa: N818  # `torch.OutOfMemoryError` has the other name
    """Memory ran out, here or in a child process."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the host or on a device."""
    if isinstance(error, (OutOfMemory, MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def release_free_memory() -> None:
    """Collect garbage, and let the C library (glibc) return its free memory to the system.

    On a CPU that memory counts as resident, and allocations from it do not show: after loading a model it may be as
    large as the weights.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return  # another C library: peaks on a CPU are missing or larger there
    trim(0)


def reset_peak(device: torch.device) -> int | None:
    """Reset the peak and return the bytes in use; None where neither is known.

    Counted are the bytes of the device's allocator (CUDA), or the resident bytes of the whole process (CPU, on Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        _CLEAR_REFS.write_text(_FORGET_PEAK, encoding="ascii")
        return _status_bytes("VmRSS")
    except OSError:
        return None  # not Linux, or a sandbox that forbids it: the peak there is that since the process began


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes in use since `reset_peak`, where that returned a number."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") if device.type == "cpu" else None


def _status_bytes(field: str) -> int | None:
    """Return a field of this process's status, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # written in kB, which are KiB
    return None


def cache_cost(stats: CacheStats) -> CostDict:
    """Return the bytes that a cache stores and that its next decode step reads, as fields of a record."""
    return {
        "kv_bytes": stats.total_bytes,
        "index_bytes": stats.total("index_bytes"),
        "full_kv_bytes": stats.total("full_bytes"),
        "step_bytes": stats.total("step_bytes"),
        "dense_step_bytes": stats.total("dense_step_bytes"),
        "nominal_step_bytes": stats.total("nominal_step_bytes"),
        "nominal_dense_step_bytes": stats.total("nominal_dense_step_bytes"),
    }
