"""A report of a folder that is not whole, of decode steps by position, and of a sweep too large for a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval_case import know_tasks, made_cells, made_task, make_session, sample, save
from made_records import made_record, write_all
from rocketkv.eval.asked import FOLDER, write_asked
from rocketkv.eval.conversation import pace_of
from rocketkv.eval.records import read_record, record_path
from rocketkv.eval.report import page as page_module
from rocketkv.eval.report.gather import gather
from rocketkv.eval.report.pace import paces
from rocketkv.eval.report.page import page
from rocketkv.eval.report.plots import pace_plots, styles
from rocketkv.eval.report.write import markdown, write_report
from rocketkv.eval.sweep.run import merge, run_cells

ROCKET: dict[str, Any] = {"method": "rocketkv", "token_budget": 512}


def test_damaged_records_and_cells_without_one_are_named(tmp_path: Path) -> None:
    whole, torn, absent = made_record([100.0]), made_record([0.0], **ROCKET), made_record([0.0], task="other")
    folder = write_all(tmp_path / "results", [whole, torn])
    write_asked(folder, [record["cell"] for record in (whole, torn, absent)])
    path = record_path(folder, torn["cell"])
    path.write_text(path.read_text(encoding="utf-8").replace('"score": 0.0', '"score": 100.0'), encoding="utf-8")
    (folder / "data").mkdir()
    (folder / "data" / "niah.jsonl.damaged-1").touch()
    for name, format_of in (("report.html", page), ("report.md", markdown)):
        write_report(folder, folder / name)
        text = (folder / name).read_text(encoding="utf-8")
        assert f"{path.name} does not match its checksum" in text
        assert "other, full, 4096 tokens, query-agnostic" in text
        assert "put aside, and what they held was made again: niah.jsonl.damaged-1" in text
        assert "Cells without a result" not in format_of(gather([whole]))
    assert merge([write_all(tmp_path / "part", [whole])], tmp_path / "merged") == 1
    write_asked(tmp_path / "part", [absent["cell"]])
    assert merge([tmp_path / "part"], tmp_path / "merged") == 0
    assert len(list((tmp_path / "merged" / FOLDER).iterdir())) == 1

    record_path(folder, whole["cell"]).write_text("{}")
    with pytest.raises(ValueError, match=f"found none below .*; damaged: .*{path.name}"):
        write_report(folder, folder / "report.html")


def test_a_large_sweep_shows_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    arms: list[dict[str, Any]] = [{}, ROCKET]
    records = [made_record([0] * 5, task=f"task-{n}", prediction=f"{n} " * 90, **arm) for n in range(9) for arm in arms]
    report = gather(records)
    whole = page(report)
    note = "Samples are left out to keep the page within 1.6 MB"
    assert len(whole.encode()) < page_module.MOST_BYTES
    assert (whole.count("<article>"), note in whole) == (45, False)
    monkeypatch.setattr(page_module, "MOST_BYTES", len(whole.encode()) - 3000)
    monkeypatch.setattr(page_module, "_SPARE", 0)
    less = page(report)
    assert len(less.encode()) <= page_module.MOST_BYTES
    assert 30 < less.count("<article>") < 45
    assert note in less
    monkeypatch.setattr(page_module, "MOST_BYTES", 1)  # the tables stay in any case
    assert "<article>" not in page(report)
    assert ("tables alone exceed 1.6 MB" in page(report), "tables alone" in less) == (True, False)


def test_the_pace_of_a_long_answer_is_of_its_steps_by_position() -> None:
    assert pace_of(100, [0.5] * 63) == ()
    assert pace_of(100, [1.0] * 16 + [2.0] * 16 + [3.0, 5.0] * 8 + [4.0] * 20) == (
        (100, 1.0), (116, 2.0), (132, 4.0), (148, 4.0),
    )  # fmt: skip
    assert len(pace_of(0, [1.0] * 1000)) == 16


def test_a_run_notes_the_pace_and_the_report_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.eval.conversation.end_tokens", lambda *_: set())
    know_tasks(monkeypatch, made_task(samples=lambda _: [sample(max_new_tokens=70)]))
    session = make_session(save(tmp_path / "model"), tmp_path / "results")
    found = made_cells(max_new_tokens=None, samples=1)
    run_cells(session, found)
    records = [read_record(record_path(session.results, cell)) for cell in found]
    for record in records:
        (made,) = record["samples"]
        first = int(made["cost"]["prompt_tokens"])
        assert [position for position, _ in made["notes"]["pace"]] == [first + n for n in (0, 16, 32, 48)]
    report = gather(records)
    (section,) = report.sections
    assert {arm.name: len(points) for arm, points in paces(section).items()} == {"full": 4, "streaming 24": 4}
    (plot,) = pace_plots(section, styles(section.arms))
    seconds = [seconds for _, seconds in records[1]["samples"][0]["notes"]["pace"]]
    assert plot.data["lines"][1]["y"] == pytest.approx([1e3 * each for each in seconds])
    assert "Decoding by position" in page(report)
    alone = made_record(
        [0.02], task="latency", metric="seconds a token", higher_is_better=False, length=60, mode="aware"
    )
    alone["cell"]["model"], alone["cell"]["dtype"] = records[0]["cell"]["model"], records[0]["cell"]["dtype"]
    alone["details"] = {"step_seconds_by_position": [[60, 0.02], [76, 0.03]]}
    (section,) = gather([*records, alone]).sections
    assert {arm.name: points for arm, points in paces(section).items()} == {"full": [(60.0, 20.0), (76.0, 30.0)]}
    assert pace_plots(gather([made_record([0.0])]).sections[0], {}) == []
