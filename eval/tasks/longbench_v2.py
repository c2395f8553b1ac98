"""LongBench v2: 503 questions with four choices on documents of 8K to 2M words, answered by generation.

Follows the official definition (THUDM/LongBench, `pred.py`): data, truncation in the middle, 128 new tokens, the chat
template, and the pattern that finds the choice in an answer. The answer is generated rather than chosen by likelihood,
so that decoding is exercised. Two things differ: the official program samples at temperature 0.1, and decodes the two
halves of a truncated prompt together; here they are decoded apart, as in LongBench v1.

The official template, `prompts/0shot.txt`, is read from the user's folder. Without it a template of this project is
used, `notes["template"]` of each sample is `ours`, and scores do not compare with published ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Preparation, Sample, Task, Turn
from .length import truncate
from .sources import check_fields, data_file, hub_file, read_json, seeded_rows, templates

_REPO = "zai-org/LongBench-v2"  # THUDM/LongBench-v2 before
_MAX_NEW_TOKENS = 128
_DOCUMENT = "$DOC$"
_PLACEHOLDERS = {"$Q$": "question"} | {f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}
_CATEGORIES = ("difficulty", "length", "domain", "sub_domain")
_FIELDS = ("_id", "context", *_PLACEHOLDERS.values(), "answer", *_CATEGORIES)


def choice(prediction: str) -> str | None:
    """Return the letter that an answer chooses by the official rule, or None.

    The first match of `The correct answer is (B)` counts, else of the same without brackets; asterisks are ignored.
    """
    text = prediction.replace("*", "")
    match = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return match.group(1) if match else None


def _template(data_dir: Path | None) -> tuple[str, str]:
    """Return the template and its origin: `official`, `user's` or `ours`.

    Raises:
        ValueError: the user's template lacks or repeats a placeholder, or asks before the document.
    """
    paths = [] if data_dir is None else [data_dir / "0shot.txt", data_dir / "prompts" / "0shot.txt"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return templates("longbench_v2")["template"], "ours"
    template = path.read_text(encoding="utf-8")
    places = [(template.count(mark), template.find(mark)) for mark in (_DOCUMENT, *_PLACEHOLDERS)]
    # Query-agnostic evaluation compresses only the text before the question.
    if any(count != 1 for count, _ in places) or min(places, key=lambda place: place[1]) != places[0]:
        raise ValueError(
            f"{path} must have {_DOCUMENT} once, and {', '.join(_PLACEHOLDERS)} once each after it; edit it"
        )
    official = hashlib.sha256(template.encode()).hexdigest() == templates("longbench_v2")["official_sha256"]
    return template, "official" if official else "user's"


def _rows(data_dir: Path | None) -> list[dict[str, Any]]:
    path = hub_file(_REPO, "data.json") if data_dir is None else data_file(data_dir, "data.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a JSON list of objects; take the official file")
    return rows


def _fill_in(template: str, row: Mapping[str, Any]) -> str:
    # In one pass: a question may itself contain text that looks like a placeholder.
    return re.sub(
        "|".join(map(re.escape, _PLACEHOLDERS)), lambda match: str(row[_PLACEHOLDERS[match[0]]]).strip(), template
    )


def _samples(prepared: Preparation) -> Sequence[Sample]:
    """Make `prepared.count` samples of random rows, or as many as the data have."""
    rows = seeded_rows(_rows(prepared.data_dir), "longbench_v2", prepared.seed, prepared.count)
    template, origin = _template(prepared.data_dir)
    before, after = template.split(_DOCUMENT)
    samples = []
    for number, row in rows:
        check_fields(row, _FIELDS, f"row {number + 1} of data.json")
        prompt = truncate(prepared, before + row["context"].strip(), _fill_in(after, row), _MAX_NEW_TOKENS)
        turn = Turn(question=prompt.question, answers=(row["answer"],), max_new_tokens=_MAX_NEW_TOKENS)
        notes = {"tokens_cut": prompt.tokens_cut, "tokens_kept": prompt.tokens_kept, "template": origin}
        notes |= {field: row[field] for field in _CATEGORIES}
        samples.append(Sample(id=str(row["_id"]), context=prompt.context, turns=(turn,), notes=notes))
    return samples


def _score(prediction: str, turn: Turn) -> float:
    """Return 100 for the right choice, 0 for another or none."""
    return 100.0 if choice(prediction) in turn.answers else 0.0


TASKS = (
    Task(
        name="longbench_v2",
        group="longbench_v2",
        version=2,
        source="THUDM/LongBench v2; the template is the user's file, or ours",
        metric="accuracy",
        samples=_samples,
        score=_score,
        sized=False,
        chat=True,
    ),
)
