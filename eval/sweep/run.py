"""Run the cells of a sweep: each once, whoever else runs cells of the same folder, and from where a kill left off."""

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
from .cells import Bench, journal_path, prepare_cell, run_cell


@dataclass
class Counts:
    """What became of the cells of a run."""

    done_before: int = 0
    done: int = 0
    out_of_memory: int = 0
    elsewhere: int = 0  # another process runs them, or another environment must

    def __str__(self) -> str:
        parts = [f"{self.done} cells done", f"{self.done_before} were before"]
        if self.out_of_memory:
            parts.append(f"{self.out_of_memory} out of memory")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} left to another process")
        return ", ".join(parts)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a cell for this process: False inside the block where another one holds it.

    The hold ends with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_suffix(".lock"), blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def run_cells(bench: Bench, cells: Sequence[CellDict]) -> Counts:
    """Run every cell that has no record yet and that no other process holds.

    Args:
        bench: what they run on.
        cells: of one model, presses of kvpress only where that is installed.

    Raises:
        ValueError: a cell cannot run (see `run_cell`); those before it have their records.
    """
    counts = Counts()
    prepared = set()
    for cell in cells:  # what is missing is said before hours of work, not after
        samples = (cell["task"], cell["length"], cell["chat"])
        if samples not in prepared and not record_path(bench.results, cell).exists():
            prepare_cell(bench, cell)
            prepared.add(samples)
    with Progress("beginning", total=len(cells)) as progress:
        for cell in cells:
            path = record_path(bench.results, cell)
            progress.say(f"{cell['task']} {cell['length'] or ''} {label(cell)}")
            with claimed(path) as mine:  # also to look: what is damaged is for its holder alone to set aside
                _run_one(bench, cell, path, counts, mine)
            progress.step()
    return counts


def _run_one(bench: Bench, cell: CellDict, path: Path, counts: Counts, mine: bool) -> None:
    if not mine:
        counts.elsewhere += 1
        return
    found = finished(path)
    if found is not None and not (bench.retry_out_of_memory and found["status"] == "out_of_memory"):
        Journal(journal_path(bench.results, cell)).remove()  # of a process that ended between its record and this
        counts.done_before += 1
        return
    start = time.monotonic()
    record = run_cell(bench, cell)
    write_record(path, record)
    Journal(journal_path(bench.results, cell)).remove()
    if record["status"] == "complete":
        counts.done += 1
    else:
        counts.out_of_memory += 1
    sys.stderr.write(f"{_line(record)} ({time.monotonic() - start:.0f} s)\n")


def _line(record: Record) -> str:
    """Return what is said of a cell when it is done."""
    cell = record["cell"]
    length = "" if cell["length"] is None else f" {cell['length']}"
    score = "out of memory" if record["score"] is None else f"{record['metric']} {record['score']:.4g}"
    return f"{cell['task']}{length} {label(cell)}: {score}"


def run_presses(python: str, arguments: Sequence[str]) -> int:
    """Run the cells of kvpress's presses by another environment's Python, on the same folder; return its exit code.

    Args:
        python: the interpreter, in whose environment rocketkv[eval] and kvpress are installed.
        arguments: those of `rocketkv`, which leave all other methods to this process.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([python, "-m", "rocketkv.cli.main", *arguments], env=environment, check=False).returncode


def is_press(cell: CellDict) -> bool:
    """Whether a cell's method is a press of kvpress."""
    return cell["method"].startswith(KVPRESS)


def merge(sources: Sequence[Path], target: Path) -> int:
    """Bring the records of several folders together; return how many the target has gained.

    A cell that two folders have finished is kept once, if both say the same of it.

    Args:
        sources: folders of results.
        target: a folder of results, made where there is none.

    Raises:
        ValueError: a record is damaged, or two records of one cell have different scores or prompts.
    """
    gained = 0
    for source in sources:
        if not (source / CELLS).is_dir():
            raise ValueError(f"{source} is no folder of results: it has no folder cells")
        for path in sorted((source / CELLS).glob("*.json")):
            gained += _take(path, target)
    return gained


def _take(path: Path, target: Path) -> bool:
    record = read_record(path)
    place = record_path(target, record["cell"])
    there = finished(place)
    if there is None or (there["status"] != "complete" and record["status"] == "complete"):
        write_record(place, record)
        return True
    if record["status"] == "complete" and substance(there) != substance(record):
        raise ValueError(f"two records of the cell {place.stem} differ in what was asked or scored; remove one of them")
    return False


def substance(record: Record) -> list[object]:
    """Return what a record says but for times, bytes, and who made it when."""
    samples = [
        [sample["id"], sample["prompt_sha256"], sample["score"], [turn["prediction"] for turn in sample["turns"]]]
        for sample in record["samples"]
    ]
    score = record["score"] if record["samples"] else None
    return [record["status"], record["metric"], score, samples, record["data"]]
