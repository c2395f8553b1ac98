"""The scores of one task, each compared with the full cache's on the samples that both have, by id and prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ..intervals import Interval, mean_of_means_interval, paired_interval
from ..records import Record
from .arms import FULL, Arm, ColumnKey
from .significance import holm, sign_flip_p

Status = Literal["complete", "out_of_memory", "failed", "missing"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A score and its difference to the full cache's.

    Attributes:
        status: of the cell; unless it is `complete`, all other fields keep their defaults.
        score: the record's.
        interval: 95 %, of the score.
        samples: number of samples in the score.
        difference: mean over the samples that `full` has too; None if there are none.
        difference_interval: 95 %, paired.
        paired: number of those samples.
        p_value: of the difference, for itself.
        differs: whether the difference is significant among all those of its table.
    """

    status: Status
    score: float | None = None
    interval: Interval | None = None
    samples: int = 0
    difference: float | None = None
    difference_interval: Interval | None = None
    paired: int = 0
    p_value: float | None = None
    differs: bool = False


MISSING = Figure(status="missing")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A task of a section.

    Attributes:
        name: the task's, with its differences to other tasks of that name.
        task: the task's name.
        metric: name of the metric.
        higher_is_better: True for scores from 0 to 100, False for distances.
        cells: the arms' records.
        figures: the arms' figures.
    """

    name: str
    task: str
    metric: str
    higher_is_better: bool
    cells: Mapping[Arm, Record]
    figures: Mapping[Arm, Figure]

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of further values in the records of a distance; scores show none."""
        if self.higher_is_better:
            return ()
        return tuple(sorted({name for record in self.cells.values() for name in record["values"]}))

    def complete(self, arm: Arm) -> bool:
        """Return whether an arm has a score here."""
        return self.figures[arm].score is not None


def make_column(name: str, key: ColumnKey, cells: Mapping[Arm, Record], arms: Sequence[Arm]) -> Column:
    """Compare the records of a task."""
    figures = {arm: _figure(arm, cells) for arm in arms}
    return Column(name=name, task=key[0], metric=key[2], higher_is_better=key[3], cells=cells, figures=figures)


def reference(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """Return the full cache's arm, with the settings of `arm` if there are several."""
    full = [other for other in arms if other.method == FULL]
    return max(full, key=lambda other: other.settings == arm.settings) if full else None


def paired_scores(record: Record, other: Record) -> tuple[list[float], list[float]]:
    """Return the scores of the samples that two records have in common: same id, same prompt."""
    known = {(sample["id"], sample["prompt_sha256"]): sample["score"] for sample in other["samples"]}
    pairs = [
        (sample["score"], known[sample["id"], sample["prompt_sha256"]])
        for sample in record["samples"]
        if (sample["id"], sample["prompt_sha256"]) in known
    ]
    return [score for score, _ in pairs], [score for _, score in pairs]


def _figure(arm: Arm, cells: Mapping[Arm, Record]) -> Figure:
    record = cells.get(arm)
    if record is None:
        return MISSING
    if record["status"] != "complete":
        return Figure(status=record["status"])
    ends = record["interval"]
    figure = Figure(
        status="complete",
        score=record["score"],
        interval=None if ends is None else (ends[0], ends[1]),
        samples=len(record["samples"]),
    )
    full = reference(arm, cells)
    if full is None or full == arm or cells[full]["status"] != "complete" or record["score"] is None:
        return figure
    values, others = paired_scores(record, cells[full])
    if not values:
        return figure
    return dataclasses.replace(
        figure,
        difference=fmean(values) - fmean(others),
        difference_interval=paired_interval(values, others),
        paired=len(values),
        p_value=sign_flip_p([[value - other for value, other in zip(values, others, strict=True)]]),
    )


def mean_figure(columns: Sequence[Column], arm: Arm) -> Figure:
    """Return an arm's mean over tasks; its intervals resample the samples of each task."""
    scores = [[sample["score"] for sample in column.cells[arm]["samples"]] for column in columns]
    figures = [column.figures[arm] for column in columns]
    figure = Figure(
        status="complete",
        score=fmean(figure.score for figure in figures if figure.score is not None),
        interval=mean_of_means_interval(scores) if all(scores) else None,
        samples=sum(map(len, scores)),
    )
    differences = []
    for column in columns:
        full = reference(arm, column.cells)
        if full is None or column.figures[arm].difference is None:
            return figure
        pairs = zip(*paired_scores(column.cells[arm], column.cells[full]), strict=True)
        differences.append([score - other for score, other in pairs])
    return dataclasses.replace(
        figure,
        difference=fmean(map(fmean, differences)),
        difference_interval=mean_of_means_interval(differences),
        paired=sum(map(len, differences)),
        p_value=sign_flip_p(differences),
    )


def starred(tables: Sequence[Mapping[Arm, Figure]]) -> list[dict[Arm, Figure]]:
    """Set `differs` in the figures of a table's columns, by Holm's rule over all of them."""
    values = {
        (place, arm): figure.p_value
        for place, figures in enumerate(tables)
        for arm, figure in figures.items()
        if figure.p_value is not None
    }
    found = holm(values)
    return [
        {arm: dataclasses.replace(figure, differs=(place, arm) in found) for arm, figure in figures.items()}
        for place, figures in enumerate(tables)
    ]
