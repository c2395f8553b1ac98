"""Studies as programs, several side by side; each resumes in its folder."""

from __future__ import annotations

import json
import os
import signal
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
_SECONDS = 2.0  # between polls
_ASKED = """
import json, sys
from importlib.metadata import version
import gguf, kvpress, rocketkv
print(json.dumps([rocketkv.__file__, list(sys.version_info[:2]), version("kvpress"), version("transformers")]))
"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study to run as a program, `python -m studies NAME`.

    Attributes:
        name: the study.
        folder: of its files; a second run resumes there.
        options: of its command line.
        results: entries of its journal when it is finished.
        python: path of another interpreter, or None.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    results: int
    python: str | None = None

    def begin(self) -> subprocess.Popen[bytes]:
        """Start the program in a process group of its own; its messages go to a file in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [*_python(self.python), "-m", "studies", self.name, *self.options, "-o", str(self.folder)]
        with self.messages.open("wb") as messages:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(self.python),
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,
            )

    @property
    def messages(self) -> Path:
        """The file of the program's stderr."""
        return self.folder / "stderr.txt"

    @property
    def finished(self) -> int:
        """Results in the journal, which may have some of other settings, too."""
        return min(len(Journal.read(self.folder / "journal.jsonl")), self.results)

    @property
    def result(self) -> dict[str, Any]:
        """The result of the finished study."""
        result: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
        return result


def run_studies(studies: Sequence[Study], at_once: int) -> None:
    """Run studies in their order, `at_once` of them at a time.

    Raises:
        RuntimeError: a study failed; the others are stopped, and the next run resumes all.
    """
    waiting, running = list(studies), dict[subprocess.Popen[bytes], Study]()
    with Progress("studies", total=sum(study.results for study in studies)) as progress:
        done = progress.initial = progress.n = sum(study.finished for study in studies)
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
                        raise RuntimeError(f"study {study.folder.name} failed, exit code {program.returncode}:\n{said}")
                before, done = done, sum(study.finished for study in studies)
                progress.say(", ".join(study.folder.name for study in running.values()) or "studies")
                progress.update(done - before)
        finally:
            for program in running:
                os.killpg(program.pid, signal.SIGTERM)
            for program in running:
                program.wait()


def press_versions(python: str) -> dict[str, str]:
    """Return the versions of kvpress and transformers of another interpreter, which is to run a press.

    Raises:
        ValueError: it has no kvpress, another rocketkv than this checkout, or another version of Python, whose own
            sources and documentation are among the texts.
    """
    done = subprocess.run(
        [*_python(python), "-c", _ASKED],
        cwd=ROOT,
        env=_environment(python),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise ValueError(f"--kvpress-python must have kvpress and this checkout's rocketkv[demo]:\n{done.stderr}")
    file, version, kvpress, transformers = json.loads(done.stdout.splitlines()[-1])
    if Path(file).resolve() != ROOT / "rocketkv" / "__init__.py":
        raise ValueError(f"--kvpress-python must have this checkout installed, pip install -e; it has {file}")
    if tuple(version) != sys.version_info[:2]:
        here = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"--kvpress-python must be Python {here} as this one; got {'.'.join(map(str, version))}")
    return {"kvpress": kvpress, "transformers": transformers}


def _python(other: str | None) -> list[str]:
    return [sys.executable if other is None else other]


def _environment(other: str | None) -> dict[str, str]:
    """Return the environment of a program; `-m` finds the studies in the root only without the safe path."""
    left_out = {"PYTHONSAFEPATH"} if other is None else {"PYTHONSAFEPATH", "PYTHONPATH", "PYTHONHOME"}
    return {key: value for key, value in os.environ.items() if key not in left_out}
