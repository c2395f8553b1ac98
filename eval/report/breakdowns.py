"""Scores side by side: of a mode by length, of a length by mode, and of a task by the categories of its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import fmean

from .arms import MODES, Arm, length_text
from .columns import MISSING, Figure, mean_figure
from .sections import Section
from .tables import Cell, Table, figure_cell, number

CATEGORIES = ("domain", "sub_domain", "difficulty", "length", "category")  # notes of samples
_MOST_CATEGORIES = 12  # columns of a table


def breakdowns(sections: Sequence[Section]) -> list[tuple[str, Table]]:
    """Return title and table of each breakdown that the sections allow."""
    tables = []
    groups: dict[tuple[str, ...], list[Section]] = {}
    for section in sections:
        groups.setdefault((section.model, section.dtype, "length", section.mode), []).append(section)
        groups.setdefault((section.model, section.dtype, "mode", str(section.length)), []).append(section)
    several = len({section.model for section in sections}) > 1
    for (model, _, kind, _), members in sorted(groups.items(), key=lambda item: item[0][2]):
        fixed = MODES[members[0].mode] if kind == "length" else length_text(members[0].length)
        names = [length_text(s.length) if kind == "length" else MODES[s.mode] for s in members]
        common = [name for name in members[0].common if all(name in section.common for section in members)]
        if len(members) > 1 and common:
            tasks = common[0] if len(common) == 1 else f"mean of {len(common)} tasks"
            title = f"{model}: " * several + f"Score by {kind}, {fixed}: {tasks}"
            tables.append((title, _means(members, names, common)))
    for section in sections:
        tables += [(f"{section.model}: " * several + title, table) for title, table in _categories(section)]
    return tables


def _means(sections: Sequence[Section], names: Sequence[str], common: Sequence[str]) -> Table:
    arms = _ordered(arm for section in sections for arm in section.arms)
    rows = [(arm, tuple(figure_cell(_mean(section, arm, common)) for section in sections)) for arm in arms]
    return Table(("Method", *names), tuple(rows))


def _mean(section: Section, arm: Arm, common: Sequence[str]) -> Figure:
    """Return an arm's mean over some of the tasks that a section's means are over."""
    if arm not in section.mean or section.mean[arm].score is None or len(common) == len(section.common):
        return dataclasses.replace(section.mean.get(arm, MISSING), differs=False)  # its star is of another table
    return mean_figure([column for column in section.scores if column.name in common], arm)


def _categories(section: Section) -> list[tuple[str, Table]]:
    tables = []
    for column in section.scores:
        for note in CATEGORIES:
            scores: dict[Arm, dict[str, list[float]]] = {}
            for arm in (arm for arm in section.arms if column.complete(arm)):
                for sample in column.cells[arm]["samples"]:
                    if isinstance(name := sample["notes"].get(note), str):
                        scores.setdefault(arm, {}).setdefault(name, []).append(sample["score"])
            counts: dict[str, int] = {}
            for found in scores.values():
                for name, values in found.items():
                    counts[name] = max(counts.get(name, 0), len(values))
            if len(counts) < 2:
                continue
            shown = sorted(counts, key=lambda name: (-counts[name], name))[:_MOST_CATEGORIES]
            title = f"{column.name} by {note}, {section.title}"
            title += f": the {_MOST_CATEGORIES} largest of {len(counts)}" if len(counts) > len(shown) else ""
            rows = [(arm, tuple(_cell(scores[arm].get(name)) for name in shown)) for arm in scores]
            header = ("Method", *(f"{name} ({counts[name]} sample{'s' if counts[name] > 1 else ''})" for name in shown))
            tables.append((title, Table(header, tuple(rows))))
    return tables


def _cell(values: Sequence[float] | None) -> Cell:
    return Cell(number(mean := fmean(values), percent=True), value=mean) if values else Cell("-")


def _ordered(arms: Iterable[Arm]) -> list[Arm]:
    return sorted(set(arms), key=lambda arm: arm.order)
