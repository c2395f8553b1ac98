"""Results of unfinished work, a line each, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import quarantine


class Journal:
    """Lines of JSON by key, appended one at a time; reading drops a line that a kill has truncated.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, Any] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # or the next line would be joined to the truncated one
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.split(b"\n")[:-1]:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):  # damaged on the disk, as by a power failure
                quarantine(path)
                for item in self._results.items():
                    self._append(*item)
                return
            self._results[key] = value

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Return the results of a file up to its first truncated or damaged line, and leave the file as it is."""
        results: dict[str, Any] = {}
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return results
        for line in lines:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                break
            results[key] = value
        return results

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any:
        """Return the result under a key, or None."""
        return self._results.get(key)

    def put(self, key: str, value: Any) -> None:
        """Append a result and flush it to the disk."""
        self._append(key, value)
        self._results[key] = value

    def result(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the result under a key; where there is none, make and append it."""
        if key not in self._results:
            self.put(key, make())
        return self._results[key]

    def _append(self, key: str, value: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps([key, value], ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
