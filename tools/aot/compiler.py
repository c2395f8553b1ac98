"""Compile launches ahead of time, also for devices that this machine does not have, and measure the results.

Launches are recorded from the functions that make them, run on tensors without memory, and passed to Triton's launcher
with a compiler's target in place of a device, so that the compiled code is that of a real launch, specialisation
included.
"""

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernel_configurations import CONFIGURATIONS, OF_LENGTHS, meta

from .assembly import (
    accesses_before_wait,
    amd_accesses,
    loop_instructions,
    nvidia_accesses,
    one_line,
    permits_successor,
)
from .pipeline import pipeline
from .report import Report
from .sources import kernel_trees, load_sites
from .targets import TARGETS, Target


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(launch: Callable[[int, str], object], target_name: str) -> list[Launch]:
    """Record the launches of a function for a device without running them."""
    made: list[Launch] = []

    def record(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(Launch(kernel, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        launch(TARGETS[target_name].programs, target_name)
    return made


class _Driver:
    """Stands where Triton asks for the device that it compiles for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # compiled kernels are remembered by device

    def get_current_stream(self, device: str) -> int:
        return 0


def _tool(name: str) -> str:
    """Return the path of a program of NVIDIA's that comes with Triton."""
    spec = importlib.util.find_spec("triton.backends.nvidia")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"this Triton has no NVIDIA backend, where {name} would be")
    return str(Path(spec.origin).parent / "bin" / name)


def _measured(compiled: Any, target: Target, sites: dict[tuple[str, int], tuple[str, bool]]) -> dict[str, Any]:
    """Return resources, loads and loops of a compiled kernel, as fields of its report."""
    pointers = {place: pointer for place, (pointer, _) in sites.items()}
    loops: dict[str, Any] = {}
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            usage = _output(_tool("cuobjdump"), "--dump-resource-usage", str(path))
            # The text is the same without its analysis of data flow (-ndf).
            text = _output(_tool("nvdisasm"), "-ndf", "-g", "-c", str(path))
        accesses = list(nvidia_accesses(text))
        registers = re.search(r"\bREG:(\d+)", usage)
        buffers, in_flight = pipeline(compiled.asm["ttgir"], pointers)
        instructions = loop_instructions(text, pointers)
        loops = {"buffers": buffers, "in_flight": in_flight, "instructions": instructions}
        loops |= {"permits": permits_successor(text), "before_wait": accesses_before_wait(text)}
        loops["dependent"] = getattr(compiled.metadata, "launch_pdl", False)
    else:
        accesses = list(amd_accesses(compiled.asm["amdgcn"]))
        registers = re.search(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"])
    if registers is None:
        raise RuntimeError("the count of registers is not where it used to be")
    loads: dict[bool, dict[str, Counter[int]]] = {True: {}, False: {}}
    for place, kind, width in accesses:
        if kind == "load" and place in sites:
            pointer, inside = sites[place]
            loads[inside].setdefault(pointer, Counter())[width] += 1
    return {
        "warps": compiled.metadata.num_warps,
        "registers": int(registers[1]),
        "shared": compiled.metadata.shared,
        "spill_stores": sum(width for _, kind, width in accesses if kind == "spill store"),
        "spill_loads": sum(width for _, kind, width in accesses if kind == "spill load"),
        "loads": {name: dict(sorted(widths.items())) for name, widths in sorted(loads[True].items())},
        "outside": {name: dict(sorted(widths.items())) for name, widths in sorted(loads[False].items())},
        **loops,
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def _keep_lines() -> None:
    """Keep the lines of source in the assembled code; no instruction changes."""
    backend = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
    assemble = inspect.getattr_static(backend, "make_cubin")  # a static method until Triton 3.3

    def make_cubin(self: Any, ptx: str, *arguments: Any) -> bytes:
        made: bytes = assemble.__get__(self, backend)(one_line(ptx), *arguments)
        return made

    backend.make_cubin = make_cubin


@triton.jit
def _first_kernel(count):
    tl.store(count, 1)


def _prepare() -> None:
    """Read the sources, and compile something small.

    Triton 3.2 sets options of LLVM with the first kernel of a process, which itself goes without them.
    """
    kernel_trees()
    _keep_lines()
    # Triton warns for each kernel that the fusion of products and sums is its default.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
    driver.set_active(_Driver(GPUTarget("cuda", 80, 32)))
    _first_kernel.run(meta(1, dtype=torch.int32), grid=(1,), warmup=True)


def _compile(target_name: str, configuration_name: str) -> list[Report]:
    """Compile one configuration's kernels for one device; an error becomes a report."""
    target, configuration = TARGETS[target_name], CONFIGURATIONS[configuration_name]
    reports: list[Report] = []
    calls = launches(configuration.launch, target_name)
    driver.set_active(_Driver(GPUTarget(target.backend, target.arch, target.lanes)))
    for call in calls:
        name = call.kernel.fn.__name__
        if configuration.kernels is not None and name not in configuration.kernels:
            continue
        others = [other.options for other in calls if other.kernel is call.kernel]
        apart = [f"{key}={value}" for key, value in call.options.items() if any(o.get(key) != value for o in others)]
        measured: dict[str, Any]
        began = time.monotonic()
        try:
            compiled = call.kernel.run(*call.arguments, grid=call.grid, warmup=True, **call.options)
            measured = _measured(compiled, target, load_sites(call.kernel))
        except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, each of which is to be reported
            measured = {"error": "".join(traceback.format_exception(error, limit=0))}
        given = dict(zip(call.kernel.arg_names, call.arguments, strict=False)) | call.options
        measured["constants"] = {name: value for name, value in given.items() if name.isupper() and type(value) is int}
        measured["seconds"] = round(time.monotonic() - began, 2)
        kernel = f"{name}[{', '.join(apart)}]" if apart else name
        reports.append(Report(target_name, kernel, configuration_name, configuration.main, **measured))
    return reports


def recompiled(target_name: str) -> dict[str, list[str]]:
    """Return, of each set of launches in `OF_LENGTHS`, the kernels that a later one compiles anew; compiles nothing."""
    target = TARGETS[target_name]
    found: dict[str, list[str]] = {}
    known: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **others: Any) -> bool:
        known.add((fn.name, key))
        return True  # no need to compile

    # Triton calls this before it compiles; its place has changed.
    owner: Any = JITFunction
    hook = "cache_hook"
    if not hasattr(owner, hook):
        owner, hook = triton.knobs.runtime, "jit_cache_hook"
    driver.set_active(_Driver(GPUTarget(target.backend, target.arch, target.lanes)))
    with mock.patch.object(owner, hook, note):
        for title, several in OF_LENGTHS.items():
            for number, launch in enumerate(several):
                before = known.copy()
                for call in launches(launch, target_name):
                    call.kernel.run(*call.arguments, grid=call.grid, warmup=True, **call.options)
                if number:
                    found[title] = sorted({kernel.split(".")[-1] for kernel, _ in known - before})
    return found


def compile_all(targets: Sequence[str], jobs: int, brief: Sequence[str] = ()) -> list[Report]:
    """Compile the configurations for the named devices, in so many processes, from an empty cache.

    For those in `brief`, only the main ones, and those that have kernels which no main one has.
    """
    tasks = [
        (target, name)
        for target in targets
        for name, configuration in CONFIGURATIONS.items()
        if target not in brief or configuration.main or configuration.alone
    ]
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}):
        # Not forked: Triton's compiler has threads.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
            for (target, name), future in [(task, pool.submit(_compile, *task)) for task in tasks]:
                if isinstance(future.exception(), BrokenExecutor):
                    said = "the compiler ended its process, over this configuration or one compiled at the same time"
                    reports.append(Report(target, "any", name, CONFIGURATIONS[name].main, said))
                else:
                    reports += future.result()
    return reports
