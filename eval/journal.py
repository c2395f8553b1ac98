"""The answers of a cell that is not finished yet, a line each, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .records import set_aside


class Journal:
    """Lines of JSON by key, appended as they come; what a kill has cut short is dropped when it is read.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the next line must not be joined to half a one
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.split(b"\n")[:-1]:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):  # not what was written: what a disk made of it when the power failed
                set_aside(path)
                for good in self._found.items():
                    self._write(*good)
                return
            self._found[key] = value

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Any:
        """Return what was written under a key, or None."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a line, and bring it to the disk."""
        self._write(key, value)
        self._found[key] = value

    def _write(self, key: str, value: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps([key, value], ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, its cell being finished."""
        self._path.unlink(missing_ok=True)
