"""Versions, devices and the backend of each; uses no network."""

import importlib.metadata
import os
import platform
from importlib.resources import files
from typing import Any

import torch
from packaging.requirements import Requirement

from ._version import __version__
from .backend import backend_name

PACKAGES = ("transformers", "triton", "numba", "accelerate", "flash-attn", "lm_eval", "datasets", "kvpress")


def environment() -> dict[str, Any]:
    """Return the versions of packages (None if not installed) and the devices, as plain values for JSON."""
    return {
        "versions": {
            "rocketkv": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,  # the package's metadata lacks the build
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
        },
        "differs_from_lock": differs_from_lock(),
        "devices": [_cpu(), *_cuda(), *_mps(), *_xpu()],
    }


def differs_from_lock() -> dict[str, dict[str, str]]:
    """Return the installed packages that are not of the version tested with this release, and both versions."""
    found = {}
    for line in files(__package__).joinpath("locked.txt").read_text(encoding="utf-8").splitlines():
        locked = Requirement(line)
        version = _version(locked.name)
        applies = locked.marker is None or locked.marker.evaluate()
        if version is not None and applies and not locked.specifier.contains(version, prereleases=True):
            found[locked.name] = {"installed": version, "locked": str(locked.specifier).removeprefix("==")}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(kind: str, name: str, memory_bytes: int | None, **more: Any) -> dict[str, Any]:
    return {
        "device": kind,
        "name": name,
        "memory_bytes": memory_bytes,
        **more,
        "backend": backend_name(torch.device(kind)),
    }


def _cpu() -> dict[str, Any]:
    """Describe the CPU: the threads of the machine, those this process may use, and those torch uses."""
    name, cores = processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _device(
        "cpu",
        name,
        _host_memory(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=cores,
        threads=os.cpu_count(),
        usable_threads=usable,
        torch_threads=torch.get_num_threads(),
    )


def processor() -> tuple[str, int | None]:
    """Return the processor's name and, on Linux, its physical cores."""
    name, cores = platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
                if key.strip() == "core id":
                    cores.add((fields.get("physical id"), value.strip()))
    except OSError:
        return name, None
    return fields.get("model name", name), len(cores) or None


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # not on Windows


def _cuda() -> list[dict[str, Any]]:
    """Describe CUDA devices; ROCm devices count as CUDA devices."""
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        architecture = f"{properties.major}.{properties.minor}"
        if torch.version.hip is not None:
            architecture = properties.gcnArchName
        found.append(_device(f"cuda:{i}", properties.name, properties.total_memory, capability=architecture))
    return found


def _mps() -> list[dict[str, Any]]:
    if not torch.backends.mps.is_available():
        return []
    return [_device("mps", platform.processor() or "Apple GPU", torch.mps.recommended_max_memory(), capability=None)]


def _xpu() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.xpu.device_count()):
        properties = torch.xpu.get_device_properties(i)
        found.append(_device(f"xpu:{i}", properties.name, properties.total_memory, capability=None))
    return found


def machine() -> dict[str, Any]:
    """Return the machine and the versions that a figure depends on, as plain values for JSON."""
    name, cores = processor()
    return {
        "processor": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "backend": backend_name(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
