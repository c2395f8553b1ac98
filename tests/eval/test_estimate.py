"""A dry run: the cells of a sweep, who reads their prompts, and times that a probe of the model is scaled to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval_case import know_tasks, made_task, make_session, save
from made_records import made_record
from rocketkv.cli.main import main
from rocketkv.eval.records import CellDict, cell_key, record_path, write_record
from rocketkv.eval.sweep import estimate
from rocketkv.eval.sweep.cells import method_of
from rocketkv.eval.sweep.estimate import dry_run
from rocketkv.eval.sweep.plan import Loaded, Plan, cells, shard
from rocketkv.eval.sweep.probe import Speed, arm_key, probe
from rocketkv.eval.sweep.provenance import weights_mark
from rocketkv.hf.loading import load_model

FULL, ROCKET = '["full",null,{}]', '["rocketkv",32,{}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def no_samples(_: Any) -> Any:
    raise ValueError("there are no data")


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    know_tasks(monkeypatch, made_task("sized"), made_task("turns", turns=3), made_task("absent", samples=no_samples))


def speed(**fields: Any) -> Speed:
    known: dict[str, Any] = {
        "lengths": (100, 200),
        "prefills": (1.0, 3.0),  # x / 200 + x^2 / 20000
        "starts": {FULL: (0.0, 0.0), ROCKET: (0.1, 0.2)},
        "steps": {FULL: (0.01, 0.02), ROCKET: (0.01, 0.01)},
        "errors": {},
    }
    return Speed(**known | fields)


def test_times_are_scaled_by_the_length() -> None:
    made = speed()
    assert [made.prefill(length) for length in (100, 200, 400)] == pytest.approx([1, 3, 10])
    assert [made.start(ROCKET, length) for length in (100, 400)] == pytest.approx([0.1, 0.4])
    assert [made.step(FULL, length) for length in (100, 200, 1000)] == pytest.approx([0.01, 0.02, 0.1])
    assert made.step(ROCKET, 1000) == 0.01


@pytest.mark.parametrize("prefills", [(1.0, 1.5), (1.0, 9.0)])
def test_noise_gives_no_negative_part(prefills: tuple[float, float]) -> None:
    made = speed(prefills=prefills, steps={FULL: (0.01, 0.2)})
    assert made.prefill(200) == pytest.approx(prefills[1])
    assert 2 * prefills[1] <= made.prefill(400) <= 4 * prefills[1]
    assert made.step(FULL, 400) == pytest.approx(0.4)  # no faster than the length


def made_cells(folder: Path, **fields: Any) -> list[CellDict]:
    model, _ = load_model(str(folder))
    known: dict[str, Any] = {
        "model": str(folder), "tasks": ("sized", "turns"), "methods": ("full", "rocketkv"), "budgets": (32,),
        "lengths": (256,), "samples": 2, "max_new_tokens": 5,
    }  # fmt: skip
    return cells(Plan(**known | fields), Loaded(chat=True, weights=weights_mark(model)))


def test_a_prompt_counts_once_for_the_methods_that_share_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "probe", lambda *_: speed())
    shape = estimate._Shape(200, ((0, 5),))
    monkeypatch.setattr(estimate, "_shapes", lambda *_: [shape])
    session = make_session(folder, tmp_path)
    lines = dry_run(session, made_cells(folder, tasks=("sized", "kl", "latency")), 60.0).splitlines()
    rows = [line.split() for line in lines[1:7]]
    step, late = 0.02 + 0.0001 * 2.5, 0.01  # of full, between its first and last token; of rocketkv
    full, ours = 4 * step, 0.2 + 4 * late
    expected = [
        ("sized", "2", 2 * 3 + 2 * full),
        ("sized", "0", 2 * ours),
        ("kl", "2", 2 * 3 + 2 * full + 2 * full),  # and the reference
        ("kl", "0", 2 * ours),
        ("latency", "7", 7 * 3 + 7 * full + 60),  # each repeat, and a model loaded apart
        ("latency", "7", 7 * 3 + 7 * ours + 60),
    ]
    assert [(row[0], row[-3]) for row in rows] == [(task, reads) for task, reads, _ in expected]
    assert [float(row[-1]) * 60 for row in rows] == pytest.approx([seconds for *_, seconds in expected], abs=0.31)
    total = (60 + sum(seconds for *_, seconds in expected)) / 60
    assert lines[7].startswith(f"estimated: {total:.1f} minutes, 18 prefills for 10 samples of 6 cells, ")


def test_a_probe_runs_every_method(folder: Path, tmp_path: Path) -> None:
    session = make_session(folder, tmp_path)
    methods = {arm_key(cell): method_of(session, cell) for cell in made_cells(folder, tasks=("sized",))}

    class Broken:
        name, token_budget = "broken", 8

        def attached(self, model: Any) -> Any:
            raise RuntimeError("a bug\nof the method")

    found = probe(session.model, methods | {"broken": Broken()}, 600)  # type: ignore[dict-item]
    assert found.lengths == (512, 600)
    assert set(found.steps) == set(found.starts) == {FULL, ROCKET}
    assert min(*found.prefills, *found.steps[FULL], *found.steps[ROCKET], *found.starts[ROCKET]) > 0
    assert found.errors == {"broken": "a bug"}


def test_a_dry_run_prints_the_cells_and_runs_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    tasks, methods = ("sized", "turns", "absent"), ("full", "rocketkv", "kvpress:KnormPress")
    everything = made_cells(folder, tasks=tasks, methods=methods, max_new_tokens=None)
    done = everything[1]
    record = made_record([1.0]) | {"cell": done, "key": cell_key(done)}
    write_record(record_path(results, done), record)  # type: ignore[arg-type]
    damaged = record_path(results, everything[2])
    damaged.write_text(record_path(results, done).read_text()[:-9])
    before = sorted(results.rglob("*"))
    monkeypatch.setattr("rocketkv.eval.sweep.run.run_cells", lambda *_: pytest.fail("a dry run must run nothing"))
    arguments = [
        "eval", "run", "--dry-run", "--model", str(folder), "--tasks", ",".join(tasks), "--methods", ",".join(methods),
        "--budgets", "32", "--lengths", "256", "--samples", "2", "-o", str(results), "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    rows, (total, probed, *reasons) = lines[:9], lines[9:]
    assert header.split() == ["task", "length", "method", "samples", "prefills", "cache", "MiB", "minutes"]
    assert [row.split()[:2] for row in rows] == [[cell["task"], "256"] for cell in everything]
    assert [row.split()[-1] == "done" for row in rows] == [cell is done for cell in everything]
    unknown = [cell["method"].startswith("kvpress") or cell["task"] == "absent" for cell in everything]
    assert [row.split()[-1] == "?" for row in rows] == unknown
    assert total.startswith("estimated: ")
    assert "of 3 cells" in total
    assert probed.startswith("probe: a prefill of ")
    assert reasons[0].startswith("? 2 cells: kvpress:KnormPress needs the package kvpress")
    assert reasons[1] == "? 3 cells: there are no data"
    assert sorted(results.rglob("*")) == before

    assert main([*arguments, "--shard", "2/3"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    part = shard(everything, 2, 3)
    assert [row.split()[0] for row in rows[: len(part)]] == [cell["task"] for cell in part]
