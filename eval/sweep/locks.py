"""Locks of files among the processes of a sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a file that may not exist yet; yields whether this process has the lock.

    The lock is a file beside it. The end of a process releases it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_path(path), blocking=False)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        yield False
        return
    with held:
        yield True


def lock_path(path: Path) -> Path:
    """Return the path of a file's lock."""
    return path.with_suffix(".lock")
