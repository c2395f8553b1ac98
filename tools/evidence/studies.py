"""Studies as programs, several side by side; each resumes in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocketkv.eval.journal import Journal
from rocketkv.eval.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 2.0  # between looks at what runs


@dataclass(frozen=True, kw_only=True)
class Study:
    """A program of `python -m studies`.

    Attributes:
        name: of the study.
        folder: gets its files.
        options: of its command line.
        results: how many its journal has at the end.
        python: the interpreter, where it is not this one.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    results: int
    python: str | None = None

    def begin(self) -> subprocess.Popen[bytes]:
        """Start the program; its messages go to a file in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # `-m` finds the studies in the root only without the safe path.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
        command = [self.python or sys.executable, "-m", "studies", self.name, *self.options, "-o", str(self.folder)]
        with self.messages.open("wb") as messages:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=messages)

    @property
    def messages(self) -> Path:
        """The file of what the program writes to stderr."""
        return self.folder / "stderr.txt"

    @property
    def finished(self) -> int:
        """Results in the journal."""
        return len(Journal.read(self.folder / "journal.jsonl"))

    @property
    def result(self) -> dict[str, Any]:
        """The result of the finished study."""
        result: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
        return result


def run_studies(studies: Sequence[Study], at_once: int) -> None:
    """Run studies, `at_once` of them side by side, in their order.

    Raises:
        RuntimeError: a study failed; the others are stopped, and a next run resumes all.
    """
    waiting, running = list(studies), dict[subprocess.Popen[bytes], Study]()
    with Progress("studies", total=sum(study.results for study in studies)) as progress:
        done = 0
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    study = waiting.pop(0)
                    running[study.begin()] = study
                time.sleep(_SECONDS)
                for program in [program for program in running if program.poll() is not None]:
                    study = running.pop(program)
                    if program.returncode:
                        said = study.messages.read_text(encoding="utf-8", errors="replace")
                        raise RuntimeError(
                            f"study {study.folder.name} failed, with exit code {program.returncode}:\n{said}"
                        )
                before, done = done, sum(study.finished for study in studies)
                progress.say(", ".join(study.folder.name for study in running.values()) or "studies")
                progress.update(done - before)
        finally:
            for program in running:
                program.terminate()
            for program in running:
                program.wait()
