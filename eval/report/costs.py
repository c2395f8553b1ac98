"""Time, memory and bytes read of each arm, as means over tasks and as ratios to the full cache's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

from .arms import Arm
from .columns import MISSING, Column, Figure, reference
from .provenance import machine

# Key of CostDict, title, kind of unit.
COSTS: tuple[tuple[str, str, Literal["seconds", "bytes", "rate", "count"]], ...] = (
    ("first_token_seconds", "Time to first token", "seconds"),
    ("compression_seconds", "Compression", "seconds"),
    ("step_seconds", "Time per output token, median", "seconds"),
    ("step_seconds_p95", "Time per output token, p95", "seconds"),
    ("tokens_per_second", "Throughput of decoding", "rate"),
    ("batch_size", "Batch", "count"),
    ("peak_prefill_bytes", "Peak memory, prefill", "bytes"),
    ("peak_decode_bytes", "Peak memory, decode", "bytes"),
    ("kv_bytes", "KV cache with index", "bytes"),
    ("step_bytes", "Bytes read per step", "bytes"),
    ("nominal_step_bytes", "Bytes read per step (16-bit)", "bytes"),
)


class Cost(NamedTuple):
    """A cost and its ratio to the full cache's on the same tasks; None if it was not measured."""

    value: float | None
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a section's arms on one machine.

    Attributes:
        machine: its hardware; empty if all records come from one machine.
        source: names of the tasks that costs are means over: `latency` alone if it was run.
        rows: by arm, then by the key of `COSTS`; an arm that lacks one of the tasks has no row.
        out_of_memory: arms without a row because memory did not suffice.
    """

    machine: str
    source: tuple[str, ...]
    rows: Mapping[Arm, Mapping[str, Cost]]
    out_of_memory: tuple[Arm, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark in the plots: an arm's mean over the common tasks, and its costs there.

    Attributes:
        arm: the arm.
        figure: its mean score.
        memory_share: bytes of its cache, index included, as a share of the full cache's.
        step_seconds: per output token.
        step_bytes: read per decode step in the model's dtype, including index, scales and an oracle's scores.
    """

    arm: Arm
    figure: Figure
    memory_share: float | None
    step_seconds: float | None
    step_bytes: float | None


def costs_of(columns: Sequence[Column], arms: Sequence[Arm]) -> tuple[Costs, ...]:
    """Return the costs of the arms as means over tasks, apart for each machine; that with most arms first."""
    machines = sorted({machine(record) for column in columns for record in column.cells.values()})
    if len(machines) < 2:
        return (_costs("", columns, arms),)
    apart = [_costs(name, [_on(name, column) for column in columns], arms) for name in machines]
    return tuple(sorted(apart, key=lambda costs: -len(costs.rows)))


def _on(name: str, column: Column) -> Column:
    """Return a task with the records of one machine."""
    cells = {arm: record for arm, record in column.cells.items() if machine(record) == name}
    figures = {arm: figure if arm in cells else MISSING for arm, figure in column.figures.items()}
    return dataclasses.replace(column, cells=cells, figures=figures)


def _costs(name: str, columns: Sequence[Column], arms: Sequence[Arm]) -> Costs:
    columns = [column for column in columns if column.cells]
    status = {arm: {column.figures[arm].status for column in columns} for arm in arms}
    measured = [arm for arm in arms if status[arm] == {"complete"}]
    return Costs(
        machine=name,
        source=tuple(column.name for column in columns),
        rows={arm: cost_row(columns, arm, reference(arm, measured)) for arm in measured},
        out_of_memory=tuple(arm for arm in arms if "out_of_memory" in status[arm]),
    )


def cost_row(columns: Sequence[Column], arm: Arm, full: Arm | None) -> dict[str, Cost]:
    """Return every cost of an arm, with its ratio to that of `full`."""
    row = {}
    for key, _, _ in COSTS:
        value = _mean_cost(columns, arm, key)
        row[key] = Cost(value, _ratio(value, None if full is None else _mean_cost(columns, full, key)))
    return row


def make_point(arm: Arm, figure: Figure, columns: Sequence[Column], costs: Costs) -> Point:
    """Return an arm's mark in the plots."""
    return Point(
        arm=arm,
        figure=figure,
        memory_share=memory_share(columns, arm),
        step_seconds=costs.rows[arm]["step_seconds"].value if arm in costs.rows else None,
        step_bytes=_mean_cost(columns, arm, "step_bytes"),
    )


def _mean_cost(columns: Sequence[Column], arm: Arm, key: str) -> float | None:
    """Return the mean over tasks, None if one of them lacks it."""
    costs: list[Mapping[str, Any]] = [column.cells[arm]["cost"] for column in columns]
    return _mean([cost.get(key) for cost in costs])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if values and len(known) == len(values) else None


def memory_share(columns: Sequence[Column], arm: Arm) -> float | None:
    """Return the bytes of an arm's cache over those of the full arm, as a mean over tasks; None if one lacks them.

    A kvpress press reports only the bytes that it kept, so its own `full_kv_bytes` serves only without a full arm.
    """
    return _mean([_memory_share(column, arm) for column in columns])


def _memory_share(column: Column, arm: Arm) -> float | None:
    cost, full = column.cells[arm]["cost"], reference(arm, column.cells)
    whole = cost.get("full_kv_bytes") if full is None else column.cells[full]["cost"].get("kv_bytes")
    return _ratio(cost.get("kv_bytes"), whole)


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
