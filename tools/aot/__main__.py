"""`python tools/aot` (`make kernels-report`): compile every kernel ahead of time, for devices that need not be there.

Prints, for each device, the registers, shared memory and spilled bytes of each kernel, and of its main loop how wide it
loads, how many buffers its copies have, how many of them its waits leave unfinished, and its instructions. The launches
are those of tests/helpers/kernel_configurations.py.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

# Python puts the program's folder first on the path: its package and the tests' configurations take the place.
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(_ROOT / "tools"), str(_ROOT / "tests" / "helpers")]

from aot.compiler import compile_all, recompiled  # noqa: E402
from aot.report import table  # noqa: E402
from aot.targets import TARGETS  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report.

    Args:
        argv: the arguments, without the program's name; None takes them from the process.

    Returns:
        The exit code: 1 where something did not compile.
    """
    parser = argparse.ArgumentParser(prog="python tools/aot", description="Compile every kernel.")
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
        found: dict[str, Any] = {"triton": triton.__version__, "seconds": seconds, "left_out": left_out}
        found |= {"recompiled": recompiled("sm_90"), "reports": [asdict(report) for report in reports]}
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name in asked:
            sys.stdout.write(f"{name}, Triton {triton.__version__}\n")
            sys.stdout.write(left_out.get(name) or table([report for report in reports if report.target == name]))
            sys.stdout.write("\n\n")
        sys.stdout.write(
            "* held to no spills and to wide loads; spilled: bytes of stores/loads; loads: instructions x bytes, b "
            "buffers, w groups of copies that waits leave unfinished, i instructions of a pass. "
            f"{len(reports)} kernels in {seconds} s.\n"
        )
    return int(any(report.error is not None for report in reports))


if __name__ == "__main__":
    sys.exit(main())
