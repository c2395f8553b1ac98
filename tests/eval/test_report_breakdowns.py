"""Scores by length, mode and category, against figures by hand."""

from __future__ import annotations

from typing import Any

from made_records import made_record
from made_report import cells
from rocketkv.eval.report.gather import gather
from rocketkv.eval.report.page import page
from rocketkv.eval.report.write import markdown

ROCKET: dict[str, Any] = {"method": "rocketkv", "token_budget": 512}


def test_lengths_and_modes_stand_side_by_side_over_common_tasks() -> None:
    records = [
        made_record([100, 100], length=4096, task="a"),
        made_record([100, 0], length=4096, task="a", **ROCKET),
        made_record([0, 0], length=4096, task="only-here"),
        made_record([0, 0], length=4096, task="only-here", **ROCKET),
        made_record([100, 0], length=8192, task="a"),
        made_record([0, 0], length=8192, task="a", **ROCKET),
        made_record([100, 100], length=4096, task="a", mode="aware"),
        made_record([100, 100], length=4096, task="a", mode="aware", **ROCKET),
    ]
    report = gather(records)
    tables = dict(report.breakdowns)
    assert list(tables) == ["Score by length, query-agnostic: a", "Score by mode, 4096 tokens: a"]
    lengths, modes = tables.values()
    assert lengths.header == ("Method", "4096 tokens", "8192 tokens")
    assert [[cell.text for cell in row] for _, row in lengths.rows] == [["100.0", "50.0"], ["50.0", "0.0"]]
    assert [cell.change for cell in lengths.rows[1][1]] == ["-50.0", "-50.0"]
    assert modes.header == ("Method", "query-aware", "query-agnostic")
    assert [[cell.text for cell in row] for _, row in modes.rows] == [["100.0", "100.0"], ["100.0", "50.0"]]
    text = markdown(report).replace("## Score by length", "### Score by length")
    assert cells(text, "Score by length")["full"][0].startswith("100.0, (")
    assert '<section id="breakdowns">' in page(report)
    assert gather(records[:4]).breakdowns == ()


def test_samples_are_parted_by_their_categories() -> None:
    notes = [{"difficulty": name, "domain": "one"} for name in ("easy", "hard", "hard")]
    records = [
        made_record([100, 0, 100], notes=notes),
        made_record([100, 0], notes=notes[1:], ids=["0001", "0002"], **ROCKET),
    ]
    ((title, table),) = gather(records).breakdowns  # a single domain parts nothing
    assert title == "niah by difficulty, 4096 tokens, query-agnostic"
    assert table.header == ("Method", "hard (2 samples)", "easy (1 sample)")
    assert [[cell.text for cell in row] for _, row in table.rows] == [["50.0", "100.0"], ["50.0", "-"]]


def test_many_categories_are_counted() -> None:
    notes = [{"domain": f"d{n:02}"} for n in range(15)]
    ((title, table),) = gather([made_record([100] * 15, notes=notes)]).breakdowns
    assert title.endswith(": the 12 largest of 15")
    assert len(table.header) == 13
