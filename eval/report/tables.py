"""What a report says, computed once: records of cells in, plain rows out; every output prints these figures.

A section is what is compared: one model, one length, one mode. An arm is a method at a budget; its scores are compared
with the full cache's on the samples that both have, by id and prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ..intervals import Interval, mean_of_means_interval, paired_interval
from ..records import Record
from .arms import FULL, Arm, arms_of, column_key, column_names, grouped, with_metrics

LATENCY = "latency"  # the task whose records hold the times, where there are any

MODES = {"aware": "question-aware", "agnostic": "question-agnostic"}

Status = Literal["complete", "out_of_memory", "missing"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A score and how far it is from the full cache's.

    Attributes:
        status: of its cell; the rest is None where that is not `complete`.
        score: the record's.
        interval: 95 %, of the score.
        samples: that the score is a mean of.
        difference: mean over the samples that `full` has too, None where there are none.
        difference_interval: 95 %, paired.
        paired: number of those samples.
    """

    status: Status
    score: float | None = None
    interval: Interval | None = None
    samples: int = 0
    difference: float | None = None
    difference_interval: Interval | None = None
    paired: int = 0


MISSING = Figure(status="missing")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A task of a section.

    Attributes:
        name: the task's, with what tells it from others of that name.
        task: the task's name.
        metric: what the scores are.
        higher_is_better: whether they are scores from 0 to 100; otherwise a distance, lower is better.
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
        """Names of further figures in its records."""
        return tuple(sorted({name for record in self.cells.values() for name in record["values"]}))

    def cost_ratios(self, arm: Arm) -> dict[str, float | None]:
        """Return an arm's costs here by those of the full cache here."""
        full = reference(arm, self.cells)
        if arm not in self.cells or full is None:
            return {}
        return {key: figure.ratio for key, figure in _cost_row([self], arm, full).items()}

    def complete(self, arm: Arm) -> bool:
        """Say whether an arm has a score here."""
        return self.figures[arm].score is not None


@dataclass(frozen=True)
class CostFigure:
    """A cost, and its ratio to the full cache's on the same tasks; None where it was not measured."""

    value: float | None
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the arms of a section cost.

    Attributes:
        source: names of the tasks that the figures are means over: `latency` alone where it was run.
        rows: by arm, then by the key of `COSTS`; an arm that lacks one of the tasks has no row.
        out_of_memory: arms that have none because memory did not suffice.
    """

    source: tuple[str, ...]
    rows: Mapping[Arm, Mapping[str, CostFigure]]
    out_of_memory: tuple[Arm, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm in the plots: its mean score over the common tasks, and what it costs on them.

    Attributes:
        arm: which.
        figure: the score.
        memory_share: bytes of its cache, index counted, of those of a full cache.
        step_seconds: per output token.
        step_bytes: read by a decode step, index, scales and an oracle's scores counted, in the model's dtype.
    """

    arm: Arm
    figure: Figure
    memory_share: float | None
    step_seconds: float | None
    step_bytes: float | None


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
        common: tasks of `scores` that every arm with a mean has; means and plots are over these. An arm has a mean
            where it has a score and memory sufficed for every task.
        mean: the mean over them, by arm.
        costs: what the arms cost.
        points: for the plots.
        notes: what a reader must know.
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
    costs: Costs
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def has_mean(self) -> bool:
        """Whether there is more than one task to take the mean over."""
        return len(self.scores) > 1

    @property
    def title(self) -> str:
        """Its length and mode."""
        return f"{length_text(self.length)}, {MODES[self.mode]}"


# Key of CostDict, title, kind of unit.
COSTS: tuple[tuple[str, str, Literal["seconds", "bytes"]], ...] = (
    ("first_token_seconds", "Time to first token", "seconds"),
    ("compression_seconds", "Compression", "seconds"),
    ("step_seconds", "Time per output token, median", "seconds"),
    ("step_seconds_p95", "Time per output token, p95", "seconds"),
    ("peak_prefill_bytes", "Peak memory, prefill", "bytes"),
    ("peak_decode_bytes", "Peak memory, decode", "bytes"),
    ("kv_bytes", "KV cache with index", "bytes"),
    ("step_bytes", "Read per step", "bytes"),
    ("nominal_step_bytes", "Read per step, as budgets count", "bytes"),
)


