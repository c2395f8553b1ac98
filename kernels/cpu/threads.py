"""Run compiled code in PyTorch's own OpenMP threads.

A second pool of threads, such as Numba's, competes for the cores with PyTorch's, whose threads spin for a while after
each operator. `GOMP_parallel` is how compilers start the threads of a parallel region: of the library that PyTorch is
linked with, it starts PyTorch's. Intel's and LLVM's OpenMP have it too.
"""

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch


@functools.cache  # constant for an installation
def _parallel() -> Any:
    """Return `GOMP_parallel(function, data, threads, flags)` of PyTorch's OpenMP, or None where it has none."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        # A search in a library includes those it is linked with.
        start = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


def thread_count() -> int:
    """Return how many threads `run` uses: as many as PyTorch, or one where its OpenMP cannot be called."""
    return 1 if _parallel() is None else torch.get_num_threads()


def run(entry: Any, block: int, threads: int) -> None:
    """Call a compiled entry with the address of a block of operands in each of some threads, and wait for all."""
    start = _parallel()
    if threads == 1 or start is None:
        entry.ctypes(ctypes.cast(block, entry.ctypes.argtypes[0]))
    else:
        start(entry.address, block, threads, 0)
