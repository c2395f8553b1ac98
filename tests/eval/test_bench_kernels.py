"""The benchmarks of kernels and of whole models: what they check, count and report; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv.cli.main import main
from rocketkv.eval.bench import dense_arms, gpu_timing, kernel_arms, kernel_checks
from rocketkv.eval.bench import kernels as bench_kernels
from rocketkv.eval.bench.kernel_cases import (
    METHODS,
    TINY_LAYER,
    Case,
    CaseBuffers,
    LayerShape,
    moved_bytes,
    needed_bytes,
    split_of,
)
from rocketkv.eval.checks import WrongResultError
from rocketkv.kernels import decode
from rocketkv.kernels.dense_decode import INTERPRETED, dense_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Case(2, 128, 32)
CPU = torch.device("cpu")

runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="TRITON_INTERPRET was not 1 when triton was imported"
)
FP32, BF16 = torch.float32, torch.bfloat16


def test_bytes_are_those_of_a_hand_calculation() -> None:
    layer, case = LayerShape(), Case(1, 32768, 1024)
    split = split_of(case, layer)
    assert (split.kept_tokens, split.page_size, split.channels, split.top_k) == (5669, 3, 67, 512)
    # 5670 tokens with the step's own: 1890 pages in 15 tiles of 128, of which 67 rows are read; 512 keys and values of
    # 128 each; 8 heads, 2 bytes.
    index, attended = 15 * 128 * 67 * 8 * 2, 512 * 2 * 128 * 8 * 2
    # The sketch of 7575 tokens in 2 bits and a scale, its mean key and balance, the sum of the values in float64; and
    # the keys and values of 511 tokens.
    plus = split_of(case, layer, "rocketkv+")
    assert (plus.kept_tokens, plus.sketch_bits, plus.top_k) == (7574, 2, 511)
    sketch, read = (7575 * 34 + 128 * 4 + 128 * 2 + 128 * 8) * 8, 511 * 2 * 128 * 8 * 2
    assert moved_bytes(case, layer, 2) == {
        "dense": 32768 * 2 * 128 * 8 * 2,
        "rocketkv": index + attended,
        "append_score": index,
        "select_attend": attended,
        "rocketkv+": sketch + read,
        "append_sketch (rocketkv+)": sketch,
        "select_attend (rocketkv+)": read,
    }
    assert moved_bytes(replace(case, batch=8), layer, 2)["rocketkv"] == 8 * (index + attended)
    assert moved_bytes(case, layer, 4)["dense"] == 2 * 32768 * 2 * 128 * 8 * 2


def test_counted_bytes_are_what_a_store_says_of_its_own() -> None:
    buffers = CaseBuffers(SMALL, TINY_LAYER, FP32, CPU, None)
    from rocketkv.state.stats import store_stats

    size = held = sum(t.nbytes for t in (buffers.keys[0], buffers.values[0]))
    assert buffers.moved["dense"] == size
    for method, stores in buffers.methods.items():
        store = stores.stores[0]
        assert buffers.moved[method] == store_stats(store).step_bytes
        counted = ("keys", "values", "bounds", "codes", "scales")
        held += sum(t.nbytes for name, t in store.tensors().items() if name in counted)
    held -= size
    assert needed_bytes(SMALL, TINY_LAYER, 4, 1) > 3 * (size + held)


def test_cases_are_read_as_they_are_written() -> None:
    for case in bench_kernels.CASES:
        assert Case.parse(str(case)) == case
        split_of(case, LayerShape())
        for method in METHODS:
            split_of(case.tiny(), TINY_LAYER, method)
    assert any(case.ties for case in bench_kernels.CASES)
    for text in ("8x32768", "ax1/1", "0x8192/512", "1x8192/512/tie"):
        with pytest.raises(ValueError, match=r"BATCHxCONTEXT/BUDGET|at least 1"):
            Case.parse(text)
    with pytest.raises(ValueError, match="nothing is selected"):
        split_of(Case(1, 512, 1024), LayerShape())


@runs_kernels
def test_check_mode_passes(capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["1x8192/512", "8x32768/1024", "1x32768/1024/ties"]
    assert main(["bench", "kernels", "--check", "--cases", ",".join(cases)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [one["case"] for one in result["checked"]] == cases
    arms = {"rocketkv", "SDPA enable_gqa", "SDPA group as rows", dense_arms.SPLIT_KV, "append_score", "select_attend"}
    arms |= {"rocketkv+", "append_sketch (rocketkv+)", "select_attend (rocketkv+)"}
    arms |= {"window_scores", "pool_scores", "select_top", "compact", "stage 1"}
    for one in result["checked"]:
        assert arms <= set(one["arms"])
        assert not set(one["absent"]) & set(one["arms"])
    assert result["versions"]["torch"] == torch.__version__
    assert len(lines) > len(cases)  # a table before it


def broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one part of what is timed give a wrong result."""
    step, dense, top, compact = (
        decode.decode_step_triton,
        dense_decode,
        kernel_arms.evict.select_top,
        kernel_arms.evict.compact,
    )

    def wrong_output(*args: Any, **kwargs: Any) -> Tensor:
        return step(*args, **kwargs) * 1.02

    def wrong_selection(*args: Any) -> Tensor:
        out, buffers, workspace = step(*args), args[3], args[4]
        workspace.chosen[0, -1] = int(buffers.seq_lens[0, 0]) + 1
        return out

    def wrong_count(*args: Any) -> Tensor:
        out, buffers = step(*args), args[3]
        buffers.seq_lens[-1, -1] += 1
        return out

    def wrong_sum(*args: Any) -> Tensor:
        out, buffers = step(*args), args[3]
        if buffers.value_sum is not None:
            buffers.value_sum[-1, -1, -1] += 1
        return out

    def not_a_number(*args: Any, **kwargs: Any) -> Tensor:
        return dense(*args, **kwargs) * torch.nan

    def one_lower(scores: Tensor, n: int) -> Tensor:
        found = top(scores, n)
        found[..., 0] = 0
        found[..., 1] = 1
        return found

    def one_value_less(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        made = compact(*args, **kwargs)
        made[1][0, 0, 0, 0] += 1
        return made

    if name == "stage 1":
        monkeypatch.setattr(kernel_arms.evict, "select_top", one_lower)
    elif name == "copies":
        monkeypatch.setattr(kernel_arms.evict, "compact", one_value_less)
    elif name == "dense":
        monkeypatch.setattr(dense_arms, "dense_decode", not_a_number)
    else:
        made = {"output": wrong_output, "selection": wrong_selection, "seq_lens": wrong_count, "sketch": wrong_sum}[
            name
        ]
        monkeypatch.setattr(decode, "decode_step_triton", made)


@runs_kernels
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("output", "output is wrong"),
        ("selection", "selection"),
        ("seq_lens", "seq_lens of rocketkv after 1 steps"),
        ("sketch", r"value_sum of rocketkv\+ after 1 steps"),
        ("dense", r"split-KV \(Triton\) is wrong"),
        ("stage 1", "select_top"),
        ("copies", "compact's values"),
    ],
)
def test_a_wrong_result_is_refused(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(name, monkeypatch)
    monkeypatch.setattr(gpu_timing, "alternate", lambda *args: pytest.fail("timed a wrong result"))
    buffers = CaseBuffers(SMALL, TINY_LAYER, FP32, DEVICE, None)
    with torch.inference_mode(), pytest.raises(WrongResultError, match=said) as raised:
        bench_kernels.run_checks(SMALL, kernel_arms.case_arms(buffers).arms)
    assert "nothing is timed" in str(raised.value)
    assert str(SMALL) in str(raised.value)


@runs_kernels
def test_a_wrong_result_ends_the_command_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("dense", monkeypatch)
    assert main(["bench", "kernels", "--check", "--cases", "1x8192/512"]) == 1
    shown = capsys.readouterr()
    assert "case 1x8192/512: split-KV" in shown.err
    assert not shown.out


@runs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_leave_no_choice(method: str) -> None:
    buffers = CaseBuffers(replace(SMALL, ties=True), TINY_LAYER, FP32, DEVICE, None)
    step = kernel_arms.DecodeStep(buffers, method)
    with torch.inference_mode():
        step.check()
        step.run(0)
        assert step.workspace.chosen.tolist() == [list(range(step.stores.split.top_k or 0))] * 4


@runs_kernels
@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        ("rocketkv", ["append_score", "select_attend"]),
        ("rocketkv+", ["append_sketch (rocketkv+)", "select_attend (rocketkv+)"]),
    ],
)
def test_launches_one_by_one_are_the_step(method: str, kernels: list[str]) -> None:
    buffers = CaseBuffers(SMALL, TINY_LAYER, FP32, DEVICE, None)
    step = kernel_arms.DecodeStep(buffers, method)
    with torch.inference_mode():
        expected = step.run(0).clone()
        step.stores.rewind()
        step.outs[0].fill_(torch.nan)
        launches = step.launches(0)
        assert list(launches) == kernels
        assert bool(step.outs[0].isnan().all())  # taken down, not carried out
        for launch in launches.values():
            launch()
        assert torch.equal(step.outs[0], expected)


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arms take times that are made up, in the place of a GPU's."""
    times = {"rocketkv": 10e-6, "rocketkv+": 20e-6, "SDPA enable_gqa": 50e-6, "SDPA group as rows": 40e-6, "copy": 2e-3}
    copy_arm = gpu_timing.copy_arm
    monkeypatch.setattr(gpu_timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(gpu_timing, "copy_arm", lambda device: copy_arm(device, 1000))

    def captured(arm: gpu_timing.Arm) -> gpu_timing.Arm:
        if arm.name == "SDPA enable_gqa":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return arm

    monkeypatch.setattr(gpu_timing, "capture", captured)
    monkeypatch.setattr(gpu_timing, "seconds_of", lambda arm: times.get(arm.name, 60e-6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 2**30, 8 * 2**30))


@runs_kernels
def test_a_benchmark_reports_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch)
    cases = [SMALL, Case(32, 2**20, 512)]
    with torch.inference_mode():
        result = bench_kernels.bench_kernels(cases, FP32, DEVICE, rounds=5, layer=TINY_LAYER)
    assert json.loads(json.dumps(result)) == result
    documented = bench_kernels.__doc__ or ""
    one = result["cases"][0]
    for field in (*one, *(set(result) - {"bench", "cases"})):
        assert field in documented, field
    assert [left["case"] for left in result["left_out"]] == ["32x1048576/512"]
    assert one["best_dense"] == "SDPA group as rows"
    assert one["absent"]["SDPA enable_gqa"] == "cannot be captured: operation not permitted when stream is capturing"
    for method, times in (("rocketkv", 4.0), ("rocketkv+", 2.0)):
        assert one["speedup"][method] == dict.fromkeys(("median", "min", "max"), pytest.approx(times))
    moved = moved_bytes(SMALL, TINY_LAYER, 4)
    assert one["bytes"]["rocketkv"] == moved["rocketkv"]
    assert one["byte_ceiling"]["rocketkv+"] == moved["dense"] / moved["rocketkv+"]
    assert one["share_of_ceiling"]["rocketkv"] == pytest.approx(4.0 * moved["rocketkv"] / moved["dense"])
    copy = one["copy_bytes_per_second"]["median"]
    assert copy == pytest.approx(2000 / 2e-3)
    assert one["share_of_copy"]["rocketkv"]["median"] == pytest.approx(moved["rocketkv"] / 10e-6 / copy)
    assert min(one["sets"].values()) >= 2
    assert one["sets"]["rocketkv"] >= gpu_timing.LEAST_SETS
    shown = bench_kernels.table(result)
    assert "rocketkv: 4.00x (4.00-4.00) the speed of SDPA group as rows" in shown
    assert "left out: case 32x1048576/512" in shown


