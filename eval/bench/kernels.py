"""`rocketkv bench kernels`: a layer's decode step and each kernel alone, on a GPU, against the best dense attention.

The step is that of `rocketkv` and that of `rocketkv+`; the goals are for `rocketkv`.

Each arm is replayed as a CUDA graph, between two events, over sets of buffers in rotation that are larger together than
the L2 cache. Arms alternate in rounds; a copy, timed in the same rounds, measures the bandwidth. All results of a
case are checked before it is timed.

The last line is JSON: `device`, `versions`, `dtype`, `layer`, `rounds`, `passed` (every goal met by its median),
`left_out` (cases that do not fit), and for each of `cases`:

    case, batch, context, token_budget, ties, sets
    split, stored_tokens    by method
    bytes               counted for one call, by arm: keys, values and index; inputs and outputs of stage 1's kernels
    byte_ceiling        dense bytes over the step's, by method
    microseconds        of one call, by arm: median, min, max over the rounds
    copy_bytes_per_second
    share_of_copy       counted bytes over time, in the copy's bandwidth: median, min, max
    roles               of the arms
    absent              arms that the machine does not have or cannot capture, and why
    clocks              of the device when the case ends
    split_kv_tiling     the fastest of the split-KV kernel's
    best_dense          of the smallest median
    speedup             the best dense time over the step's, in each round, by method: median, min, max
    share_of_ceiling    median speed-up over the byte ceiling, by method
    goals               what, goal, got, met
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..checks import WrongResultError
from ..progress import Progress
from . import gpu_timing
from .gpu_run import report, time_cases
from .kernel_cases import METHODS, TINY_LAYER, Case, CaseBuffers, LayerShape, needed_bytes

CASES = (
    Case(1, 8192, 512),
    Case(1, 32768, 1024),
    Case(1, 131072, 1024),
    Case(8, 8192, 512),
    Case(8, 32768, 1024),
    Case(32, 8192, 1024),
    Case(32, 32768, 1024),
    Case(1, 32768, 1024, ties=True),
)
QUICK = (Case(1, 8192, 512), Case(1, 32768, 1024), Case(1, 32768, 1024, ties=True))

SPEEDUP_GOALS = {Case(1, 32768, 1024): 4.0, Case(1, 131072, 1024): 14.0, Case(8, 32768, 1024): 10.0}
LATENCY_GOAL = 12.0  # microseconds of a layer's step, batch 1
LATENCY_BUDGET = 1024  # up to which it holds
BANDWIDTH_GOAL = 0.60  # of the copy's, at batch 32

NO_GPU = (
    "rocketkv bench kernels measures on a GPU, and this machine has none that torch can use; --check runs the checks "
    "of every case at tiny sizes, without timing (in Triton's interpreter: set TRITON_INTERPRET=1)"
)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or its checks alone, and print it; returns the exit code."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.check:
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    reason = _unable(on_gpu)
    if reason is not None:
        sys.stderr.write(f"rocketkv bench kernels: {reason}\n")
        return 2
    cases = [Case.parse(text) for text in args.cases.split(",")] if args.cases else list(QUICK if args.quick else CASES)
    dtype = getattr(torch, args.dtype)
    check, bench = partial(check_cases, cases, dtype, device), partial(bench_kernels, cases, dtype, device)
    return report(args, check if args.check else partial(bench, rounds=args.rounds), table)


def _unable(on_gpu: bool) -> str | None:
    """Return why the kernels cannot run here, or None if they can."""
    try:
        from ...kernels import decode
    except ImportError as error:
        return f"the kernels need the triton package ({error})"
    if not on_gpu and not decode.INTERPRETED:
        return "without a GPU the checks run in Triton's interpreter: set TRITON_INTERPRET=1"
    return None


def check_cases(cases: Sequence[Case], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Run the checks of every case at tiny sizes.

    Raises:
        WrongResultError: a result is not the reference's.
    """
    from .kernel_arms import case_arms

    checked = []
    with Progress("checking", total=len(cases)) as progress:
        for case in cases:
            progress.say(f"case {case}")
            made = case_arms(CaseBuffers(case.tiny(), TINY_LAYER, dtype, device, None))
            run_checks(case, made.arms)
            arms = [arm.name for arm in made.arms]
            checked.append({"case": str(case), "ran_as": str(case.tiny()), "arms": arms, "absent": made.absent})
            progress.step()
    return {"bench": "kernels", "checked": checked, "dtype": _name(dtype), **gpu_timing.card(device)}


def run_checks(case: Case, arms: Sequence[gpu_timing.Arm]) -> None:
    """Check every arm of a case.

    Raises:
        WrongResultError: a result is not the reference's; it names the case.
    """
    try:
        for arm in arms:
            arm.check()
    except WrongResultError as error:
        raise WrongResultError(f"case {case}: {error}") from error


