"""The examples in docstrings of the public functions run, and print what they say."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

import rocketkv


@pytest.mark.parametrize("name", ["patch", "RocketKVCache", "Trace", "save_cache"])
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documented: Any = getattr(rocketkv, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs={})
    assert found.examples
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(found, out=said.append)
    assert result.failed == 0, "".join(said)
