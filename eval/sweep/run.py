"""Run the cells of a sweep: each once, also with several processes on one folder, and resuming after a kill."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..journal import Journal
from ..methods import KVPRESS
from ..progress import Progress
from ..records import CELLS, CellDict, Record, finished, label, read_record, record_path, write_record
from .cells import Session, journal_path, prepare_cell, run_cell


@dataclass
class Counts:
    """Number of cells of a run by outcome."""

    done_before: int = 0
    done: int = 0
    out_of_memory: int = 0
    locked: int = 0  # by another process

    def __str__(self) -> str:
        parts = [f"{self.done} cells done", f"{self.done_before} were before"]
        if self.out_of_memory:
            parts.append(f"{self.out_of_memory} out of memory")
        if self.locked:
            parts.append(f"{self.locked} locked by another process")
        return ", ".join(parts)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a cell's record; yields whether this process has the lock, which the end of a process releases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_suffix(".lock"), blocking=False)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        yield False
        return
    with held:
        yield True


def run_cells(session: Session, cells: Sequence[CellDict]) -> Counts:
    """Run every cell that has no record and that no other process has locked.

    Args:
        session: the model and the folders.
        cells: of one model; presses of kvpress only where that is installed.

    Raises:
        ValueError: a cell cannot run (see `run_cell`); the records of earlier cells stay.
    """
    counts = Counts()
    prepared = set()
    for cell in cells:  # missing data must show before hours of work, not after
        samples = (cell["task"], cell["length"], cell["chat"])
        if samples not in prepared and not record_path(session.results, cell).exists():
            prepare_cell(session, cell)
            prepared.add(samples)
    with Progress("beginning", total=len(cells)) as progress:
        for cell in cells:
            path = record_path(session.results, cell)
            progress.say(f"{cell['task']} {cell['length'] or ''} {label(cell)}")
            with try_lock(path) as locked:  # before a look: only the holder may quarantine a damaged record
                if locked:
                    _run_one(session, cell, path, counts)
                else:
                    counts.locked += 1
            progress.step()
    return counts


def _run_one(session: Session, cell: CellDict, path: Path, counts: Counts) -> None:
    earlier = finished(path)
    if earlier is not None and not (session.retry_out_of_memory and earlier["status"] == "out_of_memory"):
        Journal(journal_path(session.results, cell)).remove()  # of a process that ended between its record and this
        counts.done_before += 1
        return
    start = time.monotonic()
    record = run_cell(session, cell)
    write_record(path, record)
    Journal(journal_path(session.results, cell)).remove()
    if record["status"] == "complete":
        counts.done += 1
    else:
        counts.out_of_memory += 1
    sys.stderr.write(f"{_line(record)} ({time.monotonic() - start:.0f} s)\n")


def _line(record: Record) -> str:
    """Return the line that reports a finished cell."""
    cell = record["cell"]
    length = "" if cell["length"] is None else f" {cell['length']}"
    score = "out of memory" if record["score"] is None else f"{record['metric']} {record['score']:.4g}"
    return f"{cell['task']}{length} {label(cell)}: {score}"


def run_presses(python: str, arguments: Sequence[str]) -> int:
    """Run the cells of kvpress's presses in another environment, on the same folder; return the exit code.

    Args:
        python: the interpreter, in whose environment rocketkv[eval] and kvpress are installed.
        arguments: of `rocketkv`, restricted to presses.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([python, "-m", "rocketkv.cli.main", *arguments], env=environment, check=False).returncode


def is_press(cell: CellDict) -> bool:
    """Whether a cell's method is a press of kvpress."""
    return cell["method"].startswith(KVPRESS)


def merge(sources: Sequence[Path], target: Path) -> int:
    """Merge the records of several folders; return the number that the target gained.

    A cell with equal records in two folders is kept once.

    Args:
        sources: folders of results.
        target: a folder of results, which need not exist.

    Raises:
        ValueError: a record is damaged, or two records of one cell have different scores or prompts.
    """
    gained = 0
    for source in sources:
        if not (source / CELLS).is_dir():
            raise ValueError(f"{source} is no folder of results: it has no folder cells")
        for path in sorted((source / CELLS).glob("*.json")):
            gained += _merge_record(path, target)
    return gained


def _merge_record(path: Path, target: Path) -> bool:
    """Add a record to a folder unless its cell has one; return whether it was added."""
    record = read_record(path)
    place = record_path(target, record["cell"])
    present = finished(place)
    if present is None or (present["status"] != "complete" and record["status"] == "complete"):
        write_record(place, record)
        return True
    if record["status"] == "complete" and substance(present) != substance(record):
        raise ValueError(f"two records of the cell {place.stem} differ in what was asked or scored; remove one of them")
    return False


def substance(record: Record) -> list[object]:
    """Return the fields of a record that a repetition must reproduce: not times, bytes and provenance."""
    samples = [
        [sample["id"], sample["prompt_sha256"], sample["score"], [turn["prediction"] for turn in sample["turns"]]]
        for sample in record["samples"]
    ]
    score = record["score"] if record["samples"] else None
    return [record["status"], record["metric"], score, samples, record["data"]]
