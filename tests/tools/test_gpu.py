"""`make gpu` stops at nothing: stages fail, lack tools, run too long and resume, and the figures reach the page."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import device, stages, summary
from tools.gpu.device import Machine, Outcome
from tools.gpu.plan import METHODS, Stage, plan

PLAN = (
    Stage("first", "passes", ("one",), 60, result=True, compares=("nvcc", "ninja")),
    Stage("second", "fails", ("two",), 60),
    Stage("third", "lacks a tool", ("three",), 60, needs=("sanitizer", "package:torch")),
    Stage("fourth", "takes too long", ("four",), 60),
    Stage("fifth", "has no result", ("five",), 60, result=True),
    Stage("sixth", "cannot start", ("six",), 60),
    Stage("last", "passes", ("seven",), 60, environment=(("A", "1"),)),
)


class FakeMachine(Machine):
    """Plays how each command ends, and remembers which ran."""

    def __init__(self, ends: Mapping[str, Callable[[Path], Outcome]] | None = None, *, gpu: bool = True) -> None:
        self.ran: list[str] = []
        self.gpu = gpu
        self.environment: dict[str, str] = {}
        self.absent = {"sanitizer", "nvcc"}
        self.ends = dict(ends or {})

    def has_gpu(self) -> bool:
        return self.gpu

    def missing(self, need: str) -> bool:
        return need in self.absent

    def run(self, command: tuple[str, ...], log: Path, environment: Mapping[str, str], limit: int) -> Outcome:
        self.ran.append(command[0])
        self.environment |= environment
        end = self.ends.get(command[0], lambda log: Outcome(0, 2.0))
        log.write_text("said\n", encoding="utf-8")
        return end(log)


def with_output(text: str, code: int | None = 0) -> Callable[[Path], Outcome]:
    def end(log: Path) -> Outcome:
        log.write_text(text, encoding="utf-8")
        return Outcome(code, 3.0)

    return end


def cannot_start(log: Path) -> Outcome:
    raise FileNotFoundError("six")


def fake() -> FakeMachine:
    return FakeMachine(
        {
            "one": with_output('words\n{"passed": true}\n'),
            "two": with_output("".join(f"line {i}\n" for i in range(90)), 1),
            "four": with_output("half\n", None),
            "five": with_output("no JSON\n"),
            "six": cannot_start,
        }
    )


def test_every_stage_leaves_a_record_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = fake()
    records = stages.run_stages(PLAN, machine, tmp_path, "code")
    assert machine.ran == ["one", "two", "four", "five", "six", "seven"]
    assert machine.environment == {"A": "1"}
    assert {name: record["status"] for name, record in records.items()} == {
        "first": "passed", "second": "failed", "third": "absent", "fourth": "timed out", "fifth": "failed",
        "sixth": "failed", "last": "passed",
    }  # fmt: skip
    assert records["first"]["result"] == {"passed": True}
    assert records["first"]["without"] == ["nvcc"]  # compared with less, and run
    assert records["second"]["tail"][-1] == "line 89"
    assert len(records["second"]["tail"]) == stages.TAIL_LINES
    assert records["third"]["absent"] == ["sanitizer"]
    assert records["fourth"]["tail"] == ["half"]
    assert records["fifth"]["error"] == "the last line of its output is not JSON"
    assert records["sixth"]["error"] == "six"
    for name, record in records.items():
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == record
    said = capsys.readouterr().out
    assert "third: absent: sanitizer not installed" in said
    assert f"second: failed after 3.0 s; see {tmp_path / 'second.log'}" in said


def test_what_has_passed_does_not_run_again_until_the_code_changes(tmp_path: Path) -> None:
    stages.run_stages(PLAN, fake(), tmp_path, "code")
    machine = fake()
    machine.absent.clear()  # the tool has been installed
    machine.ends = {name: with_output('{"passed": true}\n') for name in machine.ends}
    (tmp_path / "last.json").write_text("{", encoding="utf-8")  # cut off by a kill
    records = stages.run_stages(PLAN, machine, tmp_path, "code")
    assert machine.ran == ["two", "three", "four", "five", "six", "seven"]
    assert {record["status"] for record in records.values()} == {"passed"}
    stages.run_stages(PLAN, machine, tmp_path, "code")
    assert len(machine.ran) == 6
    stages.run_stages(PLAN, machine, tmp_path, "other code")
    assert len(machine.ran) == 6 + len(PLAN)


def test_a_process_that_runs_too_long_ends_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    outcome = Machine().run((sys.executable, "-c", child), tmp_path / "log", {}, 2)
    assert outcome.code is None
    number = int((tmp_path / "log").read_text(encoding="utf-8"))
    for _ in range(50):
        try:
            state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")
    script = "import os; print(os.environ['A'], os.getcwd())"
    assert Machine().run((sys.executable, "-c", script), tmp_path / "log", {"A": "b"}, 60).code == 0
    assert (tmp_path / "log").read_text(encoding="utf-8").split() == ["b", str(device.ROOT)]
    assert Machine().missing("no-such-program")
    assert Machine().missing("package:no_such_package")
    assert not Machine().missing("package:torch")
    assert not Machine().missing("sh")


def command_line() -> Any:
    """The program's module, imported without the change that it makes to the path."""
    before = sys.path[:]
    try:
        return importlib.import_module("tools.gpu.__main__")
    finally:
        sys.path[:] = before


