"""Cells that ended without a result, and the messages of their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Record
from .arms import MODES, arms_of, length_text, with_metrics

MOST = 20  # different messages that a report shows
_MOST_CHARACTERS = 2000  # of a message: its end, where a traceback names the error
_STATUS = {"out_of_memory": "OOM", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error, and the cells that it ended.

    Attributes:
        status: `OOM` or `failed`.
        summary: the last line of its message.
        message: the message, or of a long one the end; the traceback of a failed cell.
        cells: task, arm, length and mode of each cell, with the number of samples that it had finished.
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
        text = f"{cell['task']}, {arm.name}, {length_text(cell['length'])}, {MODES[cell['mode']]}"
        text += f" ({done} of {cell['samples']} samples done)" if done else ""
        found.setdefault((_STATUS[record["status"]], record["message"].strip()), []).append(text)
    result = []
    for (status, message), cells in sorted(found.items(), key=lambda item: -len(item[1])):
        lines = message.splitlines() or ["no message"]
        cut = message if len(message) <= _MOST_CHARACTERS else f"…{message[-_MOST_CHARACTERS:]}"
        result.append(Failure(status=status, summary=lines[-1][:300], message=cut, cells=tuple(cells)))
    return result