def test_goals_stand_beside_what_was_got() -> None:
    def found(case: Case, speedup: float, microseconds: float, share: float) -> list[tuple[float, bool]]:
        spreads = [gpu_timing.spread([value]) for value in (speedup, microseconds, share)]
        return [(goal["goal"], goal["met"]) for goal in bench_kernels.goals(case, *spreads)]

    assert found(Case(1, 32768, 1024), 3.9, 12.0, 0.1) == [(4.0, False), (12.0, True)]
    assert found(Case(1, 131072, 1024), 14.0, 12.1, 0.1) == [(14.0, True), (12.0, False)]
    assert found(Case(1, 8192, 2048), 1.0, 99.0, 0.1) == []
    assert found(Case(8, 32768, 1024), 10.5, 99.0, 0.1) == [(10.0, True)]
    assert found(Case(32, 8192, 1024), 2.0, 99.0, 0.59) == [(0.6, False)]
    assert found(Case(1, 32768, 1024, ties=True), 1.0, 11.0, 0.1) == [(12.0, True)]


@pytest.mark.parametrize("what", ["kernels", "model"])
def test_without_a_gpu_it_says_so(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", what]) == 2
    assert "measures on a GPU, and this machine has none" in capsys.readouterr().err


def test_checks_without_the_interpreter_say_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "INTERPRETED", False)
    assert main(["bench", "kernels", "--check"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_nan_is_not_near() -> None:
    kernel_checks.require_precise("this", torch.ones(3), torch.ones(3, dtype=torch.float64))
    for wrong in (torch.nan, 1.001):
        with pytest.raises(WrongResultError, match="this is wrong"):
            kernel_checks.require_precise("this", torch.full((3,), wrong), torch.ones(3, dtype=torch.float64))


def test_a_compiler_that_flashinfer_misses_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [FileNotFoundError("ninja"), subprocess.CalledProcessError(1, ["nvcc"])]

    def make(*args: Any) -> Any:
        raise errors.pop()

    monkeypatch.setattr(dense_arms, "_flashinfer", make)
    tensors = [torch.ones(1, 2, 16)], [torch.ones(1, 1, 32, 16)], [torch.ones(1, 1, 32, 16)]
    for said in ("nvcc", "ninja"):
        calls, absent = dense_arms.dense_calls(*tensors, 1.0)
        assert "flashinfer" not in calls
        assert said in absent["flashinfer"]
