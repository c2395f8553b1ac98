"""Cells of a group: they share their samples, so that every prompt is read once for all their methods.

The answers to a sample wait in a file of their own, which a process locks while it answers. So several processes work
on one group, each at another sample, and a run that was killed loses one answer at most. When every sample is answered,
the cells become records.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..journal import Journal
from ..measures.memory import is_out_of_memory
from ..methods import Method
from ..prefill import Prefills, shares_prefill
from ..records import CellDict, cell_key, digest
from .cells import Session
from .locks import lock_path, try_lock
from .plan import shared_fields
from .together import answer_together
from .work import Work

FOLDER = "answers"  # inside the folder of the results


class Unit:
    """The answers to one sample, of all cells of a group, in a file.

    Args:
        session: the model and the folders.
        cell: any of the group.
        number: of the sample.
        name: of the sample, different where its content is.
    """

    def __init__(self, session: Session, cell: CellDict, number: int, name: str) -> None:
        self.number, self._name = number, name
        self.path = group_folder(session.results, cell) / f"{number:05d}.journal"

    def key(self, cell: CellDict) -> str:
        """Return the key of a cell's answers."""
        return f"{cell_key(cell)} {self._name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[Journal | None]:
        """Yield the file, locked; None where another process has locked it."""
        with try_lock(self.path) as held:
            yield Journal(self.path) if held else None

    def result(self, cell: CellDict) -> Any:
        """Return a cell's answers, or None."""
        return Journal.read(self.path).get(self.key(cell))


def group_folder(results: Path, cell: CellDict) -> Path:
    """Return the folder of the answers of a cell's group."""
    length = "" if cell["length"] is None else f"-{cell['length']}"
    name = f"{cell['task']}{length}-{cell['mode']}-{digest(shared_fields(cell))[:16]}"
    return results / FOLDER / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def answer(
    session: Session, work: Work, unit: Unit, journal: Journal, cells: Sequence[tuple[CellDict, Method]]
) -> Iterator[tuple[CellDict, Exception]]:
    """Answer one sample by several cells, where the file has no answers yet; yield those that an error ends.

    Methods that prefill densely start from one prefill. Where memory runs out beside it, they read the prompt alone.
    """
    missing = [(cell, method) for cell, method in cells if journal.get(unit.key(cell)) is None]
    readers = work.references + sum(shares_prefill(method) for _, method in missing)
    prefills, item = Prefills(session.model) if readers > 1 else None, work.item(unit.number)
    for cell, method in missing:
        made, error = attempt(partial(answer_together, session, cell, item, method, prefills))
        if error is not None and prefills is not None and is_out_of_memory(error):
            prefills = made = error = None
            free_memory()
            made, error = attempt(partial(answer_together, session, cell, item, method, None))
        if error is None:
            journal.put(unit.key(cell), made)
        else:
            yield cell, error


def attempt(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what a function returns, or else the error that it raises.

    Raises:
        OSError: the disk is full, which is no failure of a cell.
    """
    try:
        return run(), None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return None, error


def free_memory() -> None:
    """Return the device's unused memory to it, after an error whose traceback has been dropped."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def remove_answers(results: Path, cell: CellDict, complete: Collection[str]) -> None:
    """Remove the files of a group whose answers are all of complete cells.

    Args:
        results: the folder of the results.
        cell: any of the group.
        complete: keys of cells with a complete record.
    """
    folder = group_folder(results, cell)
    for path in {path.with_suffix(".journal") for path in folder.glob("*.[jl]o*")}:
        with try_lock(path) as held:
            if held and all(key.split()[0] in complete for key in Journal.read(path)):
                path.unlink(missing_ok=True)
                lock_path(path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are answers left, or another process has removed it
        folder.rmdir()
