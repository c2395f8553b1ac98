"""Run the cells of a sweep: each once, also with several processes on one folder, and resuming after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..asked import FOLDER as ASKED
from ..asked import write_asked
from ..methods import KVPRESS, Method
from ..progress import Progress
from ..records import (
    CELLS,
    CellDict,
    Record,
    cell_key,
    digest,
    finished,
    label,
    read_record,
    record_path,
    write_atomically,
    write_record,
)
from .cells import Session, is_whole, method_of, record_of, unfinished_record
from .locks import try_lock
from .plan import LM_EVAL, shared_fields
from .together import run_together
from .units import Unit, answer, attempt, free_memory, remove_answers
from .work import Work, work_of


@dataclass
class Counts:
    """Number of cells of a run by outcome."""

    done_before: int = 0
    done: int = 0
    out_of_memory: int = 0
    failed: int = 0
    elsewhere: int = 0  # done by another process meanwhile
    locked: int = 0  # by another process

    def __str__(self) -> str:
        parts = [f"{self.done} cells done", f"{self.done_before} were before"]
        named = {
            "out of memory": self.out_of_memory,
            "failed": self.failed,
            "done by another process": self.elsewhere,
            "locked by another process": self.locked,
        }
        return ", ".join([*parts, *(f"{count} {name}" for name, count in named.items() if count)])


def run_cells(session: Session, cells: Sequence[CellDict]) -> Counts:
    """Run every cell that has no record and that no other process has locked.

    A cell that an error ends has a record that says so, and the others go on.

    Args:
        session: the model and the folders.
        cells: of one model; presses of kvpress only where that is installed.

    Raises:
        ValueError: the samples of a cell cannot be made, or a stock task cannot run; before any cell runs.
        OSError: data cannot be read, or the disk is full.
    """
    counts = Counts()
    groups = grouped(cells)
    for group in groups:  # missing data must show before hours of work, not after
        if not all(record_path(session.results, cell).exists() for cell in group):
            _check(session, group[0])
    if cells:
        write_asked(session.results, cells)
    with Progress("beginning", total=sum(cell["samples"] * cell["answers"] for cell in cells)) as progress:
        for group in groups:
            if is_whole(group[0]):
                _run_whole(session, group[0], counts, progress)
            else:
                _run_group(session, group, counts, progress)
    return counts


def grouped(cells: Sequence[CellDict]) -> list[list[CellDict]]:
    """Return cells by the samples that they share, in order; a cell that runs as a whole is alone."""
    groups: dict[str, list[CellDict]] = {}
    for cell in cells:
        groups.setdefault(cell_key(cell) if is_whole(cell) else digest(shared_fields(cell)), []).append(cell)
    return list(groups.values())


def _check(session: Session, cell: CellDict) -> None:
    """Make a cell's samples where there are none yet, and check that a stock task can run."""
    if cell["task"].startswith(LM_EVAL):
        from ..lm import check_stock_task

        check_stock_task(cell["task"].removeprefix(LM_EVAL))
    elif not is_whole(cell):
        work_of(session, cell)


def _settled(session: Session, cell: CellDict, counts: Counts) -> bool:
    """Whether a cell is not to run: it has a record, or another process writes it. Failed ones run again."""
    path = record_path(session.results, cell)
    with try_lock(path) as locked:  # before a look: only the holder may quarantine a damaged record
        if not locked:
            counts.locked += 1
            return True
        earlier = finished(path)
        if earlier is None:
            return False
        again = earlier["status"] == "failed" or (earlier["status"] == "out_of_memory" and session.retry_out_of_memory)
        if again:
            path.unlink()
            return False
        counts.done_before += 1
        return True


def _run_whole(session: Session, cell: CellDict, counts: Counts, progress: Progress) -> None:
    """Run a cell that runs as a whole, which other processes leave to this one."""
    path = record_path(session.results, cell)
    progress.say(f"{cell['task']} {cell['length'] or ''} {label(cell)}")
    if not _settled(session, cell, counts):
        with try_lock(path) as locked:
            if not locked:
                counts.locked += 1
            elif finished(path) is not None:
                counts.elsewhere += 1
            else:
                start = time.monotonic()
                record, error = attempt(partial(run_together, session, cell))
                _finish(path, record if error is None else unfinished_record(session, cell, error), counts, start)
                record = error = None
                free_memory()
    progress.update(cell["samples"])


