"""`rocketkv bench tune`: what it tries, what counts, and what enters the table; nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

from triton.runtime.errors import OutOfResources

from rocketkv.cli.main import main
from rocketkv.eval.bench import gpu_timing, launch_trials, tune
from rocketkv.eval.bench.kernel_arms import DecodeStep
from rocketkv.eval.bench.kernel_cases import TINY_LAYER, Case
from rocketkv.eval.checks import WrongResultError
from rocketkv.kernels import decode
from rocketkv.kernels.dense_decode import INTERPRETED
from rocketkv.kernels.launches import Launch, LaunchKey, default_launch, read_devices, read_table, table_of

CPU = torch.device("cpu")
CASES = [Case(2, 128, 32), Case(1, 128, 32)]
runs_kernels = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET was not 1 when triton was imported")
SMALL_TILE = Launch(32, 4, 3)


def faked(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, Launch, Case], float]) -> list[tuple[str, Launch]]:
    """Let configurations take times that are made up, or be refused; return those that were tried."""
    tried: list[tuple[str, Launch]] = []

    def captured(step: DecodeStep, kernel: str, launch: Launch) -> Callable[[], float]:
        tried.append((kernel, launch))
        once = seconds(kernel, launch, step.buffers.case)
        return lambda: once

    monkeypatch.setattr(launch_trials, "captured", captured)
    monkeypatch.setattr(gpu_timing, "cache_bytes", lambda device: 1)
    return tried


@runs_kernels
def test_the_table_gets_what_is_faster_in_all_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def seconds(kernel: str, launch: Launch, case: Case) -> float:
        if kernel == "append_score" and launch.stages == 5:
            raise OutOfResources(300000, 232448, "shared memory")
        if kernel == "append_score" and launch.tile == 16:
            raise WrongResultError("a step's output is wrong by 1; nothing is timed")
        if kernel == "append_score":
            # One is twice as fast in one case and three times as slow in the other; one is faster in both.
            return {128: 3.0, 64: 2.5}[launch.tile] if launch.warps == 4 else {1: 9.0, 2: 1.5}[case.batch]
        return 1.0 if launch.warps == 4 else 0.985  # less than counts

    tried = faked(monkeypatch, seconds)
    path = tmp_path / "table.json"
    other = LaunchKey("append_score", "sm_90", 128, 128, 2, 2048)
    path.write_text(table_of({other: SMALL_TILE}, {"sm_90": {"device": "H100"}}), encoding="utf-8")
    with torch.inference_mode():
        result = launch_trials.tune([32], CPU, rounds=5, path=path, cases=CASES, layer=TINY_LAYER, dtype=torch.float32)
    key = LaunchKey("append_score", "cpu", 32, 32, 4, 128)
    assert read_table(path) == {other: SMALL_TILE, key: Launch(64, 4, 3)}
    assert set(read_devices(path)) == {"sm_90", "cpu"}
    found = {(one["kernel"], one["pages"]): one for one in result["entries"]}
    score = found["append_score", 128]
    assert score["cases"] == ["rocketkv 2x128/32", "rocketkv 1x128/32"]
    assert score["saved"] == pytest.approx(1 - 2.5 / 3)
    assert {one["reason"] for one in score["refused"]} == {
        str(OutOfResources(300000, 232448, "shared memory")), "a step's output is wrong by 1; nothing is timed",
    }  # fmt: skip
    # What is refused in one case is not tried in the next.
    assert len([launch for kernel, launch in tried if kernel == "append_score" and launch.stages == 5]) == 6
    for one in result["entries"]:
        assert (one["launch"] == one["default"]) == (one["kernel"] != "append_score"), one
    for field in (*result, *score):
        assert field in (tune.__doc__ or "") or field == "bench", field
    shown = tune.table(result)
    assert "append_score, head dim 32, 128 pages: tile 64, warps 4, stages 3, saves 16.7% of tile 128" in shown
    assert "select_attend, head dim 32, 128 pages: the default, saves 0.0%" in shown
    assert json.loads(json.dumps(result)) == result


@runs_kernels
def test_a_configuration_is_checked_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels: the tile that is tried is the one that runs, and a wrong step does not count."""
    monkeypatch.setattr(gpu_timing, "capture", lambda arm: arm)
    monkeypatch.setattr(gpu_timing, "seconds_of", lambda arm: arm.run(0) or 1.0)
    buffers = launch_trials.CaseBuffers(CASES[1], TINY_LAYER, torch.float32, CPU, None)
    with torch.inference_mode():
        for method, kernel, cut in (
            ("rocketkv", "append_score", Launch(32, 4, 3)),
            ("rocketkv+", "append_sketch", Launch(64, 4, 3)),
            ("rocketkv", "select_attend", Launch(16, 4, 3)),
        ):
            step = DecodeStep(buffers, method)
            given = step.buffers.dtype.itemsize, True
            assert step.workspace._cut(kernel, *given) != cut
            assert launch_trials.captured(step, kernel, cut)() == 1.0
            assert step.workspace._cut(kernel, *given) == cut
        real = decode.decode_step_triton
        monkeypatch.setattr(decode, "decode_step_triton", lambda *args: real(*args) * 1.02)
        refused = launch_trials._unless_refused(step, "select_attend", Launch(16, 4, 3))
    assert isinstance(refused, str)
    assert "a step's output is wrong" in refused


def test_a_key_has_the_default_of_its_shape() -> None:
    trials = launch_trials.Trials(
        default_launch(
            "append_score", head_dim=32, itemsize=2, pages=128, group=16, value_dim=32, channels=32, exact=False
        )
    )
    assert trials.best() == (trials.default, 0.0)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune"]) == 2
    said: Any = capsys.readouterr()
    assert "rocketkv bench tune tries launch configurations on a GPU, and this machine has none" in said.err
