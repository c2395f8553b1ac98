"""Samples side by side, and the errors of cells without a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from made_records import made_record, write_all
from rocketkv.eval.records import Record
from rocketkv.eval.report.examples import prompt_ends
from rocketkv.eval.report.failures import failures
from rocketkv.eval.report.gather import gather
from rocketkv.eval.report.page import page
from rocketkv.eval.report.write import markdown, write_report
from rocketkv.eval.sweep.samples import prepare
from rocketkv.eval.tasks.base import Preparation, Sample, Task, Turn
from words import Words

ROCKET: dict[str, Any] = {"method": "rocketkv", "token_budget": 512}
QUEST: dict[str, Any] = {"method": "quest", "token_budget": 512}


class Vocabulary(Words):
    def get_vocab(self) -> dict[str, int]:
        return {}


def answered(record: Record, *texts: str) -> Record:
    for sample, text in zip(record["samples"], texts, strict=True):
        sample["turns"][0]["prediction"] = text
    return record


def three_arms() -> list[Record]:
    return [
        answered(made_record([100, 100, 0]), "one", "It is 1234567.", "no"),
        answered(made_record([100, 0, 0], **ROCKET), "one", "It is 12", "no"),
        answered(made_record([100, 0, 0], **QUEST), "one", "It is 9234567.", "never"),
    ]


def test_answers_stand_side_by_side_from_their_first_difference() -> None:
    ((task,),) = gather(three_arms()).examples
    assert (task.task, task.total) == ("niah", 3)
    assert [example.name for example in task.examples] == ["0001", "0000", "0002"]  # most differences first
    answers = [(a.arms, a.same, a.rest, a.differs, a.verdict) for a in task.examples[0].answers]
    assert answers == [
        (("full",), "It is 1234567.", "", False, "right"),
        (("rocketkv 512",), "It is 12", "", True, "wrong"),
        (("quest 512",), "It is ", "9234567.", True, "wrong"),
    ]
    (alike,) = task.examples[1].answers
    assert alike.arms == ("full", "rocketkv 512", "quest 512")
    text = page(gather(three_arms()))
    assert "<q>It is <mark>9234567.</mark></q>" in text
    assert "<q>It is 12<mark>∎</mark></q>" in text
    assert "3 of 3 samples" in text


def test_long_answers_are_cut_around_the_difference() -> None:
    records = [answered(made_record([100]), "a" * 500), answered(made_record([50], **ROCKET), "a" * 300 + "b" * 300)]
    full, other = gather(records).examples[0][0].examples[0].answers
    assert full.same == "a" * 200 + "…"
    assert (other.same, other.rest, other.verdict) == ("…" + "a" * 60, "b" * 200 + "…", "50")


def test_prompts_come_from_the_prepared_samples(tmp_path: Path) -> None:
    turns = tuple(Turn(question=f" Where is {n}?", answers=("x",), max_new_tokens=1, answer_prefix=" In") for n in "ab")
    sample = Sample(id="0000", context="far " * 1000 + "near.", turns=turns)
    task = Task(
        name="niah", group="g", version=1, source="s", metric="m", samples=lambda _: [sample], score=lambda *_: 0.0
    )
    _, data = prepare(tmp_path, task, Preparation(tokenizer=cast(Any, Vocabulary()), length=64, count=1))
    ends = prompt_ends(tmp_path)
    assert ends[data["sha256"], "0000"][0].endswith("far near. Where is a? In")
    assert len(ends[data["sha256"], "0000"][0]) == 321
    assert ends[data["sha256"], "0000"][1] == " Where is b? In"

    record = made_record([100])
    record["data"] = data
    write_all(tmp_path, [record])
    write_report(tmp_path, tmp_path / "report.html")
    assert "far near. Where is a? In</pre>" in (tmp_path / "report.html").read_text(encoding="utf-8")

    (path,) = (tmp_path / "data").glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"near", b"else"))
    assert prompt_ends(tmp_path) == {}  # damaged
    assert "The prompt is not in the folder of the results." in page(gather([record], prompt_ends(tmp_path)))


def test_examples_keep_to_the_room_of_a_page() -> None:
    records = [
        answered(made_record([0] * 8, task=f"task-{n}", **arm), *[f"{n} & {arm} " * 90] * 8)
        for n in range(40)
        for arm in ({}, ROCKET)
    ]
    report = gather(records)
    ((*tasks,),) = report.examples
    counts = [len(task.examples) for task in tasks]
    assert 1 <= min(counts) <= max(counts) <= min(counts) + 1 < 5  # the tasks take turns
    assert len(page(report).encode()) <= 1.6e6
    few = gather(records[:2])
    assert len(few.examples[0][0].examples) == 5


def test_errors_stand_with_their_cells() -> None:
    trace = "Traceback (most recent call last):\n  File <x>\nKeyError: 'layer'"
    failed = made_record([0, 0], status="failed", task="kl", **ROCKET)
    failed["message"] = trace
    failed["samples"] = made_record([100])["samples"]
    short = [made_record([0], status="out_of_memory", length=n, **QUEST) for n in (4096, 8192)]
    first, second = failures([made_record([100]), failed, *short])
    assert (first.status, first.summary) == ("OOM", "CUDA out of memory. Tried to allocate 4.00 GiB")
    assert first.cells == (
        "niah, quest 512, 4096 tokens, query-agnostic",
        "niah, quest 512, 8192 tokens, query-agnostic",
    )
    assert (second.status, second.summary, second.message) == ("failed", "KeyError: 'layer'", trace)
    assert second.cells == ("kl, rocketkv 512, 4096 tokens, query-agnostic (1 of 2 samples done)",)
    report = gather([made_record([100]), failed, *short])
    assert "File &lt;x&gt;" in page(report)
    assert "- failed: KeyError: 'layer': kl, rocketkv 512" in markdown(report)
    assert 'id="failures"' not in page(gather(three_arms()))


@pytest.mark.parametrize("count", [19, 23])
def test_many_errors_are_counted(count: int) -> None:
    records = []
    for n in range(count):
        records.append(made_record([0], status="failed", task=f"t{n}", **ROCKET))
        records[-1]["message"] = f"error {n} " * 4000
    text = page(gather([made_record([100]), *records]))
    assert len(text.encode()) <= 1.6e6
    assert (f"{count - 20} further messages are in the records." in text) == (count > 20)
