"""The report's tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .arms import MODES
from .gather import Report
from .tables import DISTANCES_NOTE, METHODS_NOTE, SCORES_NOTE, Table, costs_tables, scores_table
from .verdicts import verdicts


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    lines = ["# Evaluation of KV-cache compression", ""]
    lines += [f"- {name}: {escaped(text)}" for name, text in report.facts]
    lines += ["", METHODS_NOTE]
    lines += [f"\n**{escaped(warning)}**" for warning in report.provenance.warnings]
    for section in report.sections:
        lines += ["", f"## {escaped(section.model)}, {section.title}"]
        tables: list[tuple[str, Table, str]] = []
        if section.scores:
            tables.append((f"Scores, {section.title}", scores_table(section, section.scores), SCORES_NOTE))
        if section.distances:
            tables.append((f"Distances, {section.title}", scores_table(section, section.distances), DISTANCES_NOTE))
        tables += [(title, table, escaped(note)) for title, table, note in costs_tables(section)]
        lines += ["", *(f"- **{escaped(name)}**: {escaped(text)}" for name, text in verdicts(section))]
        for title, table, note in tables:
            lines += ["", f"### {escaped(title)}", "", _table(table), "", note]
        lines += ["", *(f"- {escaped(note)}" for note in section.notes)] if section.notes else []
    for title, table in report.breakdowns:
        lines += ["", f"## {escaped(title)}", "", _table(table)]
    for depths in report.maps:
        lines += ["", f"## Scores by depth: {escaped(depths.task)}, {escaped(depths.model)}, {MODES[depths.mode]}"]
        for arm in depths.arms:
            header = ["Depth", *(f"{length} tokens" for length in depths.lengths)]
            rows = [[depth, *(depths.text(arm, depth, n) for n in depths.lengths)] for depth in depths.depths]
            lines += ["", f"### {escaped(arm.name)}", "", markdown_table(header, rows)]
    if report.failures:
        lines += ["", "## Cells without a result", ""]
        lines += [f"- {f.status}: {escaped(f.summary)}: {escaped('; '.join(f.cells))}" for f in report.failures]
    facts = [(name, "; ".join(values)) for name, values in report.provenance.facts]
    lines += ["", "## Provenance", "", markdown_table(("Fact", "Value"), facts)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> str:
    return markdown_table(table.header, [[arm.name, *map(str, cells)] for arm, cells in table.rows])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; its cells are shown as they are."""
    head, *body = ["| " + " | ".join(map(escaped, row)) + " |" for row in (header, *rows)]
    return "\n".join([head, "|--" * len(header) + "|", *body])


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is: no image, link, emphasis, HTML or further column comes of it."""
    return re.sub(r"([\\`*~\[\]<>|&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
