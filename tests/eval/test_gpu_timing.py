"""How the benchmarks on a GPU time: sets, rounds, captures, and what cannot be captured."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from fake_graphs import FakeGraphs
from rocketkv.eval.bench import gpu_run, gpu_timing
from rocketkv.eval.bench.kernel_cases import Case
from rocketkv.eval.checks import WrongResultError

CPU, FP32 = torch.device("cpu"), torch.float32
SMALL = Case(2, 128, 32)


@pytest.mark.parametrize("counted", [1, 10**6, 50 * 2**20, 10**10])
def test_sets_are_larger_together_than_the_cache(counted: int) -> None:
    cache = 50 * 2**20
    sets = gpu_timing.sets_for(counted, cache)
    assert sets >= 3
    assert (sets - 1) * counted > cache  # what is read between two uses of a set


def test_arms_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = gpu_timing.alternate({"a": lambda: measure("a"), "b": lambda: measure("b")}, 5)
    assert order == ["a", "b"] * 6
    assert seconds == {"a": [3.0, 5.0, 7.0, 9.0, 11.0], "b": [4.0, 6.0, 8.0, 10.0, 12.0]}
    assert gpu_timing.spread(seconds["a"]) == {"median": 7.0, "min": 3.0, "max": 11.0}
    with pytest.raises(ValueError, match="at least 5"):
        gpu_timing.require_rounds(4)


def test_a_capture_counts_its_calls_and_keeps_to_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)
    calls = [0, 0, 0]

    def run(number: int) -> Tensor:
        calls[number] += 1
        return torch.full((1,), float(calls[number]))

    def prepare() -> None:
        calls[:] = [0, 0, 0]

    arm = gpu_timing.Arm("counts", "step", fakes.wrap(run, (1,)), 3, 0, prepare=prepare, room=20)
    captured = gpu_timing.capture(arm)
    assert captured.calls == 24  # eight on each set
    assert captured.replays == 2  # sixteen of twenty
    assert gpu_timing.seconds_of(captured) == pytest.approx(1e-3 / 2 / 24)
    assert calls == [16, 16, 16]


def test_a_graph_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)
    plain = gpu_timing.Arm("this", "dense", lambda number: torch.ones(2), 3, 0)
    wrapped = fakes.wrap(lambda number: torch.full((2,), 1.01), (2,))

    def run(number: int) -> Tensor:
        return plain.run(number) if fakes.capturing is None else wrapped(number)

    with pytest.raises(WrongResultError, match="this as a CUDA graph is wrong"):
        gpu_timing.capture(replace(plain, run=run))


def test_an_arm_that_cannot_be_captured_is_left_out_unless_it_is_needed() -> None:
    def fails() -> int:
        raise RuntimeError("not while capturing\nmore")

    arms: dict[str, Callable[[], int]] = {"a": lambda: 1, "b": fails}
    assert gpu_timing.try_capture(arms, {"a"}) == ({"a": 1}, {"b": "cannot be captured: not while capturing"})
    with pytest.raises(gpu_timing.CannotCaptureError, match=r"b cannot be captured: not while capturing$"):
        gpu_timing.try_capture(arms, {"b"})
    assert "b cannot be captured" in str(
        gpu_run.time_cases([SMALL], lambda case: None, lambda case: gpu_timing.try_capture(arms, {"b"}))["left_out"]
    )

    def wrong() -> int:
        raise WrongResultError("a graph is wrong")

    with pytest.raises(WrongResultError):
        gpu_timing.try_capture({"a": wrong}, set())


def test_clocks_are_those_of_the_tool_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1755, 2619, 1980, 2619, 700.00, [N/A]\n")

    monkeypatch.setattr(gpu_timing.subprocess, "run", run)
    assert gpu_timing.clocks(device) == {
        "clocks.sm": 1755.0, "clocks.mem": 2619.0, "clocks.max.sm": 1980.0, "clocks.max.mem": 2619.0,
        "power.limit": 700.0, "temperature.gpu": None,
    }  # fmt: skip
    assert "--id=7" in asked[0]

    def missing(command: list[str], **options: Any) -> Any:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(gpu_timing.subprocess, "run", missing)
    assert gpu_timing.clocks(device) is None
