"""Read a folder of results for its report: whole records, and what is damaged or missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..asked import unrecorded
from ..records import CELLS, CellDict, Record, read_record


@dataclass(frozen=True, kw_only=True)
class Results:
    """A folder of results.

    Attributes:
        records: those that are whole, ordered by name.
        damaged: the error of each record that is not, by the name of its file.
        quarantined: names of damaged files that a run has put aside.
        unrecorded: cells that a run was asked for and that have no record.
    """

    records: tuple[Record, ...]
    damaged: dict[str, str]
    quarantined: tuple[str, ...]
    unrecorded: tuple[CellDict, ...]


def load(results: Path) -> Results:
    """Read a folder of results.

    Raises:
        ValueError: it has no whole record.
    """
    found = {path.name: _read(path) for path in sorted((results / CELLS).glob("*.json"))}
    records = tuple(record for record in found.values() if not isinstance(record, str))
    damaged = {name: error for name, error in found.items() if isinstance(error, str)}
    if not records:
        broken = f"; damaged: {', '.join(damaged)}" if damaged else ""
        raise ValueError(f"results must be a folder with records, found none below {results / CELLS}{broken}")
    return Results(
        records=records,
        damaged=damaged,
        quarantined=tuple(sorted(path.name for path in results.rglob("*.damaged-*"))),
        unrecorded=tuple(unrecorded(results)),
    )


def _read(path: Path) -> Record | str:
    """Return a record, or what is wrong with it."""
    try:
        return read_record(path)
    except ValueError as error:
        return str(error)
