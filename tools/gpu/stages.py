"""Run the stages: each leaves a record, whatever happens in it, and the next one runs."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rocketkv.eval.records import write_atomically

from .device import Machine
from .plan import ROOT, Stage

TAIL_LINES = 40
TABLE = "kernels/launches.json"
PASSED, FAILED, TIMED_OUT, ABSENT = "passed", "failed", "timed out", "absent"


def revision() -> str:
    """Return a hash of the code under git, with its uncommitted changes, without the table that a stage writes."""
    paths = ("rocketkv", "kernels", "eval", "tools", "tests", "pyproject.toml", f":!{TABLE}")
    commands = (("git", "ls-files", "-s", "--", *paths), ("git", "diff", "HEAD", "--", *paths))
    found = [subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout for command in commands]
    return hashlib.sha256(b"".join(found)).hexdigest()[:16]


def record_path(folder: Path, stage: Stage) -> Path:
    """Return where a stage's record lies."""
    return folder / f"{stage.name}.json"


def record_of(folder: Path, stage: Stage) -> dict[str, Any] | None:
    """Return a stage's record, or None where there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads(record_path(folder, stage).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def run_stages(stages: Sequence[Stage], machine: Machine, folder: Path, code: str) -> dict[str, dict[str, Any]]:
    """Run every stage that has not passed with this code, and return the records of all, by name.

    Args:
        stages: in their order.
        machine: that runs them.
        folder: of records and logs.
        code: hash of the code: a stage that passed with another one runs again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, 1):
        record = record_of(folder, stage)
        before = f"[{number}/{len(stages)}] {stage.name}"
        if record is None or record.get("revision") != code or record["status"] != PASSED:
            sys.stdout.write(f"{before}: {stage.what}, at most {stage.limit // 60} minutes\n")
            sys.stdout.flush()
            record = {
                "stage": stage.name,
                "revision": code,
                "command": list(stage.command),
                **_run(stage, machine, folder),
            }
            write_atomically(record_path(folder, stage), json.dumps(record, indent=1) + "\n")
            sys.stdout.write(f"{before}: {record['status']}{_why(record)}\n")
        else:
            sys.stdout.write(f"{before}: passed before, in {record['seconds']} s\n")
        records[stage.name] = record
    return records


def _why(record: dict[str, Any]) -> str:
    if record["status"] == ABSENT:
        return f": {', '.join(record['absent'])} not installed"
    return f" after {record['seconds']} s" + ("" if record["status"] == PASSED else f"; see {record['log']}")


def _run(stage: Stage, machine: Machine, folder: Path) -> dict[str, Any]:
    """Run a stage and return what its record says of it."""
    absent = [need for need in stage.needs if machine.missing(need)]
    without = [need for need in stage.compares if machine.missing(need)]
    if absent:
        return {"status": ABSENT, "absent": absent}
    log = folder / f"{stage.name}.log"
    try:
        outcome = machine.run(stage.command, log, dict(stage.environment), stage.limit)
    except OSError as error:  # the program cannot be started
        return {"status": FAILED, "seconds": 0.0, "log": str(log), "error": str(error), "without": without}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    status = TIMED_OUT if outcome.code is None else PASSED if outcome.code == 0 else FAILED
    found: dict[str, Any] = {"status": status, "code": outcome.code, "seconds": outcome.seconds, "log": str(log)}
    found["without"] = without
    if stage.result and status == PASSED:
        try:
            found["result"] = json.loads(lines[-1] if lines else "")
        except ValueError:
            found |= {"status": FAILED, "error": "the last line of its output is not JSON"}
    if found["status"] != PASSED:
        found["tail"] = lines[-TAIL_LINES:]
    return found
