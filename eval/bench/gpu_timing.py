"""Timing on a GPU: CUDA graphs replayed between events, cold caches, arms in alternating rounds.

An arm works on several sets of buffers in rotation, so that its inputs have left the L2 cache since the last read.
"""

import importlib.metadata
import math
import os
import subprocess
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from ..._version import __version__
from ..checks import WrongResultError, require_near
from ..progress import Progress

LEAST_SETS = 3
LEAST_CALLS = 24  # of one graph, so that the gap between two replays does not count
L2_TIMES = 3  # bytes between two uses of a set, in sizes of the L2 cache
ROUND_SECONDS = 0.02
COPY_BYTES = 2**29
LEAST_ROUNDS = 5
REPLAY_UNITS = 4.0  # of the dtype's precision, within which a replay may differ from a plain call
PACKAGES = ("triton", "transformers", "flash-attn", "flashinfer-python")


T = TypeVar("T")


class CannotCaptureError(RuntimeError):
    """A step cannot be captured in a CUDA graph."""


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Arm:
    """A timed call.

    Attributes:
        name: of the arm.
        role: `dense`, `step`, `kernel`, `stage 1` or `copy`.
        run: works on one set of buffers, given its number.
        sets: how many there are.
        counted_bytes: least bytes that one call moves, or 0 where they are not counted.
        check: raises `WrongResultError` where its result is not the reference's.
        prepare: runs before each round, untimed.
        room: calls on each set between two of those, or None for any number.
    """

    name: str
    role: str
    run: Callable[[int], Any]
    sets: int
    counted_bytes: int
    check: Callable[[], None] = nothing
    prepare: Callable[[], None] = nothing
    room: int | None = None


@dataclass(frozen=True)
class Captured:
    """An arm as a CUDA graph.

    Attributes:
        arm: the arm.
        graph: of `calls` calls.
        calls: over the sets in rotation.
        replays: of one round.
    """

    arm: Arm
    graph: Any
    calls: int
    replays: int


def sets_for(counted_bytes: int, cache_bytes: int) -> int:
    """Return how many sets there must be so that each is cold when its turn comes again."""
    return max(LEAST_SETS, 1 + math.ceil(L2_TIMES * cache_bytes / counted_bytes))


def cache_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 * 2**20


