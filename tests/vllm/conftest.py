"""Engines are slow to start: the tests of a module share theirs. Without vLLM, only tests that need none run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

import vllm_case

os.environ.update(vllm_case.environment())  # vLLM reads it when it is imported

WITHOUT_ENGINE = {"test_settings.py", "test_plan.py", "test_slab.py", "test_rows.py", "test_any_version.py"}
if importlib.util.find_spec("vllm") is None:
    here = Path(__file__).parent
    collect_ignore = [path.name for path in here.glob("test_*.py") if path.name not in WITHOUT_ENGINE]
else:

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Run the tests that import Numba last: vLLM 0.32 starts no engine in a process that has.

        It asks every attribute of every module for its `__dict__`, which llvmlite's library answers with a function.
        """
        items.sort(key=lambda item: item.path.name == "test_rows.py")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tests' models."""
    return tmp_path_factory.mktemp("models")
