"""The programs of `make gpu`, at tiny sizes: they pass, and each finds the fault that it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv.eval.bench.kernel_cases import Case, split_of
from rocketkv.kernels import decode, select_plan
from rocketkv.kernels.dense_decode import INTERPRETED
from tools.gpu import programs
from tools.gpu.plan import plan

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="TRITON_INTERPRET was not 1 when triton was imported"
)


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def altered(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let each decode step run, then change what it left: by the number of the step and its arguments."""
    step, count = decode.decode_step_triton, iter(range(10**6))

    def run(*args: Any) -> Tensor:
        out = step(*args)
        change(next(count), out, *args)
        return out

    monkeypatch.setattr(decode, "decode_step_triton", run)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_a_stress_run_passes(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.run("stress", [method, "--tiny"]) == 0
    expected = {"program": "stress", "method": method, "case": "1x128/32", "replays": 3, "launches": 2}
    assert result_of(capsys) == expected


def test_a_stress_run_covers_the_choice_by_several_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [stage.command[2:] for stage in plan()]
    [case] = [Case.parse(command[3]) for command in commands if command[:3] == ("stress", "rocketkv+", "--case")]
    stored = split_of(case, programs.LAYER, "rocketkv+").kept_tokens
    assert stored is not None
    assert stored > decode.REGISTER_PAGES
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(select_plan, "SELECT_BLOCKS", (64, 128))
    assert programs.run("stress", ["rocketkv+", "--tiny", "--case", "1x90/24"]) == 0
    found = result_of(capsys)
    assert (found["case"], found["launches"]) == ("1x90/24", 3)


@pytest.mark.parametrize("what", ["output", "counter"])
def test_a_stress_run_finds_a_replay_that_differs(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, out: Tensor, *args: Any) -> None:
        if number == 6 and what == "output":
            out[0, 0, 0] = torch.nextafter(out[0, 0, 0], torch.tensor(9.0))
        if number == 6 and what == "counter":
            args[4].arrivals[0] = 1  # of the workspace

    altered(monkeypatch, change)
    assert programs.run("stress", ["rocketkv", "--tiny"]) == 1
    assert "of 3 replays" in capsys.readouterr().err


def test_captured_steps_equal_eager_ones_or_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert programs.run("pages", ["rocketkv", "--tiny"]) == 0
    assert result_of(capsys)["steps"] == 5

    def change(number: int, out: Tensor, *args: Any) -> None:
        if number == 5:
            out[0, 0, 0] += 1

    altered(monkeypatch, change)
    assert programs.run("pages", ["rocketkv", "--tiny"]) == 1
    assert "output of step" in capsys.readouterr().err


def test_one_step_of_each_kind_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.gpu import one_step

    # More pages than the interpreter should go through here.
    long = {name: case for name, case in one_step.CASES.items() if max(case.lengths) > decode.REGISTER_PAGES}
    assert [case.sketch_bits for case in long.values()] == [None, 2]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(one_step, "CASES", {name: one_step.CASES[name] for name in one_step.CASES.keys() - long})
        assert programs.run("one-step", ["--tiny"]) == 0
    assert "a full row" in result_of(capsys)["cases"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(one_step, "CASES", {name: replace(case, lengths=(200, 91)) for name, case in long.items()})
        patched.setattr(decode, "REGISTER_PAGES", 0)
        patched.setattr(select_plan, "SELECT_BLOCKS", (64, 128))
        assert programs.run("one-step", ["--tiny"]) == 0
    assert {*long} <= {*result_of(capsys)["cases"]}


@pytest.mark.integration
def test_captures_of_a_model_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.run("capture", ["rocketkv", "--tiny"]) == 0
    found = result_of(capsys)
    assert (found["steps"], found["tokens_of_generate_that_agree"]) == (5, 6)


def test_without_a_gpu_programs_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert programs.run("stress", ["rocketkv"]) == 2
    assert "python tools/gpu stress runs on a GPU, and this machine has none" in capsys.readouterr().err
