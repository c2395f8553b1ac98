"""Compile every kernel ahead of time, also for devices that this machine does not have, and report the results.

`python -m rocketkv.eval.bench.aot` prints, for each device, the registers, shared memory and spilled bytes of each
kernel and how wide its main loop loads. Launches are recorded from the functions that make them, run on tensors without
memory, and passed to Triton's launcher with a compiler's target in place of a device, so that the compiled code is that
of a real launch, specialisation included.

Letters: B batch, H query heads, Hkv KV heads, D head dim, P page size, t token budget.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...kernels import decode
from .configurations import CONFIGURATIONS, meta


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        backend: Triton's name of its maker.
        arch: its architecture.
        lanes: threads of a warp.
        programs: its multiprocessors, by which launches are cut.
        since: the first Triton that compiles for it.
        reason: why no earlier one does.
    """

    backend: str
    arch: int | str
    lanes: int
    programs: int
    since: tuple[int, int] = (3, 2)
    reason: str = ""

    def left_out(self) -> str | None:
        """Return why the installed Triton does not compile for it, or None if it does."""
        installed = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if installed >= self.since:
            return None
        return f"Triton {triton.__version__} is older than {self.since[0]}.{self.since[1]}: {self.reason}"


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108),  # A100
    "sm_90": Target("cuda", 90, 32, 132),  # H100
    "sm_100": Target("cuda", 100, 32, 148, (3, 3), "its ptxas does not know this device"),  # B200
    "gfx942": Target("hip", "gfx942", 64, 304, (3, 5), "it links through an installation of ROCm"),  # MI300X
}


