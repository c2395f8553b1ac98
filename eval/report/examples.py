"""Samples side by side: the end of the prompt and each arm's answer, up to as much text as a page can hold."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records import TurnDict, digest
from .arms import Arm
from .columns import Column, reference
from .sections import Section

_FOLDER = "data"  # of the prepared samples, as sweep/samples.py writes them; its imports are heavy
Prompts = Mapping[tuple[str, str], Sequence[str]]  # (hash of the data, id of the sample): the end of each turn's prompt

_MOST_A_TASK = 5  # examples
_MOST_BYTES = 100_000  # of all examples of a report
_MARKUP = 90  # bytes of HTML around an answer
_PROMPT, _EXPECTED, _BEFORE, _AFTER = 320, 200, 60, 200  # characters shown


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and the arms that gave it.

    Attributes:
        arms: their names.
        same: its start, as far as it equals the full cache's answer; all of it where there is no such answer.
        rest: from the first difference on; of an answer that ends early, nothing.
        differs: whether it differs from the full cache's answer.
        score: from 0 to 100.
    """

    arms: tuple[str, ...]
    same: str
    rest: str
    differs: bool
    score: float

    @property
    def verdict(self) -> str:
        """`right`, `wrong`, or the score in between."""
        return {100.0: "right", 0.0: "wrong"}.get(self.score, f"{self.score:.0f}")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and the answers of all arms.

    Attributes:
        name: the sample's id, and the number of the turn if it has several.
        prompt: the end of its prompt; None where the prepared samples are not in the folder of the results.
        expected: the right answers.
        answers: equal ones together, the full cache's first.
    """

    name: str
    prompt: str | None
    expected: str
    answers: tuple[Answer, ...]

    @property
    def size(self) -> int:
        """Bytes of its text and of the HTML around it."""
        texts = [self.name, self.prompt or "", self.expected]
        texts += [text for answer in self.answers for text in (*answer.arms, answer.same, answer.rest)]
        return sum(len(html.escape(text).encode()) for text in texts) + _MARKUP * (3 + len(self.answers))


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """Examples of a task: first those that most arms score differently from the full cache."""

    task: str
    examples: tuple[Example, ...]
    total: int  # number of questions that have answers


def prompt_ends(results: Path) -> dict[tuple[str, str], list[str]]:
    """Return the end of every prepared prompt of a folder of results; damaged files are left out."""
    ends = {}
    for path in sorted((results / _FOLDER).glob("*.jsonl")):
        checksum, _, body = path.read_bytes().decode("utf-8", errors="replace").partition("\n")
        if checksum != digest(body):
            continue
        for sample in map(json.loads, body.split("\n")[:-1]):
            texts = [sample["context"][-_PROMPT:] * (number == 0) + turn["question"] + turn["answer_prefix"]
                     for number, turn in enumerate(sample["turns"])]  # fmt: skip
            ends[checksum, sample["id"]] = [_tail(text, _PROMPT) for text in texts]
    return ends


def examples_of(sections: Sequence[Section], prompts: Prompts) -> list[tuple[TaskExamples, ...]]:
    """Return the examples of each section.

    The tasks get their first example each, then their second, and so on, up to five or to what a page can hold.
    """
    places = [(place, column) for place, section in enumerate(sections) for column in section.scores]
    ranked = [_ranked(column, sections[place].arms) for place, column in places]
    result: list[list[TaskExamples]] = [[] for _ in sections]
    for (place, column), keys in zip(places, ranked, strict=True):
        if keys:
            found = tuple(_example(column, sections[place].arms, key, prompts) for key in keys[:_MOST_A_TASK])
            result[place].append(TaskExamples(task=column.name, examples=found, total=len(keys)))
    return fewer(result, _MOST_BYTES)


def fewer(sections: Sequence[Sequence[TaskExamples]], most_bytes: int) -> list[tuple[TaskExamples, ...]]:
    """Leave as many examples as fit: of each task the first, then the second, and so on."""
    kept: list[list[list[Example]]] = [[[] for _ in tasks] for tasks in sections]
    for turn in range(_MOST_A_TASK):
        for tasks, found in zip(sections, kept, strict=True):
            for task, examples in zip(tasks, found, strict=True):
                if turn < len(task.examples) and task.examples[turn].size <= most_bytes:
                    most_bytes -= task.examples[turn].size
                    examples.append(task.examples[turn])
    return [
        tuple(dataclasses.replace(task, examples=tuple(found)) for task, found in zip(tasks, examples, strict=True))
        for tasks, examples in zip(sections, kept, strict=True)
    ]


def size_of(sections: Sequence[Sequence[TaskExamples]]) -> int:
    """Return the bytes of all examples."""
    return sum(example.size for tasks in sections for task in tasks for example in task.examples)


def _turns(column: Column, arm: Arm) -> dict[tuple[str, int], TurnDict]:
    samples = column.cells[arm]["samples"] if arm in column.cells else []
    return {(sample["id"], n): turn for sample in samples for n, turn in enumerate(sample["turns"])}


def _ranked(column: Column, arms: Sequence[Arm]) -> list[tuple[str, int]]:
    """Return the questions of a task, first those that most arms score differently from the full cache."""
    turns = {arm: _turns(column, arm) for arm in arms}
    keys = list(dict.fromkeys(key for found in turns.values() for key in found))

    def different(key: tuple[str, int]) -> int:
        scores = [found[key]["score"] for found in turns.values() if key in found]
        full = [found[key]["score"] for arm, found in turns.items() if arm == reference(arm, arms) and key in found]
        return sum(score != (full or scores)[0] for score in scores)

    return sorted(keys, key=different, reverse=True)


def _example(column: Column, arms: Sequence[Arm], key: tuple[str, int], prompts: Prompts) -> Example:
    name, number = key
    turns = {arm: found[key] for arm in arms if key in (found := _turns(column, arm))}
    full = {arm: other for arm in turns if (other := reference(arm, turns)) is not None}
    same: dict[tuple[str, float, str | None], list[str]] = {}
    for arm, turn in turns.items():
        whole = turns[full[arm]]["prediction"] if arm in full else None
        same.setdefault((turn["prediction"], turn["score"], whole), []).append(arm.name)
    record = column.cells[next(iter(turns))]
    ends = prompts.get((record["data"]["sha256"], name))
    several = max(len(sample["turns"]) for sample in record["samples"]) > 1
    expected = " | ".join(next(iter(turns.values()))["answers"])
    return Example(
        name=f"{name}, turn {number + 1}" if several else name,
        prompt=None if ends is None else ends[number % len(ends)],  # several answers to one prompt
        expected=_head(expected, _EXPECTED),
        answers=tuple(_answer(names, text, score, whole) for (text, score, whole), names in same.items()),
    )


def _answer(arms: Sequence[str], text: str, score: float, full: str | None) -> Answer:
    common = len(text) if full is None else _common(text, full)
    differs = full is not None and text != full
    same = _tail(text[:common], _BEFORE) if differs else _head(text, _AFTER)
    rest = _head(text[common:], _AFTER) if differs else ""
    return Answer(arms=tuple(arms), same=same, rest=rest, differs=differs, score=score)


def _common(text: str, other: str) -> int:
    """Return how many characters two texts start with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(text), len(other)))


def _head(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[-most:]}"
