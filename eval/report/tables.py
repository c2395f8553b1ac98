"""Tables of a section, as text cells that page and Markdown print alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..intervals import Interval
from .arms import ADAPTER, FULL, Arm
from .columns import Column, Figure
from .costs import COSTS, Costs
from .sections import Section

METHODS_NOTE = (
    "Methods of the library are settings of its own parts under their authors' idea, at equal bytes read per decode "
    f"step; they are not their authors' programs. {ADAPTER} marks an adapter: there another program does the work."
)
SCORES_NOTE = (
    "Mean scores from 0 to 100, and after each the difference to the full cache on the same samples with its 95 % "
    "interval in parentheses (paired bootstrap); for the full cache, the interval of its score. An interval from 0 to "
    "0 says that no sample differs, which few samples do not prove for others."
)
DISTANCES_NOTE = (
    "Lower is better. With each figure the difference to the full cache on the same samples and its 95 % interval."
)
STARS_NOTE = (
    "* The difference is significant at 5 % among all comparisons of the table (sign-flip permutation test, adjusted "
    "by Holm's rule)."
)
_NO_SCORE = {"out_of_memory": "OOM", "failed": "failed"}  # by the status of a cell
UNITS = {
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "rate": ((1.0, "tokens/s"),),
    "count": ((1.0, "sequences"),),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: the figure, `OOM` if memory did not suffice, or `-` if there is none.
        change: its difference to the full cache's figure, or its ratio.
        interval: 95 %, in parentheses.
        value: the figure as a number, to sort by.
        differs: whether the difference is significant among all those of its table.
    """

    text: str
    change: str = ""
    interval: str = ""
    value: float | None = None
    differs: bool = False

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.text, " ".join(filter(None, (self.change, self.interval))))))


@dataclass(frozen=True)
class Table:
    """A table with a row for each arm; `has_mean` says that the first cell of a row is its mean."""

    header: tuple[str, ...]
    rows: tuple[tuple[Arm, tuple[Cell, ...]], ...]
    has_mean: bool = False


def scores_table(section: Section, columns: Sequence[Column]) -> Table:
    """Return scores, arms by tasks: with their mean first, or, for distances, with the records' further values last."""
    mean = section.mean_title if columns == section.scores else ""
    values = [(column, name) for column in columns for name in column.value_names]
    header = ["Method", *([mean] if mean else []), *(column.name for column in columns)]
    header += [f"{column.name}: {name}" for column, name in values]
    rows = []
    for arm in section.arms:
        if arm.latency_alone:
            continue
        cells = [figure_cell(section.mean[arm])] if mean else []
        cells += [figure_cell(column.figures[arm], percent=column.higher_is_better) for column in columns]
        cells += [_value_cell(column, arm, name) for column, name in values]
        rows.append((arm, tuple(cells)))
    return Table(tuple(header), tuple(rows), bool(mean))


def costs_tables(section: Section) -> list[tuple[str, Table, str]]:
    """Return the costs of the arms, each with its ratio to the full cache's: title, table and note of each machine."""
    tables = []
    for costs in section.costs:
        if costs.source:
            task = costs.source[0] if len(section.latency) > 1 else ""  # of a batch size
            title = ", ".join(filter(None, ("Cost", section.title, task, costs.machine)))
            arms = [arm for arm in section.arms if not costs.machine or arm in costs.rows or arm in costs.out_of_memory]
            tables.append((title, _costs_table(costs, arms), _costs_note(costs)))
    return tables


def _costs_table(costs: Costs, arms: Sequence[Arm]) -> Table:
    """Return the costs that were measured for some arm."""
    shown, units = [], {}
    for key, title, kind in COSTS:
        values = [value for row in costs.rows.values() if (value := row[key].value) is not None]
        if values or not costs.rows:
            shown.append((key, title))
            units[key] = next((unit for unit in UNITS[kind] if max(values, default=0.0) >= unit[0]), UNITS[kind][-1])
    rows = []
    for arm in arms:
        cells = []
        for key, _ in shown:
            value, ratio = costs.rows[arm][key] if arm in costs.rows else (None, None)
            if value is None:
                cells.append(Cell("OOM" if arm in costs.out_of_memory else "-"))
            else:
                change = "" if ratio is None or arm.method == FULL else f"{ratio:.2f}x"
                cells.append(Cell(number(value / units[key][0], percent=False), change, value=value))
        rows.append((arm, tuple(cells)))
    return Table(("Method", *(f"{title}, {units[key][1]}" for key, title in shown)), tuple(rows))


def _costs_note(costs: Costs) -> str:
    """Return the tasks that the costs come from."""
    source = costs.source
    machine = f" Machine: {costs.machine}." if costs.machine else ""
    measured = f"Measured on {source[0]}" if len(source) == 1 else f"Means over {', '.join(source)}"
    return f"{measured}; with each figure its ratio to the full cache's.{machine}"


def figure_cell(figure: Figure, *, percent: bool = True) -> Cell:
    """Return a score with its difference and the interval of that, or with the interval of the score."""
    if figure.score is None:
        return Cell(_NO_SCORE.get(figure.status, "-"))
    text = number(figure.score, percent=percent)
    if figure.difference is None:
        return Cell(text, interval=_interval(figure.interval, percent=percent), value=figure.score)
    interval = _interval(figure.difference_interval, percent=percent, sign=True)
    return Cell(text, number(figure.difference, percent=percent, sign=True), interval, figure.score, figure.differs)


def change_text(figure: Figure) -> str:
    """Return the difference of a score with its interval, as the tables show them."""
    cell = figure_cell(figure)
    return " ".join(filter(None, (cell.change, cell.interval)))


def _value_cell(column: Column, arm: Arm, name: str) -> Cell:
    value = column.cells[arm]["values"].get(name) if arm in column.cells else None
    if value is None:
        return Cell(_NO_SCORE.get(column.figures[arm].status, "-"))
    return Cell(number(value, percent=False), value=value)


def number(value: float, *, percent: bool, sign: bool = False) -> str:
    """Return a score with one decimal, another metric with three significant digits and no exponent.

    Args:
        value: the number.
        percent: whether it is a score.
        sign: whether to put a plus before a positive number and drop the minus of one that rounds to 0.
    """
    if percent:
        text = f"{value:.1f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:#.3g}".rstrip(".")
    if not sign:
        return text
    return text.lstrip("-") if not text.strip("-0.") else f"{'+' if value > 0 else ''}{text}"


def _interval(ends: Interval | None, *, percent: bool, sign: bool = False) -> str:
    if ends is None:
        return ""
    return f"({number(ends[0], percent=percent, sign=sign)} to {number(ends[1], percent=percent, sign=sign)})"
