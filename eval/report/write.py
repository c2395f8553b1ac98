"""The report of an evaluation: records in, one page out (.html), or its tables as Markdown (.md) or CSV (.csv)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records as stored
from ..records import CostDict, Record
from .arms import Arm
from .provenance import DepthMap, Provenance, depth_maps, provenance
from .tables import COSTS, LATENCY, MODES, Column, Figure, Section, length_text, sections
from .text import (
    DISTANCES_NOTE,
    METHODS_NOTE,
    SCORES_NOTE,
    Table,
    arm_text,
    costs_source,
    costs_table,
    differs,
    map_table,
    mean_title,
    score_text,
    scores_table,
    signed,
)

_WIDTH = 100  # of a summary, in characters


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report says.

    Attributes:
        facts: of its head, name and text.
        sections: what is compared.
        maps: needles by depth and length.
        origin: where the records come from.
    """

    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    maps: tuple[DepthMap, ...]
    origin: Provenance


def load(results: Path) -> list[Record]:
    """Read every record below a folder of results.

    Raises:
        ValueError: there is none, or one is damaged.
    """
    found = list(stored.records(results))
    if not found:
        raise ValueError(f"results must be a folder with records, found none below {results / stored.CELLS}")
    return found


def write_report(results: Path, output: Path) -> None:
    """Write the report of a folder of results, in the format that the suffix of `output` names.

    Raises:
        ValueError: there are no records, one is damaged, or the suffix is none of .html, .md, .csv.
        ImportError: plotly, which draws the page's plots, is not installed.
    """
    if output.suffix not in (".html", ".md", ".csv"):
        raise ValueError(f"output must end in .html, .md or .csv, got {output.name!r}; choose a format by its suffix")
    report = gather(load(results))
    if output.suffix == ".html":
        from .page import page  # here: needs plotly

        text = page(report)
    else:
        text = markdown(report) if output.suffix == ".md" else csv_text(report)
    stored.write_atomically(output, text)


def gather(records: Sequence[Record]) -> Report:
    """Compute all that a report says."""
    parts = sections(records)
    cells = [record["cell"] for record in records]
    asked = [record for record in records if record["cell"]["task"] != LATENCY]
    samples = sorted({len(record["samples"]) for record in asked if record["samples"]}) or [0]
    lengths = sorted({cell["length"] for cell in cells if cell["length"]})
    own = any(cell["length"] is None for cell in cells)
    facts = (
        ("Model", ", ".join(sorted({f"{cell['model']} ({cell['dtype']})" for cell in cells}))),
        ("Mode", ", ".join(MODES[mode] for mode in sorted({cell["mode"] for cell in cells}))),
        ("Tasks", ", ".join(sorted({record["cell"]["task"] for record in asked})) or LATENCY),
        ("Lengths", ", ".join([*map(length_text, lengths), *([length_text(None)] if own else [])])),
        ("Samples", " to ".join(str(n) for n in dict.fromkeys(samples[:1] + samples[-1:])) + " per task and method"),
        ("Date", max(record["provenance"]["created"] for record in records)[:10]),
    )
    return Report(facts=facts, sections=tuple(parts), maps=tuple(depth_maps(records)), origin=provenance(records))


def summary(records: Sequence[Record]) -> str:
    """Return scores and differences as text for a terminal: a table for each model, length and mode."""
    blocks = []
    for section in sections(records):
        blocks.append(
            f"{section.model}, {section.title}: score (difference to full, * where its interval leaves out 0)"
        )
        columns = [
            [column.name, *(_short(column.figures[arm], percent=column.higher_is_better) for arm in section.arms)]
            for column in (*section.scores, *section.distances)
        ]
        if section.has_mean:
            columns.insert(0, [mean_title(section), *(_short(section.mean[arm]) for arm in section.arms)])
        blocks += _fitted(["", *map(arm_text, section.arms)], columns)
        blocks += [f"  {note}" for note in section.notes]
    return "\n".join(_printable(line) for line in blocks)


def _short(figure: Figure, *, percent: bool = True) -> str:
    if figure.difference is None:
        return score_text(figure, percent=percent)
    mark = "*" if differs(figure) else ""
    return f"{score_text(figure, percent=percent)} ({signed(figure.difference, percent=percent)}{mark})"


