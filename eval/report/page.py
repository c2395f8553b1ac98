"""The report as one HTML file that loads nothing else.

The template escapes all text from records. A content security policy allows two scripts only, by their hashes, and no
request to any host: the page's own, and plotly.js, which that unpacks. A page has at most 1.6 MB: a large sweep shows
fewer samples, and a page whose tables alone are larger says so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .arms import ADAPTER, FULL, MODES, length_text
from .bundle import render
from .examples import fewer, size_of
from .failures import MOST
from .gather import Report
from .plots import BARS_NOTE, distance_plots, pace_plots, score_plots, styles
from .tables import DISTANCES_NOTE, METHODS_NOTE, SCORES_NOTE, STARS_NOTE, costs_tables, scores_table
from .verdicts import verdicts

FOLDER = Path(__file__).parent
MOST_BYTES = 1_600_000
_SPARE = 20_000  # more than the excess is cut, so that few rounds suffice


def page(report: Report) -> str:
    """Return the page, with as many of the samples as it has room for."""
    text = _page(report)
    room = size_of(report.examples)
    while (excess := len(text.encode()) - MOST_BYTES) > 0 and room:
        room = max(0, room - excess - _SPARE)
        report = dataclasses.replace(report, examples=tuple(fewer(report.examples, room)))
        text = _page(report, cut=True)
    return text if excess <= 0 else _page(report, cut=True, large=True)


def _page(report: Report, *, cut: bool = False, large: bool = False) -> str:
    looks = styles(arm for section in report.sections for arm in section.arms)
    plots, sections = [], []
    for place, section in enumerate(report.sections):
        parts = {
            "scores": score_plots(section, looks),
            "distances": distance_plots(section, looks),
            "paces": pace_plots(section, looks),
        }
        figures = {
            name: [(f"plot-{place}-{name}-{number}", plot) for number, plot in enumerate(part)]
            for name, part in parts.items()
        }
        plots += [{"id": name, **plot.data} for part in figures.values() for name, plot in part]
        sections.append((section, figures, report.examples[place]))
    return render(
        FOLDER,
        report=report,
        sections=sections,
        plots=plots,
        looks=looks,
        several=len({section.model for section in report.sections}) > 1,
        cut=cut,
        large=large,
        FULL=FULL,
        ADAPTER=ADAPTER,
        MODES=MODES,
        MOST_FAILURES=MOST,
        METHODS_NOTE=METHODS_NOTE,
        SCORES_NOTE=SCORES_NOTE,
        STARS_NOTE=STARS_NOTE,
        DISTANCES_NOTE=DISTANCES_NOTE,
        BARS_NOTE=BARS_NOTE,
        verdicts=verdicts,
        length_text=length_text,
        scores_table=scores_table,
        costs_tables=costs_tables,
    )
