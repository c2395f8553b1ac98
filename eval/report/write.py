"""Write the report of a folder of results: a page (.html), Markdown (.md), CSV (.csv), or a summary for a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import CostDict, Record, write_atomically
from .arms import Arm
from .columns import Column, Figure, reference
from .costs import COSTS, cost_row
from .examples import prompt_ends
from .gather import Report, gather
from .load import load
from .markdown import markdown
from .page import page
from .provenance import machine
from .sections import Section, sections
from .tables import figure_cell

_WIDTH = 100  # of a summary, in characters


def write_report(results: Path, output: Path) -> None:
    """Write the report of a folder of results in the format of the suffix of `output`.

    Raises:
        ValueError: there are no records, or the suffix is none of .html, .md, .csv.
        ImportError: scipy, for intervals, is not installed.
    """
    formats = {".html": page, ".md": markdown, ".csv": csv_text}
    if output.suffix not in formats:
        raise ValueError(f"output must end in .html, .md or .csv, got {output.name!r}; choose a format by its suffix")
    found = load(results)
    content = formats[output.suffix](gather(found.records, prompt_ends(results), found))
    write_atomically(output, content)


def summary(records: Sequence[Record]) -> str:
    """Return scores and differences as text for a terminal: a table for each model, length and mode."""
    lines = []
    for section in sections(records):
        lines.append(f"{section.model}, {section.title}: score (difference to full, * if significant, by Holm's rule)")
        columns = [
            [column.name, *(_short(column.figures[arm], percent=column.higher_is_better) for arm in section.arms)]
            for column in (*section.scores, *section.distances)
        ]
        if section.mean_title:
            columns.insert(0, [section.mean_title, *(_short(section.mean[arm]) for arm in section.arms)])
        lines += _aligned(["", *(arm.name for arm in section.arms)], columns)
        lines += [f"  {note}" for note in section.notes]
    # Control characters in a name could steer the terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _short(figure: Figure, *, percent: bool = True) -> str:
    cell = figure_cell(figure, percent=percent)
    return f"{cell.text} ({cell.change}{'*' if cell.differs else ''})" if cell.change else cell.text


def _aligned(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, in blocks below each other if they are wider than a terminal."""
    first = max(map(len, names))
    blocks: list[list[str]] = []
    for column in columns:
        width = max(map(len, column))
        if not blocks or len(blocks[-1][0]) + 2 + width > _WIDTH:
            blocks.append([f"{name:<{first}}" for name in names])
        blocks[-1] = [f"{line}  {cell:>{width}}" for line, cell in zip(blocks[-1], column, strict=True)]
    return [line.rstrip() for block in blocks for line in block]


def csv_text(report: Report) -> str:
    """Return a row for each cell, and for each mean (task `mean`), in full precision; unknown figures are empty."""
    rows = []
    for section in report.sections:
        for column in (*section.scores, *section.distances, *section.latency):
            rows += [
                _row(section, arm, column.name, column.metric, column.figures[arm], column) for arm in section.arms
            ]
        metric = f"mean over {len(section.common)} of {len(section.scores)} tasks"
        if section.scores:
            rows += [_row(section, arm, "mean", metric, section.mean[arm], None) for arm in section.arms]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(
    section: Section, arm: Arm, task: str, metric: str, figure: Figure, column: Column | None
) -> dict[str, str | int | float | None]:
    record = column.cells.get(arm) if column else None
    cost: dict[str, Any] = dict(record["cost"]) if record else {}
    full = reference(arm, column.cells) if column else None
    same = column and record and full and machine(column.cells[full]) == machine(record)
    ratios = cost_row([column], arm, full) if column and same else {}
    low, high = figure.interval or (None, None)
    difference_low, difference_high = figure.difference_interval or (None, None)
    return {
        "model": _plain(section.model),
        "dtype": section.dtype,
        "length": section.length,
        "mode": section.mode,
        "task": _plain(task),
        "metric": _plain(metric),
        "method": _plain(arm.method),
        "token_budget": arm.token_budget,
        "settings": _plain(arm.settings),
        "adapter": "yes" if arm.adapter else "no",
        "machine": _plain(machine(record)) if record else None,
        "status": figure.status,
        "score": figure.score,
        "score_low": low,
        "score_high": high,
        "samples": figure.samples,
        "difference": figure.difference,
        "difference_low": difference_low,
        "difference_high": difference_high,
        "paired_samples": figure.paired,
        **{key: cost.get(key) for key in CostDict.__annotations__},
        **{f"{key}_ratio": ratios[key].ratio if key in ratios else None for key, _, _ in COSTS},
        "values": json.dumps(record["values"], sort_keys=True) if record and record["values"] else None,
    }


def _plain(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
