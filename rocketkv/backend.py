"""Choose the backend of a device: PyTorch, the Triton kernels, or the compiled CPU step."""

import functools
import importlib.util
import os

import torch

from .config import BACKENDS

VARIABLE = "ROCKETKV_BACKEND"


def backend_name(device: torch.device, requested: str = "auto") -> str:
    """Return the backend for a device: `torch`, the reference; `triton`, the kernels; or `cpu`, the compiled CPU step.

    Args:
        device: device of keys and values.
        requested: `torch`, `triton`, `cpu` or `auto`. For `auto`, the environment variable ROCKETKV_BACKEND decides; if
            it is unset or `auto` too, the device and the installed packages decide.

    Raises:
        ValueError: the variable names no backend, or the requested backend cannot run on the device.
    """
    wanted = os.environ.get(VARIABLE, "auto") if requested == "auto" else requested
    if wanted not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}; got {wanted!r}")
    if wanted == "torch":
        return "torch"
    # Triton's interpreter is for tests: it must be requested.
    own = "cpu" if wanted == "cpu" or (wanted == "auto" and device.type == "cpu") else "triton"
    reason = no_cpu_step(device.type) if own == "cpu" else no_triton(device.type, _interpreted())
    if reason is None and (wanted == own or device.type in ("cpu", "cuda")):
        return own
    if wanted != "auto":
        raise ValueError(f"backend={wanted!r} cannot run on {device.type!r}: {reason}; use 'auto' or 'torch'")
    return "torch"


def automatic(requested: str) -> bool:
    """Whether neither the caller nor the environment names a backend."""
    return requested == "auto" and os.environ.get(VARIABLE, "auto") == "auto"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache  # constant for an installation
def no_triton(device_type: str, interpreted: bool = False) -> str | None:
    """Return why the kernels cannot run on a device type, or None if they can."""
    if device_type != "cuda" and not interpreted:
        return "the kernels need an NVIDIA or AMD GPU"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None


@functools.cache  # constant for an installation
def no_cpu_step(device_type: str) -> str | None:
    """Return why the compiled CPU step cannot run on a device type, or None if it can."""
    if device_type != "cpu":
        return "the compiled step needs a CPU"
    if importlib.util.find_spec("numba") is None:
        return "the numba package is not installed (pip install 'rocketkv[cpu]')"
    return None


def cpu_hint(device: torch.device) -> str:
    """Return a line that names the extra which would make steps on this device faster, or an empty string."""
    if device.type != "cpu" or no_cpu_step("cpu") is None:
        return ""
    return (
        "pip install 'rocketkv[cpu]' for a decode step that is compiled for this CPU; without it, steps run on PyTorch"
    )
