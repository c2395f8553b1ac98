"""`rocketkv env`: versions, devices and the backend of each, for bug reports. Asks no network."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from .._version import __version__
from ..dispatch import backend_name

PACKAGES = ("transformers", "triton", "accelerate", "flash-attn")
GIBI = 2**30


def environment() -> dict[str, Any]:
    """Return versions (None for what is not installed) and devices as plain values, for JSON."""
    return {
        "versions": {
            "rocketkv": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,  # with its build, which the package's version lacks
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
        },
        "devices": [_cpu(), *_cuda(), *_mps(), *_xpu()],
    }


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
    """Describe the CPU: what the machine has, what this process may use, and what torch uses of it."""
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
    """Describe CUDA devices, which ROCm's are too."""
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


def _text(found: dict[str, Any]) -> str:
    lines = [f"{name:13} {'-' if version is None else version}" for name, version in found["versions"].items()]
    for device in found["devices"]:
        details = [device["name"]]
        if device["memory_bytes"] is not None:
            details.append(f"{device['memory_bytes'] / GIBI:.1f} GiB")
        if device["capability"] is not None:
            details.append(f"capability {device['capability']}")
        if "threads" in device:
            cores = "" if device["cores"] is None else f"{device['cores']} cores, "
            details.append(
                f"{cores}{device['threads']} threads ({device['usable_threads']} usable, torch takes "
                f"{device['torch_threads']})"
            )
        lines.append(f"{device['device']:13} {'; '.join(details)}; decode steps run on {device['backend']!r}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the environment; returns the exit code."""
    found = environment()
    sys.stdout.write((json.dumps(found, indent=2) if args.json else _text(found)) + "\n")
    return 0
