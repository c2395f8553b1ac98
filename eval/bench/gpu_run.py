"""The common frame of the GPU benchmarks: cases that do not fit are left out, and the last line of output is JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checks import WrongResultError
from ..progress import Progress
from .gpu_timing import CannotCaptureError
from .kernel_cases import Case


def time_cases(
    cases: Sequence[Case], too_large: Callable[[Case], str | None], measure: Callable[[Case], dict[str, Any]]
) -> dict[str, Any]:
    """Time every case that fits into the device's memory.

    Args:
        cases: to time.
        too_large: returns why a case does not fit, or None.
        measure: returns the result of a case.

    Returns:
        `passed` (every goal met), `left_out` (cases and reasons) and `cases` (the results).
    """
    results: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    with Progress("timing", total=len(cases)) as progress:
        for case in cases:
            progress.say(f"case {case}")
            torch.cuda.empty_cache()
            reason = too_large(case)
            if reason is None:
                try:
                    results.append(measure(case))
                except torch.cuda.OutOfMemoryError as error:
                    reason = f"ran out of memory: {error}".splitlines()[0]
                except CannotCaptureError as error:
                    reason = str(error)
            if reason is not None:
                left_out.append({"case": str(case), "reason": reason})
            progress.step()
    passed = all(goal["met"] for result in results for goal in result["goals"])
    return {"passed": passed, "left_out": left_out, "cases": results}


def report(args: argparse.Namespace, make: Callable[[], dict[str, Any]], table: Callable[[dict[str, Any]], str]) -> int:
    """Run a benchmark and print its table and JSON; returns the exit code, 1 where a result is wrong."""
    try:
        with torch.inference_mode():
            result = make()
    except WrongResultError as error:
        sys.stderr.write(f"rocketkv bench {args.benchmark}: {error}\n")
        return 1
    if not args.json:
        sys.stdout.write(table(result) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0
