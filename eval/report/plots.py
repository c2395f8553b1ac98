"""The data of a report's plots, and the colour and mark of each method; `page.js` draws them with plotly.js."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from .arms import FULL, Arm
from .columns import Figure
from .costs import Point, memory_share
from .pace import paces
from .sections import Section
from .tables import UNITS, figure_cell, number

# After Okabe and Ito (2008), with lightness varied for colour-blind readers; marks tell methods apart as well.
_COLORS = ("#0072b2", "#d55e00", "#2fb39a", "#a8407c", "#c9a227", "#7fa6e8")
_FULL_COLOR = "#808890"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
BARS_NOTE = (
    "Bars: 95 % interval of the difference to the full cache on the same samples (paired bootstrap), put around the "
    "figure. "
    "Ring and dotted steps: Pareto front, the figures that none beats at the same cost or less."
)
_MAX_TICKS = 4  # as many as fit below a plot on a phone


class Style(NamedTuple):
    """Colour and mark of a method, and its number in the page."""

    color: str
    symbol: str
    number: int


class Plot(NamedTuple):
    """A plot: its title, its description for screen readers, and its data as `page.js` reads them."""

    title: str
    description: str
    data: dict[str, Any]


class _Axis(NamedTuple):
    name: str
    title: str
    value: Callable[[Point], float | None]
    text: Callable[[float], str]
    scale: float | None = None  # of a linear axis; None: logarithmic


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.3g} %"


def _milliseconds(seconds: float) -> str:
    return f"{number(1e3 * seconds, percent=False)} ms"


def _bytes(count: float) -> str:
    scale, unit = next((unit for unit in UNITS["bytes"] if count >= unit[0]), UNITS["bytes"][-1])
    return f"{count / scale:.3g} {unit}"


_MEMORY = _Axis("KV memory", "KV memory, share of a full cache", lambda point: point.memory_share, _percent)
_READ = _Axis("bytes read per step", "Bytes read per decode step", lambda point: point.step_bytes, _bytes)
_AXES = (
    _MEMORY,
    _Axis("time per output token", "Time per output token, ms", lambda point: point.step_seconds, _milliseconds, 1e3),
    _READ,
)


def styles(arms: Iterable[Arm]) -> dict[str, Style]:
    """Return the style of each method: the library's in their order, then adapters."""
    methods = dict.fromkeys(arm.method for arm in sorted(set(arms), key=lambda arm: arm.order) if arm.method != FULL)
    return {FULL: Style(_FULL_COLOR, "circle", 0)} | {
        method: Style(_COLORS[place % len(_COLORS)], _SYMBOLS[place % len(_SYMBOLS)], place + 1)
        for place, method in enumerate(methods)
    }


def score_plots(section: Section, looks: dict[str, Style]) -> list[Plot]:
    """Return plots of the mean score against memory, time and bytes read; those without points are left out."""
    plots = []
    for axis in _AXES:
        points = [(point.arm, axis.value(point), point.figure) for point in section.points]
        plots += _plot(f"Score against {axis.name}", section, looks, axis, "Mean score", points)
    return plots


def distance_plots(section: Section, looks: dict[str, Style]) -> list[Plot]:
    """Return plots of each distance against the bytes that a cache stores and those that a step reads."""
    plots = []
    for column in section.distances:
        arms = [arm for arm in section.arms if arm in column.cells]
        stored = [(arm, memory_share([column], arm), column.figures[arm]) for arm in arms]
        read = [(arm, column.cells[arm]["cost"].get("step_bytes"), column.figures[arm]) for arm in arms]
        for axis, points in ((_MEMORY, stored), (_READ, read)):
            plots += _plot(f"{column.name} against {axis.name}", section, looks, axis, column.metric, points, -1)
    return plots


