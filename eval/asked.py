"""The cells that runs were asked for, so that a report can name those without a record."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from .records import CellDict, canonical, cell_key, digest, record_path, write_atomically

FOLDER = "asked"  # inside the folder of the results


def write_asked(results: Path, cells: Sequence[CellDict]) -> None:
    """Write the cells that a run is asked for."""
    path = results / FOLDER / f"{digest(sorted(map(cell_key, cells)))[:16]}.json"
    if not path.exists():
        write_atomically(path, canonical(list(cells)))


def unrecorded(results: Path) -> list[CellDict]:
    """Return the cells that runs were asked for and that have no record; unreadable files are left out."""
    found: dict[str, CellDict] = {}
    for path in sorted((results / FOLDER).glob("*.json")):
        with contextlib.suppress(ValueError):
            found |= {cell_key(cell): cell for cell in json.loads(path.read_text(encoding="utf-8"))}
    return [cell for cell in found.values() if not record_path(results, cell).exists()]