@dataclass(frozen=True)
class Report:
    """The result of compiling one kernel in one configuration.

    Attributes:
        target: name of the device.
        kernel: its name.
        configuration: its name.
        main: whether the configuration is a main one.
        error: the compiler's message, or None.
        warps: of a program.
        registers: of a thread; of a lane for AMD.
        shared: bytes of shared memory that a program asks for.
        spill_stores: bytes that a thread's instructions spill.
        spill_loads: bytes that they read back.
        loads: for each pointer that the main loop loads from, instructions by the bytes that a thread loads with each.
        outside: the same of the other loads.
        seconds: how long it took.
    """

    target: str
    kernel: str
    configuration: str
    main: bool
    error: str | None = None
    warps: int = 0
    registers: int = 0
    shared: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loads: dict[str, dict[int, int]] = field(default_factory=dict)
    outside: dict[str, dict[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def wide(self) -> int:
        """Instructions of the main loop that load 16 bytes or more."""
        return sum(count for widths in self.loads.values() for width, count in widths.items() if width >= 16)

    @property
    def narrow(self) -> int:
        """Instructions of the main loop that load fewer than 4 bytes."""
        return sum(count for widths in self.loads.values() for width, count in widths.items() if width < 4)


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(launch: Callable[[int], object], programs: int) -> list[Launch]:
    """Record the launches of a function without running them."""
    made: list[Launch] = []

    def record(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(Launch(kernel, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        launch(programs)
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


def _pointer(expression: ast.expr) -> str:
    """Return the name that an address starts from: `keys` of `keys + slot * D`."""
    while not isinstance(expression, ast.Name):
        if isinstance(expression, ast.BinOp):
            expression = expression.left
        elif isinstance(expression, ast.Call) and expression.args:
            expression = expression.args[0]
        else:
            return ast.unparse(expression)
    return expression.id


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}"


@functools.cache
def _trees() -> dict[str, ast.Module]:
    """Return the syntax trees of the kernels' files, as they were at the first call."""
    return {
        path.name: ast.parse(path.read_text(encoding="utf-8")) for path in Path(decode.__file__).parent.glob("*.py")
    }


def load_sites(kernel: JITFunction[Any]) -> dict[tuple[str, int], tuple[str, bool]]:
    """Return the pointer that each line of the kernels' files loads from, and whether in the kernel's main loop.

    The main loop is every loop of the kernel's body with a matrix product, or the whole body where there is none.
    """
    trees = _trees()
    functions = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    body = next(node for node in functions if node.name == kernel.fn.__name__)
    loops = [
        loop
        for loop in ast.walk(body)
        if isinstance(loop, ast.For | ast.While) and any(_is_call(node, "dot") for node in ast.walk(loop))
    ]
    inside = {node for loop in loops for node in ast.walk(loop)}
    return {
        (name, line): (_pointer(node.args[0]), node in inside or not loops)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _is_call(node, "load")
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


_SASS_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_SASS_ACCESS = re.compile(r"\s(?P<kind>LDG|LDGSTS|LDL|STL)(?P<parts>(?:\.\w+)*)\s")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_GCN_FILE = re.compile(r'\s\.file\s+(?P<number>\d+)\s+(?:"[^"]*"\s+)?"(?P<file>[^"]+)"')
_GCN_LINE = re.compile(r"\s\.loc\s+(?P<number>\d+)\s+(?P<line>\d+)")
_GCN_ACCESS = re.compile(r"\s(?P<kind>global_load|buffer_load|scratch_load|scratch_store)(?:_lds)?_(?P<type>\w+)")
_GCN_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_KINDS = {
    "LDG": "load", "LDGSTS": "load", "LDL": "spill load", "STL": "spill store",
    "global_load": "load", "buffer_load": "load", "scratch_load": "spill load", "scratch_store": "spill store",
}  # fmt: skip

Access = tuple[tuple[str, int], str, int]
"""Where an instruction comes from (file, line), whether it loads, spills or reads back, and the bytes of a thread."""


def nvidia_accesses(text: str) -> Iterator[Access]:
    """Return the memory accesses of a disassembly by `nvdisasm -g`."""
    place = ("", 0)
    for row in text.splitlines():
        if found := _SASS_LINE.search(row):
            place = (Path(found["file"]).name, int(found["line"]))
        elif found := _SASS_ACCESS.search(row):
            parts = found["parts"].split(".")
            yield place, _KINDS[found["kind"]], next((_SASS_WIDTHS[part] for part in parts if part in _SASS_WIDTHS), 4)


def amd_accesses(text: str) -> Iterator[Access]:
    """Return the memory accesses of an assembly for AMD."""
    place = ("", 0)
    files: dict[str, str] = {}
    for row in text.splitlines():
        if found := _GCN_FILE.search(row):
            files[found["number"]] = Path(found["file"]).name
        elif found := _GCN_LINE.search(row):
            place = (files.get(found["number"], ""), int(found["line"]))
        elif found := _GCN_ACCESS.search(row):
            width = _GCN_WIDTHS.get(found["type"])
            yield place, _KINDS[found["kind"]], width or (1 if "byte" in found["type"] else 2)


def _measured(compiled: Any, target: Target, sites: dict[tuple[str, int], tuple[str, bool]]) -> dict[str, Any]:
    """Return resources and loads of a compiled kernel, as fields of its report."""
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            usage = _output(_tool("cuobjdump"), "--dump-resource-usage", str(path))
            accesses = list(nvidia_accesses(_output(_tool("nvdisasm"), "-g", "-c", str(path))))
        registers = re.search(r"\bREG:(\d+)", usage)
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
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


_INLINE = re.compile(r"[ \t]*// begin inline asm\n.*?// end inline asm", re.DOTALL)
_PLACE = re.compile(r"^\s*\.loc\s.*\n", re.MULTILINE)


def one_line(ptx: str) -> str:
    """Return the program with each inlined piece of assembly at the line of source that it comes from.

    LLVM gives each line of inlined assembly, as of most loads, another line of source, counting up from the first.
    """

    def first_only(piece: re.Match[str]) -> str:
        places = _PLACE.findall(piece[0])
        return piece[0] if len(places) < 2 else places[0] + _PLACE.sub("", piece[0])

    return _INLINE.sub(first_only, ptx)


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
    _trees()
    _keep_lines()
    # Triton warns for each kernel that the fusion of products and sums is its default.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
    driver.set_active(_Driver(GPUTarget("cuda", 80, 32)))
    _first_kernel.run(meta(1, dtype=torch.int32), grid=(1,), warmup=True)


def _compile(target_name: str, configuration_name: str) -> list[Report]:
    """Compile one configuration's kernels for one device; an error becomes a report."""
    target, configuration = TARGETS[target_name], CONFIGURATIONS[configuration_name]
    reports: list[Report] = []
    calls = launches(configuration.launch, target.programs)
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
        measured["seconds"] = round(time.monotonic() - began, 2)
        kernel = f"{name}[{', '.join(apart)}]" if apart else name
        reports.append(Report(target_name, kernel, configuration_name, configuration.main, **measured))
    return reports


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


def table(reports: Sequence[Report]) -> str:
    """Return one device's reports as a table, then the errors; a main configuration has a star."""
    rows = [["kernel", "configuration", "warps", "registers", "shared", "spilled", "16 B", "<4 B", "the loop's loads"]]
    errors: dict[str, list[str]] = {}
    for report in sorted(reports, key=lambda report: report.kernel):
        row = [report.kernel, f"{report.configuration}{' *' if report.main else ''}"]
        if report.error is None:
            spilled = f"{report.spill_stores}/{report.spill_loads}"
            row += map(str, (report.warps, report.registers, report.shared, spilled, report.wide, report.narrow))
            loads = {
                name: " + ".join(f"{n}x{width}" for width, n in widths.items()) for name, widths in report.loads.items()
            }
            row.append(", ".join(f"{name} {found}" for name, found in loads.items()))
        else:
            row += [*"------", "does not compile"]
            errors.setdefault(report.error.rstrip(), []).append(f"{report.kernel} {report.configuration}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if 2 <= i < 8 else cell.ljust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    said = [f"\n{', '.join(names)}:\n{error}" for error, names in errors.items()]
    return "\n".join([*(line.rstrip() for line in lines), *said])


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report.

    Args:
        argv: the arguments, without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 where something did not compile.
    """
    parser = argparse.ArgumentParser(prog="python -m rocketkv.eval.bench.aot", description="Compile every kernel.")
    parser.add_argument("--target", action="append", choices=tuple(TARGETS), help="a device; by default each")
    parser.add_argument(
        "--brief", action="append", choices=tuple(TARGETS), help="a device to compile only the main configurations for"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 puts the interpreter in the compiler's place: unset it")
    began = time.monotonic()
    asked = arguments.target or list(TARGETS)
    left_out = {name: reason for name in asked if (reason := TARGETS[name].left_out()) is not None}
    reports = compile_all([name for name in asked if name not in left_out], arguments.jobs, arguments.brief or ())
    seconds = round(time.monotonic() - began, 1)
    if arguments.json:
        found = {"triton": triton.__version__, "seconds": seconds, "left_out": left_out}
        json.dump({**found, "reports": [asdict(report) for report in reports]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name in asked:
            sys.stdout.write(f"{name}, Triton {triton.__version__}\n")
            sys.stdout.write(left_out.get(name) or table([report for report in reports if report.target == name]))
            sys.stdout.write("\n\n")
        sys.stdout.write(
            f"* held to no spills on sm_80 and sm_90 and to wide loads; spilled: bytes of stores/loads; loads: "
            f"instructions x bytes. {len(reports)} kernels in {seconds} s.\n"
        )
    return int(any(report.error is not None for report in reports))


if __name__ == "__main__":
    sys.exit(main())
