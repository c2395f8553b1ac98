"""A sentence for each task: the smallest cache, and the fewest bytes read, within a point of the full cache's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .arms import FULL, Arm
from .columns import Column, Figure, reference
from .costs import cost_row, memory_share
from .sections import Section
from .tables import change_text

_POINTS = 1.0  # of the score, that a cache may lose


def verdicts(section: Section) -> list[tuple[str, str]]:
    """Return the name and the sentence of each task, and of their mean where there are several."""
    common = [column for column in section.scores if column.name in section.common]
    asked = [(section.mean_title, common, section.mean)] if section.mean_title and common else []
    asked += [(column.name, [column], column.figures) for column in section.scores]
    return [(name, _sentence(columns, figures.__getitem__, section.arms)) for name, columns, figures in asked]


def _sentence(columns: Sequence[Column], figure: Callable[[Arm], Figure], arms: Sequence[Arm]) -> str:
    compared = [arm for arm in arms if figure(arm).difference is not None and arm.method != FULL]
    if not compared:
        return "no cache is compared with the full one."
    near = [arm for arm in compared if (figure(arm).difference or 0.0) >= -_POINTS]
    stored = _least(near, lambda arm: memory_share(columns, arm))
    read = _least(near, lambda arm: _read_share(columns, arm, arms))
    if stored is None:
        text = "no smaller cache is within 1 point of full."
    else:
        text = f"the smallest cache within 1 point of full is {_described(stored, 'bytes', figure)}."
    if read is None:
        return f"{text} None within 1 point reads fewer bytes."
    return f"{text} The fewest bytes per step within 1 point are read by {_described(read, 'bytes read', figure)}."


def _least(arms: Sequence[Arm], share: Callable[[Arm], float | None]) -> tuple[Arm, float] | None:
    """Return the arm of the least share below 1, with its share."""
    shares = [(arm, value) for arm in arms if (value := share(arm)) is not None and value < 1]
    return min(shares, key=lambda pair: pair[1], default=None)


def _read_share(columns: Sequence[Column], arm: Arm, arms: Sequence[Arm]) -> float | None:
    return cost_row(columns, arm, reference(arm, arms))["step_bytes"].ratio


def _described(found: tuple[Arm, float], what: str, figure: Callable[[Arm], Figure]) -> str:
    arm, share = found
    result = figure(arm)
    ends = result.difference_interval
    text = f"{arm.name}: {100 * share:.3g} % of the full cache's {what}, "
    text += f"{change_text(result)} points on {result.paired} sample{'s' if result.paired > 1 else ''}"
    return text if ends is None or ends[0] >= -_POINTS else f"{text}, so a larger loss is not excluded"
