"""LongBench v2: 503 questions with four choices on documents of 8K to 2M words, answered in words.

The official definition is followed (THUDM/LongBench, `pred.py`): its data, truncation in the middle, 128 new tokens,
the chat template, and the pattern that finds the choice in an answer. The answer is generated, not chosen by its
likelihood, so that decoding is exercised. Two things differ: officially the answer is sampled at a temperature of 0.1,
and the two halves of a prompt that was cut are decoded as one; here they are decoded apart, as in LongBench v1.

The official template, `prompts/0shot.txt`, is read from the user's folder. Without it the words are ours, and the notes
of each sample say so: such scores are not those of the literature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Preparation, Sample, Task, Turn
from .longbench import fit
from .sources import check_fields, data_file, hub_file, read_json

_REPO = "zai-org/LongBench-v2"  # THUDM/LongBench-v2 before
_MAX_NEW_TOKENS = 128
_OFFICIAL_SHA256 = "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"  # of prompts/0shot.txt
_DOCUMENT = "$DOC$"
_ASKED = {
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}
_SORTED = ("difficulty", "length", "domain", "sub_domain")  # what scores are broken down by
_FIELDS = ("_id", "context", *_ASKED.values(), "answer", *_SORTED)

_OURS = """Here is a long text. A multiple-choice question about it follows.

$DOC$

The text ends here. Question: $Q$

A: $C_A$
B: $C_B$
C: $C_C$
D: $C_D$

Choose the one right answer and reply with this sentence, in which X is its letter: The correct answer is (X)"""


def choice(prediction: str) -> str | None:
    """Return the letter that an answer chooses by the official rule, or None.

    `The correct answer is (B)` is looked for anywhere, then the same without brackets; asterisks do not count.
    """
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found.group(1) if found else None


def _template(data_dir: Path | None) -> tuple[str, str]:
    """Return the template and whose it is: `official`, `user's` or `ours`.

    Raises:
        ValueError: the user's template lacks a placeholder, has one twice, or asks before the document.
    """
    paths = [] if data_dir is None else [data_dir / "0shot.txt", data_dir / "prompts" / "0shot.txt"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return _OURS, "ours"
    template = path.read_text(encoding="utf-8")
    places = [(template.count(mark), template.find(mark)) for mark in (_DOCUMENT, *_ASKED)]
    # Only what lies before the question is compressed where the evaluation is question-agnostic.
    if any(count != 1 for count, _ in places) or min(places, key=lambda place: place[1]) != places[0]:
        raise ValueError(f"{path} must have {_DOCUMENT} once, and {', '.join(_ASKED)} once each behind it; mend it")
    official = hashlib.sha256(template.encode()).hexdigest() == _OFFICIAL_SHA256
    return template, "official" if official else "user's"


def _rows(data_dir: Path | None) -> list[dict[str, Any]]:
    path = hub_file(_REPO, "data.json") if data_dir is None else data_file(data_dir, "data.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a JSON list of objects; take the official file")
    return rows


def _asked(template: str, row: Mapping[str, Any]) -> str:
    # In one pass: a question may itself hold what looks like a placeholder.
    return re.sub("|".join(map(re.escape, _ASKED)), lambda found: str(row[_ASKED[found.group()]]).strip(), template)


def _samples(prepared: Preparation) -> Sequence[Sample]:
    """Make the first `prepared.count` samples, or as many as the data have."""
    rows = _rows(prepared.data_dir)[: prepared.count]
    template, whose = _template(prepared.data_dir)
    before, after = template.split(_DOCUMENT)
    samples = []
    for number, row in enumerate(rows, start=1):
        check_fields(row, _FIELDS, f"row {number} of data.json")
        fitted = fit(prepared, before + row["context"].strip(), _asked(after, row), _MAX_NEW_TOKENS)
        turn = Turn(question=fitted.question, answers=(row["answer"],), max_new_tokens=_MAX_NEW_TOKENS)
        notes = {"tokens_cut": fitted.tokens_cut, "tokens_kept": fitted.tokens_kept, "template": whose}
        notes |= {field: row[field] for field in _SORTED}
        samples.append(Sample(id=str(row["_id"]), context=fitted.context, turns=(turn,), notes=notes))
    return samples


def _score(prediction: str, turn: Turn) -> float:
    """Score an answer: 100 for the right choice, 0 for another or none."""
    return 100.0 if choice(prediction) in turn.answers else 0.0


TASKS = (
    Task(
        name="longbench_v2",
        group="longbench_v2",
        version=1,
        source="THUDM/LongBench v2; the template is the user's file, or ours",
        metric="accuracy",
        samples=_samples,
        score=_score,
        sized=False,
        chat=True,
    ),
)
