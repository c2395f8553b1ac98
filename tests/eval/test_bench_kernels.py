"""The benchmarks of kernels and of whole models: what they check, count and report; nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv.cli.main import main
from rocketkv.eval.bench import cli, dense_arms, gpu_timing, kernel_arms, kernel_checks, model_arms
from rocketkv.eval.bench import kernels as bench_kernels
from rocketkv.eval.bench import model as bench_model
from rocketkv.eval.bench.kernel_cases import (
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
    assert moved_bytes(case, layer, 2) == {
        "dense": 32768 * 2 * 128 * 8 * 2,
        "rocketkv": index + attended,
        "append_score": index,
        "select_attend": attended,
    }
    assert moved_bytes(replace(case, batch=8), layer, 2)["rocketkv"] == 8 * (index + attended)
    assert moved_bytes(case, layer, 4)["dense"] == 2 * 32768 * 2 * 128 * 8 * 2


def test_counted_bytes_are_what_a_store_says_of_its_own() -> None:
    buffers = CaseBuffers(SMALL, TINY_LAYER, FP32, CPU, None)
    from rocketkv.state.stats import store_stats

    assert buffers.moved["rocketkv"] == store_stats(buffers.stores[0]).step_bytes
    size = sum(t.nbytes for t in (buffers.keys[0], buffers.values[0]))
    assert buffers.moved["dense"] == size
    held = sum(t.nbytes for name, t in buffers.stores[0].tensors().items() if name in ("keys", "values", "bounds"))
    assert needed_bytes(SMALL, TINY_LAYER, 4, 1) > 3 * (size + held)


@pytest.mark.parametrize("counted", [1, 10**6, 50 * 2**20, 10**10])
def test_sets_are_larger_together_than_the_cache(counted: int) -> None:
    cache = 50 * 2**20
    sets = gpu_timing.sets_for(counted, cache)
    assert sets >= 3
    assert (sets - 1) * counted > cache  # what is read between two uses of a set


def test_cases_are_read_as_they_are_written() -> None:
    for case in bench_kernels.CASES:
        assert Case.parse(str(case)) == case
        split_of(case, LayerShape())
        split_of(case.tiny(), TINY_LAYER)
    assert any(case.ties for case in bench_kernels.CASES)
    for text in ("8x32768", "ax1/1", "0x8192/512", "1x8192/512/tie"):
        with pytest.raises(ValueError, match=r"BATCHxCONTEXT/BUDGET|at least 1"):
            Case.parse(text)
    with pytest.raises(ValueError, match="nothing is selected"):
        split_of(Case(1, 512, 1024), LayerShape())


@runs_kernels
def test_check_mode_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [one["case"] for one in result["checked"]] == [str(case) for case in bench_kernels.CASES]
    arms = {"rocketkv", "SDPA enable_gqa", "SDPA group as rows", dense_arms.SPLIT_KV, "append_score", "select_attend"}
    arms |= {"window_scores", "pool_scores", "select_top", "compact", "stage 1"}
    for one in result["checked"]:
        assert arms <= set(one["arms"])
        assert not set(one["absent"]) & set(one["arms"])
    assert result["versions"]["torch"] == torch.__version__
    assert len(lines) > len(bench_kernels.CASES)  # a table before it


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
        made = {"output": wrong_output, "selection": wrong_selection, "seq_lens": wrong_count}[name]
        monkeypatch.setattr(decode, "decode_step_triton", made)


@runs_kernels
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("output", "output is wrong"),
        ("selection", "selection"),
        ("seq_lens", "seq_lens after 1 steps"),
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
def test_equal_scores_leave_no_choice() -> None:
    buffers = CaseBuffers(replace(SMALL, ties=True), TINY_LAYER, FP32, DEVICE, None)
    step = kernel_arms._Step(buffers)
    with torch.inference_mode():
        step.check()
        step.run(0)
        assert step.workspace.chosen.tolist() == [list(range(16))] * 4


@runs_kernels
def test_launches_one_by_one_are_the_step() -> None:
    buffers = CaseBuffers(SMALL, TINY_LAYER, FP32, DEVICE, None)
    step = kernel_arms._Step(buffers)
    with torch.inference_mode():
        expected = step.run(0).clone()
        buffers.rewind()
        step.outs[0].fill_(torch.nan)
        launches = step.launches(0)
        assert list(launches) == ["append_score", "select_attend"]
        assert bool(step.outs[0].isnan().all())  # taken down, not carried out
        for launch in launches.values():
            launch()
        assert torch.equal(step.outs[0], expected)


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arms take times that are made up, in the place of a GPU's."""
    times = {"rocketkv": 10e-6, "SDPA enable_gqa": 50e-6, "SDPA group as rows": 40e-6, "copy": 2e-3}
    copy_arm = gpu_timing.copy_arm
    monkeypatch.setattr(gpu_timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(gpu_timing, "copy_arm", lambda device: copy_arm(device, 1000))
    monkeypatch.setattr(gpu_timing, "capture", lambda arm: arm)
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
    assert one["speedup"] == {"median": pytest.approx(4.0), "min": pytest.approx(4.0), "max": pytest.approx(4.0)}
    moved = moved_bytes(SMALL, TINY_LAYER, 4)
    assert one["bytes"]["rocketkv"] == moved["rocketkv"]
    assert one["byte_ceiling"] == moved["dense"] / moved["rocketkv"]
    assert one["share_of_ceiling"] == pytest.approx(4.0 * moved["rocketkv"] / moved["dense"])
    copy = one["copy_bytes_per_second"]["median"]
    assert copy == pytest.approx(2000 / 2e-3)
    assert one["share_of_copy"]["rocketkv"]["median"] == pytest.approx(moved["rocketkv"] / 10e-6 / copy)
    assert min(one["sets"].values()) >= 2
    assert one["sets"]["rocketkv"] >= gpu_timing.LEAST_SETS
    shown = bench_kernels.table(result)
    assert "4.00x (4.00-4.00) the speed of SDPA group as rows" in shown
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


class FakeGraphs:
    """CUDA graphs on a CPU: what is called while one is captured is only taken down, and replays carry it out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: list[Callable[[], Any]] | None = None
        fakes = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], Any]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, **options: Any) -> None: ...

            def record(self) -> None: ...

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1.0

        class Stream:
            def wait_stream(self, other: Stream) -> None: ...

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            fakes.capturing = graph.calls
            yield
            fakes.capturing = None

        for name, value in (("CUDAGraph", Graph), ("graph", capture), ("Event", Event), ("Stream", Stream)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def wrap(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Callable[..., Tensor]:
        """Return a function that can be captured and gives tensors of that shape."""

        def call(*args: Any) -> Tensor:
            if self.capturing is None:
                return function(*args)
            out = torch.zeros(shape)
            self.capturing.append(lambda: out.copy_(function(*args)))
            return out

        return call


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


@pytest.mark.integration
def test_a_model_is_captured_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)
    real = model_arms.ModelArm.step

    def step(arm: model_arms.ModelArm) -> Tensor:
        arm.ready()  # a graph would hold on to the patch that it was captured with
        return real(arm)

    monkeypatch.setattr(model_arms.ModelArm, "step", fakes.wrap(step, (1, 101)))
    monkeypatch.setattr(bench_model, "STEPS", 3)
    model = model_arms.build_model("qwen3-8b", 400 + model_arms.DECODE_CAPACITY, FP32, CPU, **model_arms.TINY)
    with torch.inference_mode():
        result = bench_model._bench_case(model, Case(1, 300, 64), 5)
    assert not isinstance(result, str)
    assert set(result["milliseconds"]) == {"static", "full", "rocketkv"}
    # Two steps to check the graph, six rounds of three, and the step that comes next: all that the cache holds then.
    assert result["bytes"]["dense"] == (300 + 2 + 6 * 3 + 1) * 2 * 2 * 16 * 4 * 2
    assert result["bytes"]["rocketkv"] < result["bytes"]["dense"]
    assert json.loads(json.dumps(result)) == result


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


@pytest.mark.integration
@pytest.mark.parametrize("shape", list(model_arms.SHAPES))
def test_the_steps_of_a_tiny_model_agree(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shape in cli.SHAPES
    assert main(["bench", "model", "--check", "--json", "--shape", shape]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["arms"] for one in result["checked"]] == [["static", "full", "rocketkv"]] * 3


@pytest.mark.integration
def test_a_model_that_goes_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = model_arms.ModelArm.step

    def wrong(arm: model_arms.ModelArm) -> Tensor:
        out = real(arm)
        return out if arm.config is None else out * 1.01

    monkeypatch.setattr(model_arms.ModelArm, "step", wrong)
    assert main(["bench", "model", "--check", "--cases", "1x40/64"]) == 1
    assert "nothing is timed" in capsys.readouterr().err


@pytest.mark.integration
def test_a_model_reads_all_weights_but_the_embedding() -> None:
    model = model_arms.build_model("llama-3.1-8b", 64, FP32, CPU, **model_arms.TINY)
    held = sum(weight.nbytes for weight in model.parameters())
    assert bench_model.step_weights(model) == held - 101 * 64 * 4


def test_a_models_ceiling_counts_its_weights() -> None:
    seconds = {"static": [0.02] * 5, "full": [0.018] * 5, "rocketkv": [0.009] * 5}
    result = bench_model.summary(Case(1, 131072, 1024), seconds, 100, 300, 60)
    assert result["best_dense"] == "full"
    assert result["byte_ceiling"] == 400 / 160
    assert result["speedup"]["median"] == pytest.approx(2.0)
    assert result["tokens_per_second"]["rocketkv"] == pytest.approx(1 / 0.009)
    assert [(goal["goal"], goal["met"]) for goal in result["goals"]] == [(1.8, True)]
    short = bench_model.summary(Case(1, 512, 1024), seconds | {"rocketkv": [0.019] * 5}, 100, 10, 10)
    assert [(goal["goal"], goal["met"]) for goal in short["goals"]] == [(0.97, False)]
    for field in (*result, "case", "absent"):
        assert field in (bench_model.__doc__ or ""), field
