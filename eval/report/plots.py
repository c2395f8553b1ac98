"""The plots of a report, for plotly, and the one look of each method: its colour and its mark."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import FULL, Arm
from .tables import Column, Figure, Point, Section
from .text import arm_text, difference_text, number, score_text, three_digits

# After Okabe and Ito (2008), kept apart in lightness too, as two in twelve men need; marks tell methods apart besides.
_COLORS = ("#0072b2", "#d55e00", "#2fb39a", "#a8407c", "#c9a227", "#7fa6e8")
_FULL_COLOR = "#808890"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_MOST_TICKS = 4  # what fits below a plot on a phone
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


@dataclass(frozen=True)
class Style:
    """How a method looks: its colour, its mark, and its number in the page."""

    color: str
    symbol: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot: what it shows, and its JSON for plotly, safe inside a script element."""

    title: str
    description: str
    json: str


@dataclass(frozen=True)
class _Mark:
    arm: Arm
    x: float
    y: float
    text: str  # for the hover label, escaped


def styles(arms: Iterable[Arm]) -> dict[str, Style]:
    """Return the look of each method: the library's in their order, then adapters."""
    methods = list(dict.fromkeys(arm.method for arm in sorted(set(arms), key=lambda arm: arm.order)))
    others = [method for method in methods if method != FULL]
    looks = {
        method: Style(_COLORS[place % len(_COLORS)], _SYMBOLS[place % len(_SYMBOLS)], place + 1)
        for place, method in enumerate(others)
    }
    return looks | {FULL: Style(_FULL_COLOR, "circle", 0)}


def score_plots(section: Section, looks: dict[str, Style]) -> list[Plot]:
    """Return the section's plots of the mean score against memory, time and bytes read; only those with points."""
    axes: tuple[tuple[str, str, Callable[[Point], float | None], Callable[[float], str], bool], ...] = (
        ("KV memory", "KV memory, share of a full cache", lambda p: p.memory_share, _percent, True),
        ("time per output token", "Time per output token, ms", lambda p: p.step_seconds, _milliseconds, False),
        ("bytes read per step", "Read per decode step, all counted", lambda p: p.step_bytes, _bytes, True),
    )
    plots = []
    for name, title, value, text, log in axes:
        marks = []
        for point in section.points:
            x, y = value(point), point.figure.score
            if x and y is not None:
                marks.append(_Mark(point.arm, x, y, _hover(point.arm, point.figure, f"{name}: {text(x)}")))
        if marks:
            scale = 1e3 if text is _milliseconds else 1.0
            figure = _figure(marks, looks, title, "Mean score", text if log else None, scale=scale)
            plots.append(_plot(f"Score against {name}", figure, section))
    return plots


def distance_plots(section: Section, looks: dict[str, Style]) -> list[Plot]:
    """Return a plot of each distance against the bytes that a step reads."""
    plots = []
    for column in section.distances:
        marks = [mark for arm in section.arms if (mark := _distance_mark(column, arm)) is not None]
        if marks:
            figure = _figure(marks, looks, "Read per decode step, all counted", column.metric, _bytes)
            plots.append(_plot(f"{column.name} against bytes read per step", figure, section))
    return plots


def _distance_mark(column: Column, arm: Arm) -> _Mark | None:
    figure = column.figures[arm]
    if figure.score is None:
        return None
    x = column.cells[arm]["cost"].get("step_bytes")
    if not x:
        return None
    text = _hover(arm, figure, f"bytes read per step: {_bytes(x)}", percent=False)
    return _Mark(arm, x, figure.score, text)


def _hover(arm: Arm, figure: Figure, cost: str, *, percent: bool = True) -> str:
    difference = difference_text(figure, percent=percent)
    lines = [score_text(figure, percent=percent) + (f", {difference}" if difference else ""), cost]
    return f"<b>{html.escape(arm_text(arm))}</b><br>{'<br>'.join(map(html.escape, lines))}"