def test_the_plan_is_printed_and_refused_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, machine = command_line().main, FakeMachine(gpu=False)
    machine.absent = {"compute-sanitizer", "package:flashinfer"}
    assert run(["--dry-run"], machine) == 0
    said = capsys.readouterr().out
    for stage in plan():
        assert f"{stage.name}: {stage.what}" in said
    assert "not installed here: compute-sanitizer (left out)" in said
    assert "not installed here: package:flashinfer (runs without them)" in said
    assert not machine.ran
    assert run(["-o", str(tmp_path)], machine) == 2
    assert "this machine has none that torch can use" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["--only", "nothing"], machine)


def test_one_stage_alone_writes_no_page(tmp_path: Path) -> None:
    first, page = plan()[0], summary.PAGE.read_text(encoding="utf-8")
    machine = FakeMachine({first.command[0]: with_output("", 1)})
    assert command_line().main(["--only", first.name, "-o", str(tmp_path)], machine) == 1
    assert machine.ran == [first.command[0]]
    assert summary.PAGE.read_text(encoding="utf-8") == page


def bench(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "status": "passed",
        "result": {
            "device": {"name": "NVIDIA H100", "driver": "570.1"},
            "versions": {"torch": "2.9", "triton": "3.5", "flash-attn": None},
            "cases": [{"case": name, **case} for name, case in cases.items()],
        },
    }


def test_figures_reach_the_page(tmp_path: Path) -> None:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "min": median - 1, "max": median + 1}

    times = {method: ratio(10.0 + i) for i, method in enumerate(METHODS)}
    layer = {"batch": 1, "token_budget": 1024, "best_dense": "flashinfer", "speedup": times, "microseconds": times}
    wide = {"batch": 32, "token_budget": 1024, "share_of_copy": {"rocketkv": ratio(0.71), "rocketkv+": ratio(0.5)}}
    first = {"stock": ratio(900.0), "rocketkv": ratio(910.0)}
    whole = {"best_dense": "flash-attn", "speedup": {"rocketkv": ratio(2.04)}, "first_token": first}
    records = {
        "bench-kernels": bench({"1x131072/1024": layer, "32x8192/1024": wide}),
        "bench-model": bench({"1x131072/1024": whole}),
        "tune": {"status": "timed out", "tail": [f"{summary.ROOT}/eval/x.py"], "log": "/somewhere", "command": ["x"]},
    }
    page = f"before\n{summary.BEGIN}old\n{summary.END}\nafter\n"
    text = summary.with_table(page, records)
    assert text.startswith("before\n<!-- gpu -->\n| | goal")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    for row in (
        "| attention, batch 1, 128K, 1024 | 14 times | 10.0 (9.0-11.0), flashinfer | 11.0 (10.0-12.0), flashinfer |",
        "| attention, batch 8, 32K, 1024 | 10 times | not measured | not measured |",
        "| a layer and step, batch 1, budgets up to 1024 | 12 us | 10.0 us at most (1x131072/1024) |",
        "| share of the copy bandwidth, batch 32 | 60 % | 71% | 50% |",
        "| tokens/s of an 8B model, batch 1, 128K | 1.8 times | 2.0 (1.0-3.0), flash-attn | not measured |",
        "| first token of an 8B model, 128K |  | 910 ms, stock 900 ms | not measured |",
        "NVIDIA H100, driver 570.1; torch 2.9, triton 3.5.",
        "Stages of `make gpu` that did not pass: tune (timed out).",
    ):
        assert row in text, row
    assert summary.with_table(text, records) == text
    found = json.loads(summary.figures(records))
    assert found["tune"] == {"status": "timed out", "tail": ["./eval/x.py"]}
    with pytest.raises(ValueError, match="no markers"):
        summary.with_table("none", records)


def test_the_page_has_the_markers() -> None:
    text = summary.PAGE.read_text(encoding="utf-8")
    assert summary.with_table(text, {}).startswith("# The kernels")
