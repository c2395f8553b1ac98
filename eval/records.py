"""The record of one cell of an evaluation: a JSON file, whole or absent.

A cell is one task at one length, by one method at one budget. Its record holds the scores, every answer, the costs and
the provenance. A record is written to a temporary file and renamed, carries a checksum, and is quarantined where it is
damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

SCHEMA = 3
CELLS = "cells"  # folder of the records, inside the folder of the results


class CellDict(TypedDict):
    """The settings of a cell; its key is their hash."""

    task: str
    task_version: int
    method: str
    token_budget: int | None  # tokens; None: `full`
    length: int | None  # tokens of prompt and answer; None: the data's own
    mode: Literal["aware", "agnostic"]  # whether a method sees the question before it compresses the context
    chat: bool
    samples: int
    max_new_tokens: int | None  # None: the task's own
    seed: int
    model: str
    revision: str | None  # asked for on the hub
    dtype: str
    attention: str  # of transformers, as the model runs it
    chat_arguments: dict[str, Any]  # variables of the chat template
    thinking_tokens: int  # that a model may generate before each answer, in addition to it
    sampling: dict[str, Any]  # settings of the model's card; empty: greedy
    answers: int  # sampled to each question; their mean is the sample's score
    batch_size: int | str  # sequences at a time: 1 but for `latency`; `max`: as many as fit
    weights: str  # the model's commit on the hub, or a digest of its weights
    library: str  # version of rocketkv
    settings: dict[str, Any]  # further fields of RocketKVConfig, and of the task


class CostDict(TypedDict, total=False):
    """Seconds and bytes of one generation, or of several together; None where they could not be measured.

    Times to the first token and peaks of memory come from the task `latency` alone: in others, methods share a prefill.
    """

    prompt_tokens: float
    new_tokens: float
    first_token_seconds: float  # prefill, stage 1 included
    compression_seconds: float | None  # stage 1 alone
    step_seconds: float  # median of the decoded tokens after the first
    step_seconds_p95: float
    tokens_per_second: float  # of all sequences, by the median step; of `latency` alone
    batch_size: float  # sequences; likewise
    kv_bytes: float  # keys, values, index and all other tensors of the cache, at the end
    index_bytes: float
    full_kv_bytes: float  # of a full cache
    step_bytes: float  # read by one decode step
    dense_step_bytes: float  # read by one decode step over a full cache
    nominal_step_bytes: float  # read per step, counted in 16 bits
    nominal_dense_step_bytes: float
    peak_prefill_bytes: float | None  # of the process (CPU) or of the device's allocator
    peak_decode_bytes: float | None


class _TurnDict(TypedDict):
    prediction: str
    answers: list[str]
    score: float


class TurnDict(_TurnDict, total=False):
    """One answer; the optional fields are of answers that this harness generated."""

    new_tokens: int  # thinking included
    cut: bool  # whether a limit ended the answer, not the model
    kv_bytes: list[list[int]]  # of the cache, as pairs of new tokens and bytes


class SampleDict(TypedDict):
    """One sample's answers."""

    id: str
    prompt_sha256: str
    score: float  # the mean of its turns', and of several answers to each
    turns: list[TurnDict]
    cost: CostDict
    notes: dict[str, Any]


class DataDict(TypedDict):
    """Where the samples come from."""

    sha256: str  # of the prepared file
    source: str


class ProvenanceDict(TypedDict):
    """Code, time and hardware of the run."""

    created: str  # ISO 8601, UTC
    rocketkv: str
    git_hash: str | None
    versions: dict[str, str]  # python, torch, transformers, lm_eval, ...
    hardware: dict[str, Any]  # processor, cores, threads, device, memory


class Record(TypedDict):
    """The result of one cell."""

    schema: int
    key: str
    cell: CellDict
    status: Literal["complete", "out_of_memory", "failed"]  # the last two have the samples before the error
    message: str  # of the error, where it failed its traceback; or empty
    metric: str
    higher_is_better: bool
    score: float | None  # mean over samples, 0 to 100 (other metrics: their own unit)
    interval: list[float] | None  # [low, high], 95 %, of the score
    values: dict[str, float | None]  # further figures, such as `perplexity`
    samples: list[SampleDict]
    cost: CostDict
    data: DataDict
    details: dict[str, Any]  # further facts of JSON's types, such as what `latency` ran on
    provenance: ProvenanceDict
    checksum: str  # of all other fields


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of a value, for hashes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, or of a text's UTF-8."""
    return hashlib.sha256(value.encode() if isinstance(value, str) else canonical(value)).hexdigest()


def cell_key(cell: CellDict) -> str:
    """Return a cell's key: 16 hexadecimal digits."""
    return digest(cell)[:16]


def record_path(results: Path, cell: CellDict) -> Path:
    """Return the path of a cell's record: a readable name and the key."""
    budget = "" if cell["token_budget"] is None else f"-{cell['token_budget']}"
    length = "" if cell["length"] is None else f"-{cell['length']}"
    name = f"{cell['task']}{length}-{cell['method']}{budget}-{cell['mode']}-{cell_key(cell)}"
    return results / CELLS / f"{''.join(c if c.isalnum() or c in '-_.+' else '_' for c in name)}.json"


def write_record(path: Path, record: Record) -> None:
    """Write a record with its checksum, atomically."""
    sealed = cast(dict[str, Any], record) | {"checksum": ""}
    sealed["checksum"] = digest(sealed)
    write_atomically(path, json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8) so that it exists whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is truncated, damaged, or not a record of this schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = digest(record | {"checksum": ""}) if isinstance(record, dict) else ""
    except ValueError as error:  # no JSON, no UTF-8, or NaN
        raise ValueError(f"{path.name} is not a whole record: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is not a record of schema {SCHEMA}")
    if record.get("checksum") != checksum:
        raise ValueError(f"{path.name} does not match its checksum: it was damaged or edited")
    if record["key"] != cell_key(record["cell"]):
        raise ValueError(f"{path.name} has another cell's key")
    return cast(Record, record)


def quarantine(path: Path) -> Path:
    """Rename a damaged file, so that it is made again and nothing is lost; return its new path."""
    number = 1
    while (renamed := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.replace(renamed)
    return renamed


def finished(path: Path) -> Record | None:
    """Return the record at a path, or None where there is none; quarantine a damaged one."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return None
    except ValueError:
        with contextlib.suppress(FileNotFoundError):  # another process has quarantined it
            quarantine(path)
        return None


def records(results: Path) -> Iterator[Record]:
    """Yield every record of a folder of results, ordered by name.

    Raises:
        ValueError: a record is damaged.
    """
    for path in sorted((results / CELLS).glob("*.json")):
        yield read_record(path)


def label(cell: Mapping[str, Any]) -> str:
    """Return method and budget of a cell for tables, such as `rocketkv 512`."""
    budget = cell["token_budget"]
    return str(cell["method"]) if budget is None else f"{cell['method']} {budget}"
