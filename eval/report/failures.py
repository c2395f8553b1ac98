"""Cells that ended without a result, and the messages of their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import CellDict, Record, label
from .arms import MODES, arms_of, length_text, with_metrics
from .load import Results

MOST = 20  # different messages that a report shows
_MOST_CHARACTERS = 2000  # of a message: its end, where a traceback names the error
_AGAIN = "The command that began the sweep continues it: run it again with the same folder."
_STATUS = {"out_of_memory": "OOM", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error, and the cells that it ended.

    Attributes:
        status: `OOM`, `failed`, `damaged` for a record that cannot be read, or `no record`.
        summary: the last line of its message.
        message: the message, or of a long one the end; the traceback of a failed cell.
        cells: task, arm, length and mode of each cell, with the number of samples that it had finished; the names of
            damaged records.
    """

    status: str
    summary: str
    message: str
    cells: tuple[str, ...]


def failures(records: Sequence[Record]) -> list[Failure]:
    """Return the errors of all cells that failed or ran out of memory; equal ones together, most cells first."""
    found: dict[tuple[str, str], list[str]] = {}
    named = with_metrics(records)
    for record, arm in zip(named, arms_of(named), strict=True):
        if record["status"] == "complete":
            continue
        cell, done = record["cell"], len(record["samples"])
        text = _place(cell, arm.name)
        text += f" ({done} of {cell['samples']} samples done)" if done else ""
        found.setdefault((_STATUS[record["status"]], record["message"].strip()), []).append(text)
    result = []
    for (status, message), cells in sorted(found.items(), key=lambda item: -len(item[1])):
        lines = message.splitlines() or ["no message"]
        cut = message if len(message) <= _MOST_CHARACTERS else f"…{message[-_MOST_CHARACTERS:]}"
        result.append(Failure(status=status, summary=lines[-1][:300], message=cut, cells=tuple(cells)))
    return result


def defects(results: Results) -> list[Failure]:
    """Return the damaged records of a folder, and the cells that a run was asked for and that have no record."""
    found = [
        Failure(status="damaged", summary=error, message=_AGAIN, cells=(name,))
        for name, error in results.damaged.items()
    ]
    if results.unrecorded:
        cells = tuple(_place(cell, label(cell)) for cell in results.unrecorded)
        summary = "asked for, but without a record: a run was interrupted, or still runs"
        found.append(Failure(status="no record", summary=summary, message=_AGAIN, cells=cells))
    return found


def _place(cell: CellDict, arm: str) -> str:
    return f"{cell['task']}, {arm}, {length_text(cell['length'])}, {MODES[cell['mode']]}"
