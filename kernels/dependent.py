"""Dependent launches: a kernel whose programs start before the one ahead of it on the stream has ended.

NVIDIA calls it programmatic dependent launch. A step's first kernel begins by permitting its successor to start; the
successors begin by waiting until the kernel ahead of them has ended and its writes are visible, and read nothing before
that. What overlaps is the launch itself. The first kernel is no dependent one: it starts when everything ahead of it
on the stream has ended, the last step of the previous layer included, so it overwrites nothing that is still read.
"""

import ctypes
import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST_ARCHITECTURE = 90  # sm_90 is the first that can
LEAST_DRIVER = 12030  # CUDA 12.3 is the first that documents their capture in a graph

# Older releases of Triton have no such launches.
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    AVAILABLE = False

    @triton.jit
    def gdc_wait():
        """Stand in for what is never compiled."""

    @triton.jit
    def gdc_launch_dependents():
        """Stand in for what is never compiled."""
else:
    AVAILABLE = not INTERPRETED


@triton.jit
def permit_successor(DEPENDENT: tl.constexpr):
    """Let a dependent kernel behind this one start when all programs of this one have come here or ended."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Wait until the kernel ahead has ended and its writes are visible: before the first access to memory."""
    if DEPENDENT:
        gdc_wait()


def launches_dependently(architecture: str | None, device: torch.device) -> bool:
    """Return whether the kernels of a step depend on one another so: on NVIDIA's devices from sm_90 on.

    Args:
        architecture: as `launches.architecture_of` returns it, or None.
        device: where; for one that is no GPU, to compile for the architecture alone, no driver is asked.
    """
    if not AVAILABLE or architecture is None or not architecture.startswith("sm_"):
        return False
    if int(architecture.removeprefix("sm_")) < LEAST_ARCHITECTURE:
        return False
    return device.type != "cuda" or driver_version() >= LEAST_DRIVER


@functools.cache  # constant for a process
def driver_version() -> int:
    """Return the CUDA version of NVIDIA's driver, 12030 for 12.3, or 0 where there is none."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value
