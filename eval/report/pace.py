"""Time of a decode step by its position: of long answers, whose samples note their pace."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .arms import Arm
from .sections import Section

_MOST_POINTS = 24  # of a line


def paces(section: Section) -> dict[Arm, list[tuple[float, float]]]:
    """Return, by arm, tokens before a step and milliseconds of the step: medians over its samples, by position."""
    found = {}
    for arm in section.arms:
        noted = [
            (float(position), 1e3 * float(seconds))
            for column in section.scores
            if arm in column.cells
            for sample in column.cells[arm]["samples"]
            for position, seconds in sample["notes"].get("pace", ())
        ]
        if noted:
            found[arm] = _medians(sorted(noted))
    return found


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` medians of neighbouring points."""
    size = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(median(x for x, _ in part), median(y for _, y in part)) for part in parts]
