"""Engines are slow to start: the tests of a module share theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vllm_case

os.environ.update(vllm_case.environment())  # vLLM reads it when it is imported


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tests' models."""
    return tmp_path_factory.mktemp("models")