def length_text(length: int | None) -> str:
    """Return how a length is called."""
    return "the data's own lengths" if length is None else f"{length} tokens"


def sections(records: Sequence[Record]) -> list[Section]:
    """Compare records: one section for each model, mode and length."""
    known = with_metrics(records)
    groups = grouped(known, lambda r: (r["cell"]["model"], r["cell"]["dtype"], r["cell"]["mode"], _length(r)))
    return [_section(members) for _, members in sorted(groups.items())]


def paired_scores(record: Record, reference: Record) -> tuple[list[float], list[float]]:
    """Return the scores of the samples that two records have in common: same id, same prompt."""
    theirs = {sample["id"]: sample for sample in reference["samples"]}
    pairs = [
        (sample["score"], theirs[sample["id"]]["score"])
        for sample in record["samples"]
        if sample["id"] in theirs and theirs[sample["id"]]["prompt_sha256"] == sample["prompt_sha256"]
    ]
    return [own for own, _ in pairs], [other for _, other in pairs]


def _length(record: Record) -> tuple[bool, int]:
    length = record["cell"]["length"]
    return length is None, length or 0


def _section(records: Sequence[Record]) -> Section:
    cells: dict[Any, dict[Arm, Record]] = {}
    notes: list[str] = []
    for record, arm in zip(records, arms_of(records), strict=True):
        column = cells.setdefault(column_key(record), {})
        if arm in column:
            notes.append(f"{arm.name} on {record['cell']['task']}: of two records, the one with more samples is shown.")
        column[arm] = max(column[arm], record, key=_worth) if arm in column else record
    keys = sorted(cells, key=lambda key: (key[0], repr(key)))
    arms = tuple(sorted({arm for column in cells.values() for arm in column}, key=lambda arm: arm.order))
    columns = [_column(name, key, cells[key], arms) for name, key in zip(column_names(keys), keys, strict=True)]
    latency = tuple(column for column in columns if column.task == LATENCY)
    scores = tuple(column for column in columns if column.higher_is_better and column not in latency)
    distances = tuple(column for column in columns if not column.higher_is_better and column not in latency)
    notes += [note for column in (*scores, *distances) for note in _pairing_notes(column, arms)]

    asked = [column for column in scores if any(column.complete(arm) for arm in arms)]
    too_large = [arm for arm in arms if any(column.figures[arm].status == "out_of_memory" for column in asked)]
    scored = [arm for arm in arms if arm not in too_large and any(column.complete(arm) for column in scores)]
    common = tuple(column for column in scores if all(column.complete(arm) for arm in scored))
    notes += _common_notes(scores, common, scored, too_large)
    mean = {arm: _mean(common, arm) if arm in scored and common else MISSING for arm in arms}
    mean |= {arm: Figure(status="out_of_memory") for arm in too_large}
    costs = _costs(latency or common or scores or distances, arms)
    points = tuple(_point(arm, mean[arm], common, costs) for arm in scored if common)
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
        points=points,
        notes=tuple(dict.fromkeys(notes)),
    )


def _worth(record: Record) -> tuple[bool, int, str]:
    return record["status"] == "complete", len(record["samples"]), record["provenance"]["created"]


