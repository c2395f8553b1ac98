"""Progress of long work on stderr: one line on a terminal; elsewhere, as in a log, a new line a minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS = 60.0  # between lines of a log


class Progress(tqdm):  # type: ignore[misc]  # tqdm ships no types
    """A progress bar that disappears at the end.

    Args:
        text: the current step.
        total: number of steps.
    """

    def __init__(self, text: str, *, total: int) -> None:
        super().__init__(desc=text, total=total, disable=None, leave=False)
        self._text, self._steps, self._done = text, total, 0
        self._begun = self._written = time.monotonic()

    def say(self, text: str) -> None:
        """Show the current step."""
        self._text = text
        self.set_description(text)

    def step(self) -> None:
        """Count one step as done."""
        self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Count steps as done."""
        self._done += int(n or 0)
        now = time.monotonic()
        if self.disable and now - self._written >= _SECONDS:
            self._written = now
            minutes = (now - self._begun) / 60
            sys.stderr.write(f"{self._text}: {self._done} of {self._steps} done, {minutes:.0f} min\n")
        shown: bool | None = super().update(n)
        return shown
