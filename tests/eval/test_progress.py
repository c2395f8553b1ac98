"""Progress where stderr is no terminal."""

from __future__ import annotations

import pytest

from rocketkv.eval import progress as module
from rocketkv.eval.progress import Progress


def test_a_log_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Progress("beginning", total=9) as progress:
        for second in (59.0, 61.0, 90.0, 150.0):
            now = second
            progress.say(f"at {second:.0f}")
            progress.update(2)
    assert capsys.readouterr().err == "at 61: 4 of 9 done, 1 min\nat 150: 8 of 9 done, 2 min\n"
