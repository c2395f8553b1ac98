"""The machine that stages run on: its GPU, its tools, and processes with a time limit."""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .plan import ROOT

PACKAGE = "package:"
GRACE = 10  # seconds between the request to end and the kill


@dataclass(frozen=True)
class Outcome:
    """The end of a process: its exit code, None where the limit ended it, and its seconds."""

    code: int | None
    seconds: float


class Machine:
    """The machine itself; tests have another in its place."""

    def has_gpu(self) -> bool:
        """Whether PyTorch can use a GPU."""
        import torch  # takes seconds, and the plan is printed without it

        return torch.cuda.is_available()

    def missing(self, need: str) -> bool:
        """Whether a program, or a Python package after `package:`, is not installed."""
        if need.startswith(PACKAGE):
            return importlib.util.find_spec(need.removeprefix(PACKAGE)) is None
        return shutil.which(need) is None

    def run(self, command: tuple[str, ...], log: Path, environment: Mapping[str, str], limit: int) -> Outcome:
        """Run a command with its output in a file; at the limit, end it and the processes that it started."""
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
                _end(process)
            except BaseException:
                _end(process)
                raise
        return Outcome(code, round(time.monotonic() - began, 1))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a session, and those that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
