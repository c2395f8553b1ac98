"""Samples, prepared once and kept: every method is asked the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..records import DataDict, digest, set_aside, write_atomically
from ..tasks.base import Preparation, Sample, Task, Turn

FOLDER = "data"  # inside the folder of the results


class Prepared(NamedTuple):
    """The samples of a task, and where they come from."""

    samples: list[Sample]
    data: DataDict


def prepare(results: Path, task: Task, preparation: Preparation) -> Prepared:
    """Return a task's samples: from the file that an earlier cell has prepared, or made now and written there.

    The file is JSON, a line a sample, under the hash of those lines. One that is damaged is set aside and made anew.

    Args:
        results: the folder of the results.
        task: what to make.
        preparation: for which model, length, number and seed.

    Raises:
        ValueError: there are no samples.
    """
    path = results / FOLDER / f"{task.name}-{_key(task, preparation)}.jsonl"
    text = _read(path)
    if text is None:
        samples = task.samples(preparation)
        if not samples:
            raise ValueError(f"task {task.name!r} has no samples for length {preparation.length}")
        body = "".join(json.dumps(asdict(plain(sample)), ensure_ascii=False) + "\n" for sample in samples)
        text = f"{digest(body)}\n{body}"
        write_atomically(path, text)
    checksum, _, body = text.partition("\n")
    # Not `splitlines`: it also splits at characters that JSON leaves inside a text, such as U+2028.
    samples = [_sample(json.loads(line)) for line in body.split("\n")[:-1]]
    return Prepared(list(samples), {"sha256": checksum, "source": task.source})


def plain(sample: Sample) -> Sample:
    """Return a sample whose mappings are dicts, which `asdict` can copy."""
    turns = tuple(
        Turn(
            question=turn.question,
            answers=tuple(turn.answers),
            max_new_tokens=turn.max_new_tokens,
            answer_prefix=turn.answer_prefix,
            extra=dict(turn.extra),
        )
        for turn in sample.turns
    )
    return Sample(id=sample.id, context=sample.context, turns=turns, notes=dict(sample.notes))


def _sample(found: dict[str, Any]) -> Sample:
    turns = tuple(Turn(**turn | {"answers": tuple(turn["answers"])}) for turn in found["turns"])
    return Sample(**found | {"turns": turns})


def _read(path: Path) -> str | None:
    """Return a prepared file's text, or None where there is none that is whole."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
        checksum, _, body = text.partition("\n")
        if checksum == digest(body):
            return text
        set_aside(path)
    except FileNotFoundError:
        pass  # none yet, or another process has set it aside
    return None


def _key(task: Task, given: Preparation) -> str:
    return digest(
        {
            "task": task.name,
            "version": task.version,
            "length": given.length,
            "count": given.count,
            "seed": given.seed,
            "chat": given.chat,
            "max_length": given.max_length,
            "data_dir": None if given.data_dir is None else _files(given.data_dir),
            "tokenizer": tokenizer_hash(given.tokenizer),
        }
    )[:16]


def _files(folder: Path) -> list[Sequence[Any]]:
    """Return name, size and time of change of every file in a folder: samples are made anew when one changes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer makes of text: its vocabulary and its chat template."""
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return digest([type(tokenizer).__name__, vocabulary, tokenizer.chat_template])