def _fitted(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, below each other in blocks where they are too many for a terminal."""
    first = max(map(len, names))
    lines: list[str] = []
    block: list[tuple[int, Sequence[str]]] = []
    for column in [*columns, None]:
        width = max(map(len, column)) if column else 0
        if block and (column is None or first + width + 2 + sum(w + 2 for w, _ in block) > _WIDTH):
            for place, name in enumerate(names):
                cells = "".join(f"  {cells[place]:>{w}}" for w, cells in block)
                lines.append(f"{name:<{first}}{cells}".rstrip())
            block = []
        if column:
            block.append((width, column))
    return lines


def _printable(text: str) -> str:
    """Return a text without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def markdown(report: Report) -> str:
    """Return the report's tables as Markdown."""
    lines = ["# Evaluation of KV-cache compression", ""]
    lines += [f"- {name}: {_md(text)}" for name, text in report.facts]
    lines += ["", METHODS_NOTE]
    lines += [f"\n**{_md(warning)}**" for warning in report.origin.warnings]
    for section in report.sections:
        lines += ["", f"## {_md(section.model)}, {section.title}"]
        if section.scores:
            table = scores_table(section, section.scores)
            lines += [*_md_table("Scores", section, table), "", SCORES_NOTE]
        if section.distances:
            table = scores_table(section, section.distances)
            lines += [*_md_table("Distances", section, table), "", DISTANCES_NOTE]
        if section.costs.source:
            lines += [*_md_table("Cost", section, costs_table(section)), "", _md(costs_source(section))]
        lines += ["", *(f"- {_md(note)}" for note in section.notes)] if section.notes else []
    for depths in report.maps:
        lines += ["", f"## Scores by depth: {_md(depths.task)}, {_md(depths.model)}, {MODES[depths.mode]}"]
        for arm in depths.arms:
            lines += ["", f"### {_md(arm_text(arm))}", *_md_rows(map_table(depths, arm))]
    facts = tuple((name, "; ".join(values)) for name, values in report.origin.facts)
    lines += ["", "## Provenance", *_md_rows(Table(("Fact", "Value"), facts))]
    return "\n".join(lines) + "\n"


def _md_table(title: str, section: Section, table: Table) -> list[str]:
    return ["", f"### {title}, {section.title}", *_md_rows(table)]


def _md_rows(table: Table) -> list[str]:
    rows = ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in (table.header, *table.rows)]
    return ["", rows[0], "|--" * len(table.header) + "|", *rows[1:]]


def _md(text: str) -> str:
    """Return a text that Markdown shows as it is: no image, emphasis, HTML or further column comes of it."""
    return re.sub(r"([\\`*~\[\]<>|&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


_COSTS = tuple(CostDict.__annotations__)
_CSV_HEADER = (
    *("model", "dtype", "length", "mode", "task", "metric", "method", "token_budget", "settings", "adapter", "status"),
    *("score", "score_low", "score_high", "samples"),
    *("difference", "difference_low", "difference_high", "paired_samples"),
    *_COSTS,
    *(f"{key}_ratio" for key, _, _ in COSTS),
    "values",
)


def csv_text(report: Report) -> str:
    """Return a row for each cell, and for each mean (task `mean`), in full precision; unknown figures are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for section in report.sections:
        for column in (*section.scores, *section.distances, *section.latency):
            for arm in section.arms:
                writer.writerow(_csv_row(section, arm, column.name, column.metric, column.figures[arm], column))
        for arm in section.arms if section.scores else ():
            metric = f"mean over {len(section.common)} of {len(section.scores)} tasks"
            writer.writerow(_csv_row(section, arm, "mean", metric, section.mean[arm], None))
    return file.getvalue()


def _csv_row(
    section: Section, arm: Arm, task: str, metric: str, figure: Figure, column: Column | None
) -> list[str | int | float | None]:
    record = column.cells.get(arm) if column else None
    cost: dict[str, Any] = dict(record["cost"]) if record else {}
    ratios = column.cost_ratios(arm) if column else {}
    return [
        *(_cell(section.model), section.dtype, section.length, section.mode, _cell(task), _cell(metric)),
        *(_cell(arm.method), arm.token_budget, _cell(arm.settings), "yes" if arm.adapter else "no", figure.status),
        *(figure.score, *(figure.interval or (None, None)), figure.samples),
        *(figure.difference, *(figure.difference_interval or (None, None)), figure.paired),
        *(cost.get(key) for key in _COSTS),
        *(ratios.get(key) for key, _, _ in COSTS),
        json.dumps(record["values"], sort_keys=True) if record and record["values"] else None,
    ]


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
