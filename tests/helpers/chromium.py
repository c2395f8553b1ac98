"""A real browser for the tests of pages."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def unavailable(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI runs the browser's tests")
    pytest.skip(reason)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start the Chromium of the system, or skip the test where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("the package playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("ROCKETKV_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        unavailable("there is no Chromium; set ROCKETKV_CHROMIUM to where it is")
    with sync_playwright() as playwright:
        sandbox = [] if not hasattr(os, "geteuid") or os.geteuid() else ["--no-sandbox"]  # which root cannot have
        started = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield started
        started.close()
