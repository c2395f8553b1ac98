"""The README says what is true of this tree: its figures are those measured, its files are those that exist."""

import json
import re
from pathlib import Path

import pytest

from rocketkv import METHODS
from rocketkv.cli.main import COMMANDS
from tools.evidence import tables, with_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = json.loads((ROOT / "docs" / "evidence.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["needle", "memory", "speed"])
def test_tables_are_the_measured_ones(name: str) -> None:
    assert f"<!-- evidence: {name} -->\n{tables(EVIDENCE)[name]}\n<!-- end -->" in README


def test_writing_the_tables_again_changes_nothing() -> None:
    assert with_tables(README, EVIDENCE) == README


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no markers"):
        with_tables("# empty", EVIDENCE)


def test_every_method_has_a_row() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w+-]+)` \|", methods, flags=re.MULTILINE)) == set(METHODS)


def test_every_command_is_named() -> None:
    named = re.search(r"`rocketkv ([\w |-]+)` are the commands", README)
    assert named is not None
    assert sorted(named[1].split(" | ")) == sorted(COMMANDS)


def test_the_figures_meet_what_the_project_promises() -> None:
    needle, memory = EVIDENCE["needle"]["right"], EVIDENCE["memory"]["budgets"]
    assert needle["full cache"] >= 18
    assert needle["rocketkv 512"] >= needle["full cache"] - 1
    assert needle["streaming 512"] <= 5
    assert memory["512"]["stored_ratio"] <= 0.42
    assert EVIDENCE["decode"]["speedup_over"]["stock"]["median"] >= 1.5
    assert EVIDENCE["attention"]["speedup_over"]["SDPA enable_gqa"]["median"] >= 20
    assert EVIDENCE["attention"]["speedup_over"]["SDPA group as rows"]["median"] >= 8


def test_the_front_page_is_short() -> None:
    text = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    assert len(text.split()) <= 900
