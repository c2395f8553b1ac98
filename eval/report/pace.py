"""Time of a decode step by its position: of `latency`, or of long answers, whose samples note their pace."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .arms import Arm
from .columns import Column
from .sections import Section

_MOST_POINTS = 24  # of a line


def paces(section: Section) -> dict[Arm, list[tuple[float, float]]]:
    """Return, by arm, tokens before a step and milliseconds of the step: of `latency`, or medians over its samples.

    Of several batch sizes the first is taken.
    """
    alone = {arm: points for arm in section.arms if (points := _points(section.latency[:1], arm))}
    found = alone or {arm: points for arm in section.arms if (points := _points(section.scores, arm))}
    return {arm: _medians(sorted(points)) for arm, points in found.items()}


def _points(columns: Sequence[Column], arm: Arm) -> list[tuple[float, float]]:
    records = [column.cells[arm] for column in columns if arm in column.cells]
    noted = [sample["notes"].get("pace", ()) for record in records for sample in record["samples"]]
    noted += [record.get("details", {}).get("step_seconds_by_position", ()) for record in records]
    return [(float(position), 1e3 * float(seconds)) for points in noted for position, seconds in points]


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` medians of neighbouring points."""
    size = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(median(x for x, _ in part), median(y for _, y in part)) for part in parts]
