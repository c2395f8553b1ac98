"""Sweeps in processes of their own, and what they leave in a folder of results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rocketkv.eval.records import CELLS, CellDict, records
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.sweep.provenance import weights_mark
from rocketkv.eval.sweep.run import substance
from rocketkv.eval.sweep.units import FOLDER
from rocketkv.hf.loading import load_model

FLAGS = [
    "--tasks", "niah_single_1,kl", "--methods", "full,rocketkv", "--budgets", "48,64", "--lengths", "512,576",
    "--samples", "3", "--max-new-tokens", "3", "--device", "cpu", "--threads", "1",
]  # fmt: skip
PLAN = Plan(
    tasks=("niah_single_1", "kl"), methods=("full", "rocketkv"), budgets=(48, 64), lengths=(512, 576),
    samples=3, max_new_tokens=3,
)  # fmt: skip


class Children:
    """Processes that run `rocketkv eval run`, each its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("eval_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def _tell(self, *order: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        while not line.strip().isdigit() and line:  # what children say of their scores
            line = self._server.stdout.readline()
        return int(line)

    def start(self, folder: Path, results: Path, *more: str, limit: int = 0) -> int:
        """Start a sweep, whose files may have at most `limit` bytes; 0: any number."""
        return self._tell("start", [limit, "eval", "run", "--model", str(folder), *FLAGS, "-o", str(results), *more])

    def hold(self, path: Path) -> int:
        pid = self._tell("hold", str(path))
        said, patience = path.with_suffix(".held"), time.monotonic() + 300
        while not (said.exists() and said.read_text()) and time.monotonic() < patience:
            time.sleep(0.002)
        assert said.read_text() == "True"
        return pid

    def wait(self, pid: int) -> int:
        return self._tell("wait", pid)

    def close(self) -> str:
        return self._server.communicate()[1]


def wanted(folder: Path) -> list[CellDict]:
    weights = weights_mark(load_model(str(folder))[0])
    return cells(dataclasses.replace(PLAN, model=str(folder)), Loaded(chat=True, weights=weights))


def by_key(results: Path) -> dict[str, list[object]]:
    return {record["key"]: substance(record) for record in records(results)}


def identities(results: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a record is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (results / CELLS).glob("*.json")}


def progress(results: Path) -> int:
    """Return how many answers and records there are."""
    found = len(list((results / CELLS).glob("*.json"))) * 4
    for path in journals(results):
        with contextlib.suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def journals(results: Path) -> list[Path]:
    """Return the files of unfinished answers."""
    return sorted((results / FOLDER).rglob("*.journal"))
