"""Samples of a task, prepared once and stored, so that every method gets the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..records import DataDict, digest, quarantine, write_atomically
from ..tasks.base import Preparation, Sample, Task, Turn

FOLDER = "data"  # inside the folder of the results


class Prepared(NamedTuple):
    """The samples of a task and their source."""

    samples: list[Sample]
    data: DataDict


def prepare(results: Path, task: Task, preparation: Preparation) -> Prepared:
    """Return a task's samples, read from the file of an earlier cell or made now and written.

    The file has a line of JSON a sample, after the hash of those lines. A damaged file is quarantined and made again.

    Args:
        results: the folder of the results.
        task: makes the samples.
        preparation: model, length, number and seed.

    Raises:
        ValueError: there are no samples.
    """
    path = results / FOLDER / f"{task.name}-{_key(task, preparation)}.jsonl"
    text = _read(path)
    if text is None:
        samples = task.samples(preparation)
        if not samples:
            raise ValueError(f"task {task.name!r} has no samples for length {preparation.length}")
        body = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        text = f"{digest(body)}\n{body}"
        write_atomically(path, text)
    checksum, _, body = text.partition("\n")
    # Not `splitlines`: it also splits at characters that JSON leaves inside a text, such as U+2028.
    samples = [_sample(json.loads(line)) for line in body.split("\n")[:-1]]
    return Prepared(samples, {"sha256": checksum, "source": task.source})


def _sample(fields: dict[str, Any]) -> Sample:
    turns = tuple(Turn(**turn | {"answers": tuple(turn["answers"])}) for turn in fields["turns"])
    return Sample(**fields | {"turns": turns})


def _read(path: Path) -> str | None:
    """Return a prepared file's text, or None where it is missing or damaged."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
        checksum, _, body = text.partition("\n")
        if checksum == digest(body):
            return text
        quarantine(path)
    except FileNotFoundError:
        pass  # none yet, or another process has quarantined it
    return None


def _key(task: Task, preparation: Preparation) -> str:
    return digest(
        {
            "task": task.name,
            "version": task.version,
            "length": preparation.length,
            "count": preparation.count,
            "seed": preparation.seed,
            "chat": preparation.chat,
            "chat_options": [dict(preparation.chat_options.arguments), preparation.chat_options.thinking],
            "max_length": preparation.max_length,
            "data_dir": None if preparation.data_dir is None else _files(preparation.data_dir),
            "tokenizer": tokenizer_hash(preparation.tokenizer),
        }
    )[:16]


def _files(folder: Path) -> list[Sequence[Any]]:
    """Return name, size and modification time of every file in a folder, on which its samples depend."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's class, vocabulary and chat template."""
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return digest([type(tokenizer).__name__, vocabulary, tokenizer.chat_template])