def _plot(title: str, figure: Any, section: Section) -> Plot:
    # Inside a script element, only these could end it or begin a comment.
    safe = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c").replace(">", "\\u003e")
    description = f"{title}, {section.title}. Its figures are in the tables below."
    return Plot(title=title, description=description, json=safe.replace("&", "\\u0026"))


def _figure(
    marks: Sequence[_Mark],
    looks: dict[str, Style],
    x_title: str,
    y_title: str,
    tick_text: Callable[[float], str] | None,
    *,
    scale: float = 1.0,
) -> Any:
    """Return a figure: a line for each method through its budgets; a logarithmic axis where ticks have a text."""
    import plotly.graph_objects as go  # here: an optional dependency, of `page` alone

    figure = go.Figure(layout={"template": go.layout.Template()})
    lines = {(mark.arm.method, mark.arm.settings) for mark in marks}
    for method, settings in sorted(lines, key=lambda line: (looks[line[0]].number, line[1])):
        look = looks[method]
        own = [mark for mark in marks if (mark.arm.method, mark.arm.settings) == (method, settings)]
        if method == FULL:
            for y in {mark.y for mark in own}:
                figure.add_hline(y=y, line={"color": look.color, "width": 1.25, "dash": "dash"}, layer="below")
        figure.add_trace(
            go.Scatter(
                x=[mark.x * scale for mark in own],
                y=[mark.y for mark in own],
                name=f"m{look.number}",
                mode="lines+markers" if method != FULL else "markers",
                line={"color": look.color, "width": 1.75},
                marker={
                    "color": look.color,
                    "symbol": look.symbol if method != FULL else "circle-open",
                    "size": [min(7 + 1.5 * place, 13) for place in range(len(own))],
                    "opacity": 1,
                    "line": {"width": 2 if method == FULL else 0, "color": look.color},
                },
                hovertext=[mark.text for mark in own],
                hoverinfo="text",
                cliponaxis=False,
            )
        )
    font = {"family": _FONT, "size": 12, "color": "#59636e"}
    axis: dict[str, Any] = {
        "gridcolor": "#e4e8ec",
        "zeroline": False,
        "fixedrange": True,
        "ticks": "",
        "automargin": True,
    }
    figure.update_layout(
        font=font,
        margin={"l": 46, "r": 14, "t": 10, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        dragmode=False,
        hovermode="closest",
        hoverlabel={"font": {"family": _FONT, "size": 12, "color": "#ffffff"}, "bordercolor": "rgba(0,0,0,0)"},
        xaxis=axis | {"title": {"text": html.escape(x_title), "standoff": 10}},
        yaxis=axis | {"title": {"text": html.escape(y_title), "standoff": 8}, "nticks": 6},
    )
    if tick_text is None:
        figure.update_xaxes(nticks=6)
    else:
        values = [mark.x for mark in marks]
        ticks = log_ticks(min(values), max(values))
        low, high = math.log10(min(values)), math.log10(max(values))
        room = [low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01]
        figure.update_xaxes(
            tickangle=0, type="log", tickvals=ticks, ticktext=[tick_text(tick) for tick in ticks], range=room
        )
    return figure


def log_ticks(low: float, high: float) -> list[float]:
    """Return up to four round values between two numbers: powers of ten, with 2 and 5 or 3 times them if they fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        ticks = [tick for tick in ticks if 0.97 * low <= tick <= 1.03 * high]
        if len(ticks) <= _MOST_TICKS:
            break
    return ticks or [low]


def _percent(share: float) -> str:
    return f"{number(100 * share, percent=False).rstrip('0').rstrip('.') if share < 1 else f'{100 * share:.0f}'} %"


def _milliseconds(seconds: float) -> str:
    return f"{three_digits(1e3 * seconds)} ms"


def _bytes(count: float) -> str:
    scale, unit = next((unit for unit in _UNITS if count >= unit[0]), _UNITS[-1])
    return f"{count / scale:.3g} {unit}"
