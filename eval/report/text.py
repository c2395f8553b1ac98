"""How a report's figures are written: the same text in every format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..intervals import Interval
from .arms import Arm
from .provenance import DepthMap
from .tables import COSTS, Column, Costs, Figure, Section

ADAPTER = "†"
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
_UNITS = {
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}


@dataclass(frozen=True)
class Table:
    """A table as text: what Markdown, terminal and page print."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def arm_text(arm: Arm) -> str:
    """Return how an arm is called, adapters marked."""
    return f"{arm.name} {ADAPTER}" if arm.adapter else arm.name


def mean_title(section: Section) -> str:
    """Return the head of the column of means."""
    count = len(section.common)
    if count == len(section.scores):
        return "mean"
    return f"mean of {count} task{'' if count == 1 else 's'}"


def number(value: float, *, percent: bool = True) -> str:
    """Return a score with one decimal, another metric with three significant digits."""
    return f"{value:.1f}" if percent else three_digits(value)


def signed(value: float, *, percent: bool = True) -> str:
    """Return a difference with its sign; what rounds to nothing has none."""
    text = number(value, percent=percent)
    return text.lstrip("-") if not text.strip("-0.") else f"{'+' if value > 0 else ''}{text}"


def interval_text(interval: Interval, *, percent: bool = True, sign: bool = False) -> str:
    """Return an interval in parentheses."""
    show = signed if sign else number
    return f"({show(interval[0], percent=percent)} to {show(interval[1], percent=percent)})"


def score_text(figure: Figure, *, percent: bool = True) -> str:
    """Return a score, `OOM` where memory did not suffice, `-` where there is none."""
    if figure.score is None:
        return "OOM" if figure.status == "out_of_memory" else "-"
    return number(figure.score, percent=percent)


def difference_text(figure: Figure, *, percent: bool = True) -> str:
    """Return the difference and its interval; of the full cache, the interval of its score; empty where none."""
    if figure.difference is None:
        return "" if figure.interval is None else interval_text(figure.interval, percent=percent)
    text = signed(figure.difference, percent=percent)
    if figure.difference_interval is None:
        return text
    return f"{text} {interval_text(figure.difference_interval, percent=percent, sign=True)}"


def differs(figure: Figure) -> bool:
    """Say whether the interval of the difference leaves out 0."""
    interval = figure.difference_interval
    return interval is not None and not interval[0] <= 0 <= interval[1]


def cost_units(costs: Costs) -> dict[str, tuple[float, str]]:
    """Return scale and unit of each cost: the largest unit that its greatest value fills."""
    units = {}
    for key, _, kind in COSTS:
        values = [row[key].value or 0.0 for row in costs.rows.values()]
        most = max(values, default=0.0)
        units[key] = next((unit for unit in _UNITS[kind] if most >= unit[0]), _UNITS[kind][-1])
    return units


def three_digits(value: float) -> str:
    """Return a number with three significant digits, and with no exponent where it is of a common size."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:#.3g}".rstrip(".")


def ratio_text(value: float | None) -> str:
    """Return a ratio to the full cache, such as `0.35x`, or nothing."""
    return "" if value is None else f"{value:.2f}x"


def scores_table(section: Section, columns: Sequence[Column]) -> Table:
    """Return scores and differences, arms by tasks; before scores their mean, after distances what else is known."""
    mean = section.has_mean and columns == section.scores
    values = [(column, name) for column in columns if not column.higher_is_better for name in column.value_names]
    header = ["Method", *([mean_title(section)] if mean else []), *(column.name for column in columns)]
    header += [f"{column.name}: {name}" for column, name in values]
    rows = []
    for arm in section.arms:
        texts = [figure_text(section.mean[arm])] if mean else []
        texts += [figure_text(column.figures[arm], percent=column.higher_is_better) for column in columns]
        texts += [value_text(column, arm, name) for column, name in values]
        rows.append((arm_text(arm), *texts))
    return Table(tuple(header), tuple(rows))


def figure_text(figure: Figure, *, percent: bool = True) -> str:
    """Return a score and its difference."""
    difference = difference_text(figure, percent=percent)
    return f"{score_text(figure, percent=percent)}, {difference}" if difference else score_text(figure, percent=percent)


def value_text(column: Column, arm: Arm, name: str) -> str:
    """Return a further figure of a record."""
    value = column.cells[arm]["values"].get(name) if arm in column.cells else None
    if value is None:
        return "OOM" if column.figures[arm].status == "out_of_memory" else "-"
    return number(value, percent=False)


def costs_table(section: Section) -> Table:
    """Return what the arms cost, with ratios to the full cache."""
    units = cost_units(section.costs)
    header = ("Method", *(f"{title} ({units[key][1]})" for key, title, _ in COSTS))
    rows = []
    for arm in section.arms:
        texts = []
        for key, _, _ in COSTS:
            text, ratio = cost_texts(section, arm, key)
            texts.append(f"{text} ({ratio})" if ratio else text)
        rows.append((arm_text(arm), *texts))
    return Table(header, tuple(rows))


def cost_texts(section: Section, arm: Arm, key: str) -> tuple[str, str]:
    """Return a cost in its column's unit, and its ratio to the full cache's."""
    if arm not in section.costs.rows:
        return ("OOM" if arm in section.costs.out_of_memory else "-"), ""
    figure = section.costs.rows[arm][key]
    if figure.value is None:
        return "-", ""
    return three_digits(figure.value / cost_units(section.costs)[key][0]), ratio_text(figure.ratio)


def map_table(depths: DepthMap, arm: Arm) -> Table:
    """Return an arm's scores, depths by lengths."""
    rows = tuple((depth, *(map_text(depths, arm, depth, n) for n in depths.lengths)) for depth in depths.depths)
    return Table(("Depth", *(f"{length} tokens" for length in depths.lengths)), rows)


def map_text(depths: DepthMap, arm: Arm, depth: str, length: str) -> str:
    """Return a score of a map: a whole number, `OOM` or `-`."""
    found = depths.cells.get((arm, depth, length))
    if found is None or isinstance(found, str):
        return found or "-"
    return f"{found[0]:.0f}"


def costs_source(section: Section) -> str:
    """Return what the costs are means over."""
    source = section.costs.source
    measured = f"Measured on {source[0]}" if len(source) == 1 else f"Means over {', '.join(source)}"
    return f"{measured}; with each figure its ratio to the full cache's."