def pace_plots(section: Section, looks: dict[str, Style]) -> list[Plot]:
    """Return a plot of the time of a decode step by its position, or nothing where no answer is long."""
    lines = []
    for arm, points in paces(section).items():
        line = _empty_line() | {"name": f"m{looks[arm.method].number}"}
        line |= {"color": looks[arm.method].color, "symbol": looks[arm.method].symbol, "front": [False] * len(points)}
        line["up"] = line["down"] = [None] * len(points)
        for x, y in points:
            line["x"].append(x)
            line["y"].append(y)
            line["text"].append(f"<b>{html.escape(arm.name)}</b><br>{_milliseconds(y / 1e3)} at {x:,.0f} tokens")
        lines.append(line)
    if not lines:
        return []
    title = "Time per output token by position"
    data = {"x": "Tokens before the step", "y": "Time per output token, ms", "lines": lines, "front": [], "ticks": None}
    return [Plot(title, f"{title}, {section.title}.", data | {"over": True})]


def _plot(
    title: str,
    section: Section,
    looks: dict[str, Style],
    axis: _Axis,
    y_title: str,
    points: Sequence[tuple[Arm, float | None, Figure]],
    better: Literal[1, -1] = 1,
) -> list[Plot]:
    """Return a plot with a line for each method through its budgets, or nothing if no point has both values.

    `better` is the sign of a better figure. Points of the Pareto front are marked, and the front is a line of steps.

    plotly.js reads some HTML tags in texts, so those that come from records are escaped.
    """
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    known = [(arm, x, figure, figure.score) for arm, x, figure in points if x and figure.score is not None]
    front = pareto_front([(x, better * y) for _, x, _, y in known])
    for place, (arm, x, figure, y) in enumerate(known):
        look = looks[arm.method]
        line = lines.setdefault((look.number, arm.settings), _empty_line())
        line |= {"name": f"m{look.number}", "color": look.color, "symbol": look.symbol}
        line["x"].append(x * (axis.scale or 1.0))
        line["y"].append(y)
        line["front"].append(place in front)
        for name, end in zip(("up", "down"), _bar(arm, figure), strict=True):
            line[name].append(end)
        score = figure_cell(figure, percent=better > 0)
        line["text"].append(
            f"<b>{html.escape(arm.name)}</b><br>{html.escape(str(score))}<br>{axis.name}: {axis.text(x)}"
        )
    xs = [x for _, x, _, _ in known]
    if not xs:
        return []
    data: dict[str, Any] = {"x": html.escape(axis.title), "y": html.escape(y_title)}
    data["lines"] = [lines[key] for key in sorted(lines)]
    data["front"] = [[xs[place] * (axis.scale or 1.0), known[place][3]] for place in front]
    data["ticks"] = None if axis.scale else [[tick, axis.text(tick)] for tick in log_ticks(min(xs), max(xs))]
    return [Plot(title, f"{title}, {section.title}. Its figures are in the tables below.", data)]


def _empty_line() -> dict[str, Any]:
    return {name: [] for name in ("x", "y", "text", "front", "up", "down")}


def _bar(arm: Arm, figure: Figure) -> tuple[float | None, float | None]:
    """Return the lengths of an error bar above and below a figure; None where there is no interval.

    It is the 95 % interval of the paired difference to the full cache, put around the figure, so that it misses the
    full cache's line where the difference is not 0; without a full cache it is that of the figure. The full cache, to
    which all others are compared, has no bar.
    """
    middle, ends = figure.difference, figure.difference_interval
    if middle is None:
        middle, ends = figure.score, figure.interval
    if arm.method == FULL or middle is None or ends is None:
        return None, None
    return max(0.0, ends[1] - middle), max(0.0, middle - ends[0])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other beats: at most as large a cost, and a larger value; by cost."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def log_ticks(low: float, high: float) -> list[float]:
    """Return up to four round values between two numbers: powers of ten, with 2 and 5 or 3 times them if they fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        ticks = [tick for tick in ticks if 0.97 * low <= tick <= 1.03 * high]
        if len(ticks) <= _MAX_TICKS:
            break
    return ticks or [low]
