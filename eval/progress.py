"""Progress of long work on stderr: a line that rewrites itself on a terminal, and nothing where output is piped."""

import sys
import time
from types import TracebackType


class Progress:
    """Show what is being done, how much of it is done, and for how long it has gone on.

    Args:
        text: what is being done first.
        total: steps in all.
    """

    def __init__(self, text: str, *, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._shown = sys.stderr.isatty()
        self.say(text)

    def say(self, text: str) -> None:
        """Say what is being done now."""
        if self._shown:
            elapsed = time.monotonic() - self._start
            sys.stderr.write(f"\r\x1b[2K[{self._done}/{self._total}, {elapsed:.0f} s] {text} ...")
            sys.stderr.flush()

    def step(self) -> None:
        """Count one step as done."""
        self._done += 1

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
