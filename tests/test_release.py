"""The parts of a release: metadata that agree, and the forms and workflows of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rocketkv

ROOT = Path(__file__).resolve().parents[1]


def read(path: str) -> dict[str, Any]:
    loaded = yaml.load((ROOT / path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert isinstance(loaded, dict)
    return loaded


def test_the_metadata_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = read("CITATION.cff")
    assert citation["version"] == rocketkv.__version__
    assert citation["license"] == project["license"].split(" AND ")[0]
    assert citation["references"][0]["url"] == project["urls"]["Paper"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {rocketkv.__version__}" in changelog


def test_a_tag_is_built_checked_and_published_without_a_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    workflow = read(".github/workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "make PYTHON=python wheel" in [step.get("run") for step in build["steps"]]
    assert "permissions" not in build
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "secrets." not in text


def test_the_lock_files_pin_and_hash_every_package_and_have_the_extras() -> None:
    entry = re.compile(r"^([a-z0-9][\w.-]*)(?:\[.+?\])?==\S+", re.MULTILINE)
    locked = {}
    for path in sorted((ROOT / "locks").glob("*.txt")):
        blocks = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        lines = [line for line in blocks if line and not line.startswith("#")]
        assert all(entry.match(line) and "--hash=sha256:" in line for line in lines), path.name
        locked[path.stem] = {entry.match(line)[1] for line in lines}  # type: ignore[index]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for lock, extras in {"test": ("demo", "eval", "serve", "dev"), "demo": ("demo",), "docs": ("docs",)}.items():
        asked = project["dependencies"] + [each for extra in extras for each in project["optional-dependencies"][extra]]
        names = {canonicalize_name(Requirement(each).name) for each in asked}
        assert names <= locked[lock], lock
    slim = (ROOT / "rocketkv" / "locked.txt").read_text(encoding="utf-8")
    assert {match[1] for match in entry.finditer(slim)} == locked["test"]


def test_the_canary_runs_weekly_and_opens_an_issue() -> None:
    workflow = read(".github/workflows/canary.yml")
    assert workflow["on"]["schedule"][0]["cron"].split()[-1] != "*"
    job = workflow["jobs"]["canary"]
    assert "make PYTHON=python test-canary" in [step.get("run") for step in job["steps"]]
    report = job["steps"][-1]
    assert report["if"] == "failure()"
    assert "gh issue create" in report["run"]
    assert workflow["permissions"]["issues"] == "write"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_github_asks_for(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    for field in fields.values():
        assert field["type"] in {"textarea", "input", "checkboxes"}
        assert field["attributes"]["label"]
    if name == "bug":
        assert "rocketkv env" in fields["env"]["attributes"]["label"]
        assert fields["env"]["validations"] == {"required": "true"}