def copy_arm(device: torch.device, size: int = COPY_BYTES) -> Arm:
    """Return the arm that measures the bandwidth of a copy, read and written bytes together."""
    source = torch.ones(2, size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Arm("copy", "copy", lambda number: target[number].copy_(source[number]), 2, 2 * size)


def capture(arm: Arm) -> Captured:
    """Warm an arm up, capture it, and see how often its graph must be replayed for a round."""
    calls = arm.sets * math.ceil(LEAST_CALLS / arm.sets)
    arm.prepare()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for number in range(arm.sets):
            arm.run(number)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    first: Any = None
    with torch.cuda.graph(graph):
        for number in range(calls):
            result = arm.run(number % arm.sets)
            first = result if number % arm.sets == 0 else first
            del result  # its memory is the next call's
    arm.prepare()
    graph.replay()
    _require_replayed(arm, first, calls // arm.sets)
    once = Captured(arm, graph, calls, 1)
    replays = math.ceil(ROUND_SECONDS / (calls * seconds_of(once)))
    if arm.room is not None:
        replays = min(replays, arm.room * arm.sets // calls)
    return Captured(arm, graph, calls, max(1, replays))


def _require_replayed(arm: Arm, replayed: Any, calls: int) -> None:
    """Require a graph's result on the first set to be that of as many plain calls."""
    found = replayed[0] if isinstance(replayed, tuple) else replayed
    if not isinstance(found, torch.Tensor):
        return
    found = found.clone()
    arm.prepare()
    expected: Any = None
    for _ in range(calls):
        expected = arm.run(0)
    expected = expected[0] if isinstance(expected, tuple) else expected
    eps = torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0.0
    if not torch.equal(found, expected):  # they may hold infinities
        require_near(f"{arm.name} as a CUDA graph", found, expected, REPLAY_UNITS * eps)


def try_capture(arms: Mapping[str, Callable[[], T]], needed: Container[str]) -> tuple[dict[str, T], dict[str, str]]:
    """Capture arms; return those that can be captured, and the reasons why the others cannot.

    Args:
        arms: functions that capture an arm, by its name.
        needed: arms without which nothing can be compared.

    Raises:
        WrongResultError: a graph's result is not the plain call's.
        CannotCaptureError: a needed arm cannot be captured.
    """
    captured: dict[str, T] = {}
    absent: dict[str, str] = {}
    for name, make in arms.items():
        made, error = _attempt(make)
        if error is None:
            captured[name] = made  # type: ignore[assignment]  # without an error it was made
            continue
        reason = f"cannot be captured: {(str(error).splitlines() or [type(error).__name__])[0]}"
        if name in needed:
            raise CannotCaptureError(f"{name} {reason}") from error
        absent[name] = reason
    return captured, absent


def _attempt(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what a function makes, or the error of PyTorch or Triton that kept it from doing so."""
    try:
        return make(), None
    except WrongResultError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # CUDA's errors, those of memory too, are RuntimeErrors
        return None, error


def seconds_of(captured: Captured) -> float:
    """Return the seconds of one call, over the replays of one round."""
    captured.arm.prepare()
    return event_seconds(captured.graph.replay, captured.replays) / captured.calls


def event_seconds(call: Callable[[], Any], times: int) -> float:
    """Return the seconds of one of several calls, between two events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def require_rounds(rounds: int) -> None:
    """Require enough rounds for a spread.

    Raises:
        ValueError: there are too few.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds must be at least {LEAST_ROUNDS}, for a spread; got {rounds}")


def alternate(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time every arm in turn, round after round; the first round warms up and does not count.

    Args:
        arms: by name, a function that returns the seconds of one call.
        rounds: number of rounds that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with Progress("timing rounds", total=rounds + 1) as progress:
        for number in range(rounds + 1):
            for name, measure in arms.items():
                once = measure()
                if number:
                    seconds[name].append(once)
            progress.step()
    return seconds


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """Return median, least and largest of some values, each times a factor."""
    return {"median": factor * median(values), "min": factor * min(values), "max": factor * max(values)}


def ratios(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Return the spread of the rounds' own ratios."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """Return a GPU's clocks in MHz, its limit of power in W and its temperature, or None where they are unknown."""
    number = str(device.index or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        number = visible.split(",")[int(number)]
    query = ["nvidia-smi", f"--id={number}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {name: _number(value) for name, value in zip(CLOCKS, values, strict=True)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def card(device: torch.device) -> dict[str, Any]:
    """Return the device and the versions of a measurement."""
    versions: dict[str, str | None] = {"rocketkv": __version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {package: _version(package) for package in PACKAGES}
    if device.type != "cuda":
        return {"device": {"name": device.type}, "versions": versions}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": {
            "name": found.name,
            "driver": _driver(),
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": cache_bytes(device),
            "clocks": clocks(device),
        },
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None where it is unknown."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            line = file.readline()
    except OSError:
        return None
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), None)


def verdict_lines(one: dict[str, Any]) -> list[str]:
    """Return lines with a case's ratios and ceilings, its goals and its absent arms."""
    lines = []
    for method, ratio in one["speedup"].items():
        spread = f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})"
        ceiling = one["byte_ceiling"][method]
        lines.append(f"  {method}: {spread} the speed of {one['best_dense']}; bytes allow {ceiling:.2f}x")
    for goal in one["goals"]:
        met = "met" if goal["met"] else "MISSED"
        lines.append(f"  goal: {goal['goal']:g} {goal['what']}: {goal['got']:.3g}, {met}")
    return lines + [f"  absent: {name}: {reason}" for name, reason in one["absent"].items()]
