"""The README says what is true of this tree: its figures are those measured, its files are those that exist."""

import json
import re
from pathlib import Path

import pytest

from rocketkv import METHODS
from rocketkv.cli.main import COMMANDS
from tools.evidence.picture import draw
from tools.evidence.tables import by_model, section, summary, with_part

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
FIGURES = {path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "docs" / "evidence").glob("*.json")}
EVIDENCE = FIGURES["smollm2"]


def test_tables_are_the_measured_ones() -> None:
    assert with_part(README, "summary", summary(EVIDENCE)) == README
    others = [evidence for name, evidence in sorted(FIGURES.items()) if name != "smollm2"]
    assert with_part(README, "by model", by_model([EVIDENCE, *others])) == README
    assert set(FIGURES) >= {"smollm2"}
    for name, evidence in FIGURES.items():
        head, _, rest = section(evidence).partition("\n\n")
        assert f"{head}\n\n![KL and bytes stored against the budget](evidence/{name}.svg)\n\n{rest}" in PAGE


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no markers"):
        with_part("# empty", "summary", "| |")


def test_every_method_has_a_row() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w+-]+)` \|", methods, flags=re.MULTILINE)) == set(METHODS)


def test_every_command_is_named() -> None:
    named = re.search(r"`rocketkv ([\w |-]+)` are the commands", README)
    assert named is not None
    assert sorted(named[1].split(" | ")) == sorted(COMMANDS)


def test_the_figures_meet_what_the_project_promises() -> None:
    for part in EVIDENCE["needle"]["lengths"].values():
        score = part["score"]
        assert score["full"] >= 90
        assert min(score["rocketkv:512"], score["rocketkv+:128"]) >= score["full"] - 5
        assert score["streaming:512"] <= 25
    assert EVIDENCE["bytes"]["8064"]["arms"]["rocketkv:512"]["stored"] <= 0.42
    mean = EVIDENCE["divergence"]["mean"]
    assert all(mean[f"rocketkv+:{budget}"] < 0.5 * mean[f"rocketkv:{budget}"] for budget in (64, 128, 256, 512))
    assert EVIDENCE["decode"]["float32"]["speedup_over"]["stock"]["median"] >= 1.5
    assert EVIDENCE["attention"]["speedup_over"]["SDPA enable_gqa"]["median"] >= 20
    assert EVIDENCE["attention"]["speedup_over"]["SDPA group as rows"]["median"] >= 8


def test_the_pictures_are_the_measured_ones(tmp_path: Path) -> None:
    for name, evidence in FIGURES.items():
        draw(evidence, tmp_path / f"{name}.svg")
        kept = ROOT / "docs" / "evidence" / f"{name}.svg"
        curves = [len(re.findall("<path", path.read_text())) for path in (tmp_path / f"{name}.svg", kept)]
        assert curves[0] == curves[1]  # glyphs depend on the fonts of the machine


def test_the_front_page_is_short() -> None:
    text = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    assert len(text.split()) <= 900
