"""Scores of needle tasks by the needle's depth and the prompt's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ..records import Record
from .arms import MODES, Arm, arms_of, column_key, column_names, grouped, with_metrics

_MAX_DEPTHS = 11  # more are binned in tenths

Cells = dict[tuple[Arm, str, str], tuple[float, int] | Literal["OOM"]]


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """Scores of a task by the depth of its needle and the length of its prompt.

    Attributes:
        model: its name.
        task: its name, with its differences to other tasks of that name.
        mode: `aware` or `agnostic`.
        arms: in order.
        depths: names of the rows, from the start of the context to its end.
        lengths: names of the columns, in tokens.
        cells: mean score and number of samples, or `OOM`, by arm, depth and length.
    """

    model: str
    task: str
    mode: Literal["aware", "agnostic"]
    arms: tuple[Arm, ...]
    depths: tuple[str, ...]
    lengths: tuple[str, ...]
    cells: Mapping[tuple[Arm, str, str], tuple[float, int] | Literal["OOM"]]

    def text(self, arm: Arm, depth: str, length: str) -> str:
        """Return a cell as a whole number, `OOM`, or `-` if there is no record."""
        cell = self.cells.get((arm, depth, length), "-")
        return cell if isinstance(cell, str) else f"{cell[0]:.0f}"


def depth_maps(records: Sequence[Record]) -> list[DepthMap]:
    """Return a map for each task whose samples note a `depth`, a share from 0 to 1."""
    modes = list(MODES)
    parts = grouped(
        with_metrics(records), lambda r: (r["cell"]["model"], r["cell"]["dtype"], modes.index(r["cell"]["mode"]))
    )
    maps = []
    for _, part in sorted(parts.items()):
        tasks = grouped(part, column_key)
        keys = sorted(tasks, key=repr)
        for name, key in zip(column_names(keys), keys, strict=True):
            if any(_depths(record) for record in tasks[key]):
                maps.append(_depth_map(name, tasks[key]))
    return maps


def _depths(record: Record) -> list[tuple[float, float]]:
    """Return depth and score of each sample that notes a depth; none of a cell that has not ended."""
    if record["status"] != "complete":
        return []
    noted = [(sample["notes"].get("depth"), sample["score"]) for sample in record["samples"]]
    return [(float(depth), score) for depth, score in noted if isinstance(depth, int | float) and 0 <= depth <= 1]


def _depth_map(task: str, records: Sequence[Record]) -> DepthMap:
    arms = arms_of(records)
    binned = len({round(depth, 2) for record in records for depth, _ in _depths(record)}) > _MAX_DEPTHS
    scores: dict[tuple[Arm, str, str], list[float]] = {}
    starts: dict[str, float] = {}
    for arm, record in zip(arms, records, strict=True):
        for depth, score in _depths(record):
            tenth = min(int(depth * 10), 9)
            name = f"{10 * tenth}-{10 * tenth + 10} %" if binned else f"{100 * round(depth, 2):.0f} %"
            starts[name] = depth
            scores.setdefault((arm, name, _length(record)), []).append(score)
    depths = tuple(sorted(starts, key=lambda name: starts[name]))
    cells: Cells = {}
    for arm, record in zip(arms, records, strict=True):
        if record["status"] == "out_of_memory":
            cells |= {(arm, depth, _length(record)): "OOM" for depth in depths}
    cells |= {place: (fmean(values), len(values)) for place, values in scores.items()}
    lengths = sorted({record["cell"]["length"] or 0 for record in records})
    cell = records[0]["cell"]
    return DepthMap(
        model=cell["model"],
        task=task,
        mode=cell["mode"],
        arms=tuple(sorted(set(arms), key=lambda arm: arm.order)),
        depths=depths,
        lengths=tuple(str(length or "own") for length in lengths),
        cells=cells,
    )


def _length(record: Record) -> str:
    return str(record["cell"]["length"] or "own")
