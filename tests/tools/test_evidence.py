"""Studies that run side by side, what happens when one fails, and the figures made of their results."""

import sys
import time
from pathlib import Path

import pytest

from tools.evidence.equal_memory import budgets_of, equal_memory, stored_bytes
from tools.evidence.measure import PRESS, SHORT, divergence
from tools.evidence.studies import Study, run_studies

# Stands for an interpreter that runs a study: fails, runs for ten minutes, or waits until the second study has begun.
PROGRAM = """
import json, sys, time
from pathlib import Path
folder, wish = Path(sys.argv[-1]), sys.argv[sys.argv.index("--wish") + 1]
if wish == "fail":
    sys.exit("no such model")
(folder / "journal.jsonl").write_text('["a", 1]\\n')
if wish == "forever":
    time.sleep(600)
while wish == "other" and not (folder.parent / "second" / "journal.jsonl").exists():
    time.sleep(0.05)
(folder / "made.json").write_text(json.dumps({"wish": wish}))
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A program that stands for an interpreter."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{PROGRAM}")
    path.chmod(0o755)
    return str(path)


def study(tmp_path: Path, python: str, folder: str, wish: str) -> Study:
    return Study(name="made", folder=tmp_path / folder, options=("--wish", wish), results=1, python=python)


def test_studies_run_side_by_side(tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.evidence.studies._SECONDS", 0.05)
    studies = [study(tmp_path, python, "first", "other"), study(tmp_path, python, "second", "none")]
    run_studies(studies, 2)  # the first ends only when the second runs
    assert [done.result for done in studies] == [{"wish": "other"}, {"wish": "none"}]
    assert [done.finished for done in studies] == [1, 1]


def test_a_failure_stops_the_others_and_is_said(tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.evidence.studies._SECONDS", 0.05)
    wishes = {"first": "forever", "second": "fail", "third": "none"}
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"study second failed.*\n.*no such model"):
        run_studies([study(tmp_path, python, *item) for item in wishes.items()], 2)
    assert time.monotonic() - begun < 300  # the first would have gone on for 600 seconds
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "snapkv", PRESS])
def test_a_budget_is_the_largest_within_its_share(method: str, head_dim: int) -> None:
    budgets = budgets_of(method, head_dim)
    assert set(budgets) == {2, 4, 8} - ({8} if (method, head_dim) == ("rocketkv+", 256) else set())
    for share, budget in budgets.items():
        full = SHORT * head_dim * 4
        if method == PRESS:
            assert budget == SHORT // share
            continue
        assert stored_bytes(method, budget, head_dim) <= full // share < stored_bytes(method, budget + 4, head_dim)


def test_means_are_of_the_texts() -> None:
    cells = [{"arm": "snapkv", "budget": t, "text": text, "kl": [0.0, t / 1024]} for t in (512, 1024) for text in "ab"]
    made = {"cells": [*cells, {**cells[0], "text": "c", "kl": [3.0]}], "texts": ["a"], "settings": {"steps": 2}}
    assert divergence([made])["mean"] == {"snapkv:512": (0.25 + 0.25 + 3.0) / 3, "snapkv:1024": 0.5}
    with pytest.raises(ValueError, match="must read the same tokens"):
        divergence([made, {**made, "texts": ["b"]}])
    halves = {"cells": [*cells, {**cells[0], "budget": 2048, "kl": [0.125]}]}
    found = equal_memory({"snapkv": halves}, 64)
    assert found == {
        "snapkv": {
            "2": {"budget": 2048, "kl": 0.125},
            "4": {"budget": 1024, "kl": 0.5},
            "8": {"budget": 512, "kl": 0.25},
        }
    }
