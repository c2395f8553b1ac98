"""The browser that opens reports, for all files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chromium import chromium


@pytest.fixture(scope="module")  # only one may be open in a process
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started
