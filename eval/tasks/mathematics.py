r"""AIME 2024 and 2025 and MATH-500: problems whose answers are worked out step by step, often over thousands of tokens.

Data are those of the hub. The prompt is the usual one: the problem, and the request to put the final answer within
`\boxed{}`. The last `\boxed{}` of an answer counts, compared with the right answer by `math-verify`: symbolically, so
that `0.5` equals `\frac{1}{2}`. An answer without one is wrong, as one that a limit has cut.

Published figures are means over several sampled answers to each problem: `--generation card --answers 8`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..optional import optional
from .base import Preparation, Sample, Task, Turn
from .length import sample_tokens
from .sources import check_fields, data_file, hub_file, read_jsonl, read_parquet, seeded_rows

MAX_NEW_TOKENS = 32_768
_REQUEST = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_BOX = "\\boxed"
_SECONDS = 5  # of parsing, and of comparing


class _Source(NamedTuple):
    """A data set of the hub: its name, its file, its licence if it names one, and the field of its ids."""

    repo: str
    file: str
    licence: str
    id: str


_SOURCES = {
    "aime24": _Source("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "", "id"),
    "aime25": _Source("math-ai/aime25", "test.jsonl", " (Apache-2.0)", "id"),
    "math500": _Source("HuggingFaceH4/MATH-500", "test.jsonl", "", "unique_id"),
}
_NOTES = ("subject", "level", "year")


def _rows(name: str, data_dir: Path | None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a data set, field names in lower case: one copy on the hub writes `Problem`."""
    source = _SOURCES[name]
    suffix = Path(source.file).suffix
    if data_dir is None:
        path = hub_file(source.repo, source.file, save_as=f"{name}{suffix}")
    else:
        clone = f"{source.repo.split('/')[1]}/{source.file}"
        path = data_file(data_dir, f"{name}.jsonl", f"{name}.parquet", clone)
    for row in read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path):
        yield {field.lower(): value for field, value in row.items()}


def _samples(name: str, prepared: Preparation) -> Sequence[Sample]:
    """Make `prepared.count` samples of random rows, or as many as the data have.

    Raises:
        ValueError: a prompt leaves no tokens for an answer.
    """
    field, samples = _SOURCES[name].id, []
    limit = prepared.max_length if prepared.length is None else min(prepared.length, prepared.max_length)
    for number, row in seeded_rows(_rows(name, prepared.data_dir), name, prepared.seed, prepared.count):
        check_fields(row, (field, "problem", "answer"), f"row {number + 1} of {name}")

        def sample(room: int, row: Mapping[str, Any] = row) -> Sample:
            turn = Turn(question=_REQUEST, answers=(_plain(str(row["answer"])),), max_new_tokens=room)
            notes = {note: str(row[note]) for note in _NOTES if row.get(note) is not None}
            return Sample(id=str(row[field]), context=str(row["problem"]).strip(), turns=(turn,), notes=notes)

        room = limit - sample_tokens(prepared, sample(MAX_NEW_TOKENS))
        if room < 1:
            raise ValueError(f"row {number + 1} of {name} leaves no room for an answer within {limit} tokens")
        samples.append(sample(min(room, MAX_NEW_TOKENS)))
    return samples


def _plain(answer: str) -> str:
    """Return a right answer without the leading zeros that AIME writes."""
    return str(int(answer)) if answer.isdecimal() else answer


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` of a text; None: there is none, or it has no end."""
    start = text.rfind(_BOX)
    inside = text[start + len(_BOX) :].lstrip() if start >= 0 else ""
    if not inside.startswith("{"):
        return None
    depth = 0
    for place, letter in enumerate(inside):
        if inside[place - 1 : place] == "\\":
            continue  # a brace of the text
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[1:place]
    return None


def equal(answer: str, right: str) -> bool:
    """Whether two answers in LaTeX are the same, by `math-verify`; one that takes seconds to compare is not.

    Raises:
        ImportError: math-verify is not installed.
    """
    verifier = _verifier()
    # It ends a comparison by an alarm, which only the main thread may set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    config = [verifier.LatexExtractionConfig(boxed_match_priority=0)]
    expected, found = (
        verifier.parse(f"{_BOX}{{{text}}}", extraction_config=config, parsing_timeout=seconds)
        for text in (right, answer)
    )
    return bool(verifier.verify(expected, found, timeout_seconds=seconds))


def _verifier() -> Any:
    return optional("math_verify", "math")


def _score(prediction: str, turn: Turn) -> float:
    """Return 100 for a right answer, 0 for a wrong one or none."""
    boxed = last_boxed(prediction)
    return 100.0 if boxed is not None and equal(boxed, turn.answers[0]) else 0.0


TASKS = tuple(
    Task(
        name=name,
        group="math",
        version=1,
        source=f"{source.repo}{source.licence}; the usual prompt; math-verify",
        metric="accuracy",
        samples=functools.partial(_samples, name),
        score=_score,
        sized=False,
        require=_verifier,
    )
    for name, source in _SOURCES.items()
)