def _run_group(session: Session, group: Sequence[CellDict], counts: Counts, progress: Progress) -> None:
    """Answer every sample of a group by all its cells, sample by sample, and write their records."""
    start = time.monotonic()
    running = [cell for cell in group if not _settled(session, cell, counts)]
    progress.update(sum(cell["samples"] * cell["answers"] for cell in group if cell not in running))
    if running:
        work = work_of(session, running[0])
        units = [Unit(session, running[0], number, name) for number, name in enumerate(work.names)]
        pending: dict[str, tuple[CellDict, Method]] = {}
        for cell in running:
            method, error = attempt(partial(method_of, session, cell))
            if error is None:
                pending[cell_key(cell)] = cell, method
            else:
                _end(session, cell, unfinished_record(session, cell, error), counts, start)
        _answer_all(session, work, units, pending, counts, progress)
        for cell, _ in pending.values():
            results = [unit.result(cell) for unit in units]
            if None not in results:
                _end(session, cell, record_of(session, cell, work.outcome(results)), counts, start)
            elif record_path(session.results, cell).exists():  # a failure of another process
                counts.elsewhere += 1
            else:
                counts.locked += 1
    remove_answers(session.results, group[0], {cell_key(cell) for cell in group if _is_complete(session, cell)})


def _is_complete(session: Session, cell: CellDict) -> bool:
    """Whether a cell has a record of all its samples."""
    try:
        return read_record(record_path(session.results, cell))["status"] == "complete"
    except (FileNotFoundError, ValueError):
        return False


def _answer_all(
    session: Session,
    work: Work,
    units: Sequence[Unit],
    pending: dict[str, tuple[CellDict, Method]],
    counts: Counts,
    progress: Progress,
) -> None:
    """Answer every sample that no other process answers; a cell that an error ends leaves `pending`.

    The samples that others have locked are tried again as long as there is other work.
    """
    start = time.monotonic()
    task = next((f"{cell['task']} {cell['length'] or ''}" for cell, _ in pending.values()), "")
    left = list(units)
    while left and pending:
        others = []
        for unit in left:
            with unit.locked() as journal:
                if journal is None:
                    others.append(unit)
                    continue
                for key in [key for key, (cell, _) in pending.items() if record_path(session.results, cell).exists()]:
                    counts.elsewhere += 1
                    del pending[key]
                names = ", ".join(label(cell) for cell, _ in pending.values())
                progress.say(f"{task} sample {work.names[unit.number].split()[-1]}: {names}")
                for cell, error in answer(session, work, unit, journal, list(pending.values())):
                    so_far = work.outcome([each.result(cell) for each in units])
                    record = unfinished_record(session, cell, error, so_far)
                    _end(session, cell, record, counts, start)
                    del pending[cell_key(cell)], error
                    free_memory()
                progress.update(len(pending))
        if len(others) == len(left):
            return
        left = others


def _end(session: Session, cell: CellDict, record: Record, counts: Counts, start: float) -> None:
    """Write the record of a cell, unless another process has."""
    path = record_path(session.results, cell)
    with try_lock(path) as locked:
        if not locked or finished(path) is not None:
            counts.elsewhere += 1
            return
        _finish(path, record, counts, start)


def _finish(path: Path, record: Record, counts: Counts, start: float) -> None:
    """Write a record and report it."""
    write_record(path, record)
    if record["status"] == "complete":
        counts.done += 1
    elif record["status"] == "failed":
        counts.failed += 1
    else:
        counts.out_of_memory += 1
    sys.stderr.write(f"{_line(record)} ({time.monotonic() - start:.0f} s)\n")


def _line(record: Record) -> str:
    """Return the line that reports a finished cell."""
    cell = record["cell"]
    length = "" if cell["length"] is None else f" {cell['length']}"
    if record["status"] == "failed":
        result = f"failed: {record['message'].strip().splitlines()[-1]}"
    elif record["score"] is None:
        result = "out of memory"
    else:
        result = f"{record['metric']} {record['score']:.4g}"
    return f"{cell['task']}{length} {label(cell)}: {result}"


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
        for path in (source / ASKED).glob("*.json"):
            write_atomically(target / ASKED / path.name, path.read_bytes())
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
