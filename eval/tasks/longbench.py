"""LongBench, the 16 English tasks: questions, summaries, few-shot examples and code on documents of 5K to 15K words.

Follows the official definition (THUDM/LongBench, `LongBench/pred.py`, MIT): data, templates, truncation in the middle,
numbers of new tokens, metrics, and the chat template for all tasks but trec, triviaqa, samsum, lcc and repobench-p. One
thing differs: the official program stops samsum at the first line feed, even where that comes first; here generation
goes on, and the first line that is not empty counts. In every template the question comes after the document.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import metrics
from .base import Preparation, Sample, Task, Turn
from .length import truncate
from .sources import check_fields, data_file, hub_file, read_jsonl, seeded_rows, templates

_REPO = "zai-org/LongBench"  # THUDM/LongBench before
_FIELDS = ("_id", "context", "input", "answers", "all_classes", "length")
_OFFICIAL = templates("longbench")
_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum"})  # only the first line of an answer is scored


def _rows(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    member = f"data/{name}.jsonl"
    if data_dir is None:
        return read_jsonl(hub_file(_REPO, "data.zip"), member)
    path = data_file(data_dir, f"{name}.jsonl", member, "data.zip")
    return read_jsonl(path, member if path.suffix == ".zip" else None)


def _samples(name: str, prepared: Preparation) -> Sequence[Sample]:
    """Make `prepared.count` samples of random rows, or as many as the data have."""
    before, after = _OFFICIAL[name]["template"].split("{context}")
    new_tokens = _OFFICIAL[name]["max_new_tokens"]
    samples = []
    rows = _rows(name, prepared.data_dir)
    for number, row in seeded_rows(rows, name, prepared.seed, prepared.count):
        check_fields(row, _FIELDS, f"row {number + 1} of {name}")
        prompt = truncate(prepared, before + row["context"], after.replace("{input}", row["input"]), new_tokens)
        turn = Turn(
            question=prompt.question,
            answers=tuple(str(answer) for answer in row["answers"]),
            max_new_tokens=new_tokens,
            extra={"all_classes": row["all_classes"]},
        )
        notes = {"tokens_cut": prompt.tokens_cut, "tokens_kept": prompt.tokens_kept, "words": row["length"]}
        samples.append(Sample(id=str(row["_id"]), context=prompt.context, turns=(turn,), notes=notes))
    return samples


def _score(name: str, prediction: str, turn: Turn) -> float:
    """Score an answer by the task's official metric."""
    if name in _FIRST_LINE:
        prediction = metrics.first_line(prediction)
    if _OFFICIAL[name]["metric"] == "classification":
        return metrics.classification(prediction, turn.answers, turn.extra["all_classes"])
    metric: metrics.Metric = getattr(metrics, _OFFICIAL[name]["metric"])
    return metric(prediction, turn.answers)


TASKS = tuple(
    Task(
        name=name,
        group="longbench",
        version=2,
        source="THUDM/LongBench (MIT)",
        metric=official["metric"],
        samples=functools.partial(_samples, name),
        score=functools.partial(_score, name),
        sized=False,
        chat=official["chat"],
    )
    for name, official in _OFFICIAL.items()
)
