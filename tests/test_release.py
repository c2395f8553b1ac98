"""The parts of a release: metadata that agree, and the forms and workflows of the repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rocketkv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

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