def reference(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """Return the full cache's arm: of the same settings where there are several."""
    full = [other for other in arms if other.method == FULL]
    return max(full, key=lambda other: other.settings == arm.settings) if full else None


def _column(name: str, key: Any, cells: Mapping[Arm, Record], arms: Sequence[Arm]) -> Column:
    figures = {arm: _figure(arm, cells) for arm in arms}
    return Column(name=name, task=key[0], metric=key[2], higher_is_better=key[3], cells=cells, figures=figures)


def _figure(arm: Arm, cells: Mapping[Arm, Record]) -> Figure:
    record = cells.get(arm)
    if record is None:
        return MISSING
    if record["status"] == "out_of_memory":
        return Figure(status="out_of_memory")
    own = record["interval"]
    figure = Figure(
        status="complete",
        score=record["score"],
        interval=None if own is None else (own[0], own[1]),
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
    )


def _mean(common: Sequence[Column], arm: Arm) -> Figure:
    """Return the mean over tasks; its intervals resample the samples of each task."""
    own = [[sample["score"] for sample in column.cells[arm]["samples"]] for column in common]
    figures = [column.figures[arm] for column in common]
    figure = Figure(
        status="complete",
        score=fmean(figure.score for figure in figures if figure.score is not None),
        interval=mean_of_means_interval(own) if all(own) else None,
        samples=sum(map(len, own)),
    )
    if any(figure.difference is None for figure in figures):
        return figure
    fulls = [reference(arm, column.cells) for column in common]
    pairs = [
        paired_scores(column.cells[arm], column.cells[full])
        for column, full in zip(common, fulls, strict=True)
        if full is not None
    ]
    differences = [[a - b for a, b in zip(values, others, strict=True)] for values, others in pairs]
    return dataclasses.replace(
        figure,
        difference=fmean(map(fmean, differences)),
        difference_interval=mean_of_means_interval(differences),
        paired=sum(map(len, differences)),
    )


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
            + (f"compared on the {figure.paired} that both have." if figure.paired else "none in common: not compared.")
        )
    return notes


def _common_notes(
    scores: Sequence[Column], common: Sequence[Column], scored: Sequence[Arm], too_large: Sequence[Arm]
) -> list[str]:
    left_out = [column for column in scores if column not in common]
    lacking = {column.name: [arm.name for arm in scored if not column.complete(arm)] for column in left_out}
    notes = [f"Not in the mean: {name}, without a score of {', '.join(names)}." for name, names in lacking.items()]
    if too_large:
        names = ", ".join(arm.name for arm in too_large)
        notes.append(f"Without a mean, because memory did not suffice for every task: {names}.")
    return notes


def _cost(sources: Sequence[Column], arm: Arm, key: str) -> float | None:
    """Return the mean over tasks of a cost, None where one of them lacks it."""
    costs: list[Mapping[str, Any]] = [column.cells[arm]["cost"] for column in sources]
    values = [cost[key] for cost in costs if cost.get(key) is not None]
    return fmean(values) if sources and len(values) == len(sources) else None


def _costs(sources: Sequence[Column], arms: Sequence[Arm]) -> Costs:
    status = {arm: {column.figures[arm].status for column in sources} for arm in arms}
    measured = [arm for arm in arms if sources and status[arm] == {"complete"}]
    return Costs(
        source=tuple(column.name for column in sources),
        rows={arm: _cost_row(sources, arm, reference(arm, measured)) for arm in measured},
        out_of_memory=tuple(arm for arm in arms if "out_of_memory" in status[arm]),
    )


def _cost_row(sources: Sequence[Column], arm: Arm, full: Arm | None) -> dict[str, CostFigure]:
    row = {}
    for key, _, _ in COSTS:
        value = _cost(sources, arm, key)
        row[key] = CostFigure(value, ratio(value, None if full is None else _cost(sources, full, key)))
    return row


def ratio(value: float | None, reference: float | None) -> float | None:
    """Return `value / reference`, None where one is not known or there is nothing to divide by."""
    return None if value is None or not reference else value / reference


def _memory_share(column: Column, arm: Arm) -> float | None:
    """Return an arm's cache by the full one of the same task: a press's own knows only what it has kept."""
    cost, full = column.cells[arm]["cost"], reference(arm, column.cells)
    whole = cost.get("full_kv_bytes") if full is None else column.cells[full]["cost"].get("kv_bytes")
    return ratio(cost.get("kv_bytes"), whole)


def _point(arm: Arm, figure: Figure, common: Sequence[Column], costs: Costs) -> Point:
    time = costs.rows[arm]["step_seconds"].value if arm in costs.rows else None
    shares = [_memory_share(column, arm) for column in common]
    known = [share for share in shares if share is not None]
    return Point(
        arm=arm,
        figure=figure,
        memory_share=fmean(known) if len(known) == len(shares) else None,
        step_seconds=time,
        step_bytes=_cost(common, arm, "step_bytes"),
    )
