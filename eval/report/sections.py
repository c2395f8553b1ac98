"""The comparison that every output prints: records of cells in, sections of figures out.

A section holds comparable records: one model, one length, one mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..records import Record
from .arms import MODES, Arm, ColumnKey, arms_of, column_key, column_names, grouped, length_text, with_metrics
from .columns import MISSING, Column, Figure, make_column, mean_figure, reference, starred
from .costs import Costs, Point, costs_of, make_point

LATENCY = "latency"  # the task whose records hold the times, if it was run


@dataclass(frozen=True, kw_only=True)
class Section:
    """One model at one length in one mode.

    Attributes:
        model: its name.
        dtype: of its weights and cache.
        length: tokens of prompt and answer, or None for the data's own.
        mode: `aware` or `agnostic`.
        arms: in order.
        scores: tasks with scores from 0 to 100.
        distances: tasks whose metric is better when lower.
        latency: tasks that were run for their times.
        common: names of the tasks in `scores` that every arm with a mean has; means and plots are over these. An arm
            has a mean if it has a score and memory sufficed for every task.
        mean: the mean over `common`, by arm.
        costs: time, memory and bytes of the arms, for each machine and batch size; times in `points` are the first
            one's.
        points: for the plots.
        notes: samples or tasks that are not compared.
    """

    model: str
    dtype: str
    length: int | None
    mode: Literal["aware", "agnostic"]
    arms: tuple[Arm, ...]
    scores: tuple[Column, ...]
    distances: tuple[Column, ...]
    latency: tuple[Column, ...]
    common: tuple[str, ...]
    mean: Mapping[Arm, Figure]
    costs: tuple[Costs, ...]
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its length and mode."""
        return f"{length_text(self.length)}, {MODES[self.mode]}"

    @property
    def mean_title(self) -> str:
        """Head of the column of means; empty if there is one task, which needs none."""
        count, every = len(self.common), len(self.scores)
        if every < 2:
            return ""
        return "mean" if count == every else f"mean of {count} task{'' if count == 1 else 's'}"


def sections(records: Sequence[Record]) -> list[Section]:
    """Compare records: one section for each model, mode and length."""
    groups = grouped(
        with_metrics(records),
        lambda record: (
            record["cell"]["model"],
            record["cell"]["dtype"],
            list(MODES).index(record["cell"]["mode"]),
            record["cell"]["length"] or float("inf"),
        ),
    )
    return [_section(members) for _, members in sorted(groups.items())]


def _section(records: Sequence[Record]) -> Section:
    cells: dict[ColumnKey, dict[Arm, Record]] = {}
    notes: list[str] = []
    for record, arm in zip(records, arms_of(records), strict=True):
        same = cells.setdefault(column_key(record), {})
        if arm in same:
            notes.append(f"{arm.name} on {record['cell']['task']}: of two records, the one with more samples is shown.")
        same[arm] = max(same[arm], record, key=_preference) if arm in same else record
    keys = sorted(cells, key=lambda key: (key[0], repr(key)))
    arms = tuple(sorted({arm for column in cells.values() for arm in column}, key=lambda arm: arm.order))
    columns = [make_column(name, key, cells[key], arms) for name, key in zip(column_names(keys), keys, strict=True)]
    latency = tuple(column for column in columns if column.task == LATENCY)
    scores = tuple(column for column in columns if column.higher_is_better and column not in latency)
    distances = tuple(column for column in columns if not column.higher_is_better and column not in latency)

    tried = [column for column in scores if any(column.complete(arm) for arm in arms)]
    too_large = [arm for arm in arms if any(column.figures[arm].status == "out_of_memory" for column in tried)]
    scored = [arm for arm in arms if arm not in too_large and any(column.complete(arm) for column in scores)]
    common = tuple(column for column in scores if all(column.complete(arm) for arm in scored))
    mean = {arm: mean_figure(common, arm) if arm in scored and common else MISSING for arm in arms}
    mean |= {arm: Figure(status="out_of_memory") for arm in too_large}
    # Each batch size of `latency` has costs of its own, which no mean joins.
    measured: list[tuple[Column, ...]] = [(column,) for column in latency] or [common or scores or distances]
    costs = tuple(each for columns_of_one in measured for each in costs_of(columns_of_one, arms))

    shown = [mean] if len(scores) > 1 else []  # the mean of one task is no comparison of its own
    figures = starred([*(column.figures for column in scores), *shown])
    scores = tuple(map(_with_figures, scores, figures))
    mean = figures[-1] if shown else mean
    distances = tuple(map(_with_figures, distances, starred([column.figures for column in distances])))

    notes += [note for column in (*scores, *distances) for note in _pairing_notes(column, arms)]
    for column in scores:
        if column not in common:
            lacking = ", ".join(arm.name for arm in scored if not column.complete(arm))
            notes.append(f"Not in the mean: {column.name}, without a score of {lacking}.")
    if too_large:
        names = ", ".join(arm.name for arm in too_large)
        notes.append(f"Without a mean, because memory did not suffice for every task: {names}.")
    if len({each.machine for each in costs}) > 1:
        notes.append(
            f"Times and memory of each machine stand in a table of their own; plots have those of {costs[0].machine}."
        )
    cell = records[0]["cell"]
    return Section(
        model=cell["model"],
        dtype=cell["dtype"],
        length=cell["length"],
        mode=cell["mode"],
        arms=arms,
        scores=scores,
        distances=distances,
        latency=latency,
        common=tuple(column.name for column in common),
        mean=mean,
        costs=costs,
        points=tuple(make_point(arm, mean[arm], common, costs[0]) for arm in scored if common),
        notes=tuple(dict.fromkeys(notes)),
    )


def _with_figures(column: Column, figures: Mapping[Arm, Figure]) -> Column:
    return dataclasses.replace(column, figures=figures)


def _preference(record: Record) -> tuple[bool, int, str]:
    """Of two records of a cell: complete before out of memory, then more samples, then the newer."""
    return record["status"] == "complete", len(record["samples"]), record["provenance"]["created"]


def _pairing_notes(column: Column, arms: Sequence[Arm]) -> list[str]:
    notes = []
    for arm in arms:
        figure, full = column.figures[arm], reference(arm, column.cells)
        if figure.score is None or full is None or arm == full:
            continue
        other = column.figures[full]
        if other.score is None or figure.paired == figure.samples == other.samples:
            continue
        notes.append(
            f"{arm.name} on {column.name}: {figure.samples} samples, {full.name} {other.samples}; "
            + (f"compared on the {figure.paired} in common." if figure.paired else "none in common: not compared.")
        )
    return notes
