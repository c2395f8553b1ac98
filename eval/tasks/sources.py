"""Where benchmarks' templates and data come from: `templates.json`, the user's folder, or the Hugging Face hub."""

from __future__ import annotations

import functools
import io
import json
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..optional import optional

T = TypeVar("T")


@functools.cache
def templates(benchmark: str) -> Mapping[str, Any]:
    """Return a benchmark's part of `templates.json`; the file NOTICE names sources and licences."""
    content: dict[str, Mapping[str, Any]] = read_json(Path(__file__).with_name("templates.json"))
    return content[benchmark]


def data_file(data_dir: Path, *candidates: str) -> Path:
    """Return the first of several files that exists in the user's folder.

    Args:
        data_dir: the folder.
        candidates: paths inside it, in order of preference.

    Raises:
        FileNotFoundError: the folder does not exist, or has none of them.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data-dir must name a folder that exists, got {data_dir}")
    for candidate in candidates:
        if (data_dir / candidate).is_file():
            return data_dir / candidate
    raise FileNotFoundError(f"--data-dir {data_dir} must hold {' or '.join(candidates)}; put the file there")


def hub_file(repo_id: str, filename: str, *, save_as: str | None = None) -> Path:
    """Return a file of a data set on the Hugging Face hub, downloaded once into the hub's cache.

    Args:
        repo_id: the data set, such as `zai-org/LongBench`.
        filename: path inside it.
        save_as: name under which the user's folder may hold it, where that differs.

    Raises:
        OSError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset"))
    except OSError as error:  # base of every error of the hub, a missing network included
        named = "" if save_as is None else f" as {save_as}"
        raise OSError(
            f"{filename} of the data set {repo_id} could not be downloaded ({type(error).__name__}). Without a network,"
            f" download https://huggingface.co/datasets/{repo_id}/resolve/main/{filename} elsewhere, put it into a"
            f" folder{named} and name that with --data-dir"
        ) from error


def read_jsonl(path: Path, member: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object per line; blank lines are skipped.

    Args:
        path: the file, or a zip archive that contains it.
        member: its name inside the archive; None where `path` is the file itself.

    Raises:
        ValueError: a line is no JSON object, or the archive is damaged or has no such member.
    """
    with _open(path, member) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {member or path.name}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")
            yield row


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: it is not a whole Parquet file.
    """
    parquet = optional("pyarrow.parquet")  # which datasets needs
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except optional("pyarrow").ArrowInvalid as error:
        raise ValueError(f"{path.name} is not a whole Parquet file ({error}); download it again") from error
    return rows


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def seeded_rows(rows: Iterable[T], name: str, seed: int, count: int) -> list[tuple[int, T]]:
    """Return a random sample of a benchmark's rows with their numbers from 0, in the order of the data.

    Args:
        rows: all of them.
        name: of the task.
        seed: of the sample; a larger one of the same seed contains it.
        count: number of rows; all where there are fewer.
    """
    numbered = list(enumerate(rows))
    chosen = random.Random(f"{name} {seed}").sample(numbered, len(numbered))[:count]
    return sorted(chosen, key=lambda pair: pair[0])


def check_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    """Check that a row of data has the required fields.

    Raises:
        ValueError: some are missing.
    """
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(
            f"{where} must have the fields {', '.join(fields)}; {', '.join(missing)} missing: take the official file"
        )


def _open(path: Path, member: str | None) -> TextIO:
    """Open a text file, or one inside a zip archive; the caller closes it."""
    if member is None:
        return path.open(encoding="utf-8")
    try:
        with zipfile.ZipFile(path) as archive:
            # zipfile keeps the archive open until its last member is closed.
            return io.TextIOWrapper(archive.open(member), encoding="utf-8")
    except KeyError:
        raise ValueError(f"{path} must hold {member}, and does not; download the archive again") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip archive ({error}); download it again") from error