def bench_kernels(
    cases: Sequence[Case], dtype: torch.dtype, device: torch.device, *, rounds: int, layer: LayerShape | None = None
) -> dict[str, Any]:
    """Check and time every case that fits into the device's memory.

    Args:
        cases: to time.
        dtype: of queries, keys and values.
        device: a GPU.
        rounds: of alternating arms, at least five.
        layer: heads and head dim, by default Llama-3.1-8B's.

    Raises:
        WrongResultError: a result is not the reference's.
        ValueError: there are too few rounds, or a case selects nothing.
    """
    gpu_timing.require_rounds(rounds)
    layer = layer or LayerShape()

    def too_large(case: Case) -> str | None:
        free, _ = torch.cuda.mem_get_info(device)
        needed = needed_bytes(case, layer, dtype.itemsize, gpu_timing.cache_bytes(device))
        return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else None

    timed = time_cases(cases, too_large, lambda case: _bench_case(case, dtype, device, rounds, layer))
    return {
        "bench": "kernels",
        **gpu_timing.card(device),
        "dtype": _name(dtype),
        "layer": asdict(layer),
        "rounds": rounds,
        **timed,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bench_case(case: Case, dtype: torch.dtype, device: torch.device, rounds: int, layer: LayerShape) -> dict[str, Any]:
    from .kernel_arms import case_arms

    buffers = CaseBuffers(case, layer, dtype, device, gpu_timing.cache_bytes(device))
    made = case_arms(buffers)
    run_checks(case, made.arms)
    arms = {arm.name: arm for arm in (*made.arms, gpu_timing.copy_arm(device))}
    captures = {name: partial(gpu_timing.capture, arm) for name, arm in arms.items()}
    captured, failed = gpu_timing.try_capture(captures, {*METHODS, "copy"})
    arms = {name: arms[name] for name in captured}
    if not any(arm.role == "dense" for arm in arms.values()):
        raise gpu_timing.CannotCaptureError("no dense attention can be captured")
    seconds = gpu_timing.alternate(
        {name: partial(gpu_timing.seconds_of, one) for name, one in captured.items()}, rounds
    )
    return {
        "case": str(case),
        **asdict(case),
        "split": {method: asdict(buffers.methods[method].split) for method in METHODS},
        "stored_tokens": {method: buffers.methods[method].split.kept_tokens for method in METHODS},
        "sets": {name: arm.sets for name, arm in arms.items()},
        "absent": made.absent | failed,
        "clocks": gpu_timing.clocks(device) if device.type == "cuda" else None,
        "split_kv_tiling": made.tiling,
        **summary(case, arms, seconds),
    }


def summary(case: Case, arms: dict[str, gpu_timing.Arm], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return spreads, ratios, shares of the copy's bandwidth and goals of a case.

    Args:
        case: the case.
        arms: by name, those of `METHODS`, `copy` and a dense one among them.
        seconds: of one call, by arm and round.
    """
    dense = [name for name, arm in arms.items() if arm.role == "dense"]
    microseconds = {name: gpu_timing.spread(times, 1e6) for name, times in seconds.items()}
    best = min(dense, key=lambda name: microseconds[name]["median"])
    counted = {name: arm.counted_bytes for name, arm in arms.items() if arm.counted_bytes}
    copy = [counted["copy"] / once for once in seconds["copy"]]
    shares = {
        name: gpu_timing.spread([size / once / rate for once, rate in zip(seconds[name], copy, strict=True)])
        for name, size in counted.items()
        if name != "copy"
    }
    speedup = {method: gpu_timing.ratios(seconds[best], seconds[method]) for method in METHODS}
    ceiling = {method: counted[best] / counted[method] for method in METHODS}
    return {
        "roles": {name: arm.role for name, arm in arms.items()},
        "bytes": counted,
        "byte_ceiling": ceiling,
        "microseconds": microseconds,
        "copy_bytes_per_second": gpu_timing.spread(copy),
        "share_of_copy": shares,
        "best_dense": best,
        "speedup": speedup,
        "share_of_ceiling": {method: speedup[method]["median"] / ceiling[method] for method in METHODS},
        "goals": goals(case, speedup["rocketkv"], microseconds["rocketkv"], shares["rocketkv"]),
    }


def goals(
    case: Case, speedup: dict[str, float], microseconds: dict[str, float], share: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the goals of a case and its results."""
    found: list[tuple[str, float, float, bool]] = []
    if case in SPEEDUP_GOALS:
        goal, got = SPEEDUP_GOALS[case], speedup["median"]
        found.append(("times as fast as the best dense, at least", goal, got, got >= goal))
    if case.batch == 1 and case.token_budget <= LATENCY_BUDGET:
        got = microseconds["median"]
        found.append(("microseconds a layer and step, at most", LATENCY_GOAL, got, got <= LATENCY_GOAL))
    if case.batch == 32:
        got = share["median"]
        found.append(("of the copy's bandwidth, at least", BANDWIDTH_GOAL, got, got >= BANDWIDTH_GOAL))
    return [{"what": what, "goal": goal, "got": got, "met": met} for what, goal, got, met in found]


def table(result: dict[str, Any]) -> str:
    """Return the result of a benchmark or check as text."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    device = result["device"]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    lines = [f"{device['name']}{driver}; {versions}; {result['dtype']}"]
    if "checked" in result:
        lines += [
            f"case {one['case']}: {len(one['arms'])} arms passed, as {one['ran_as']}" for one in result["checked"]
        ]
        return "\n".join(lines)
    for one in result["cases"]:
        copy = one["copy_bytes_per_second"]["median"] / 1e12
        stored = ", ".join(f"{method} stores {count}" for method, count in one["stored_tokens"].items())
        lines += ["", f"case {one['case']}: {stored} tokens; copy {copy:.2f} TB/s"]
        lines.append(f"  {'':26} {'us':>9} {'min-max':>19} {'MB':>9} {'of copy':>8}")
        for name, times in one["microseconds"].items():
            size, share = one["bytes"].get(name), one["share_of_copy"].get(name)
            megabytes, percent = f"{size / 1e6:.2f}" if size else "", f"{share['median']:.0%}" if share else ""
            lines.append(
                f"  {name:26} {times['median']:9.2f} {times['min']:9.2f}-{times['max']:<9.2f} "
                f"{megabytes:>9} {percent:>8}"
            )
        lines += gpu_timing.verdict_lines(one)
    lines += [f"left out: case {one['case']}: {one['reason']}" for one in result["left_out"]]
    return "\n".join(lines)
