"""The report as one HTML file that loads nothing else.

The template escapes all text from records. A content security policy allows the page's two scripts only, by their
hashes, and no request to any host.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from .arms import ADAPTER, FULL, MODES, length_text
from .failures import MOST
from .gather import Report
from .plots import BARS_NOTE, distance_plots, score_plots, styles
from .tables import DISTANCES_NOTE, METHODS_NOTE, SCORES_NOTE, STARS_NOTE, costs_tables, scores_table
from .verdicts import verdicts

FOLDER = Path(__file__).parent
PLOTLY = FOLDER / "plotly-basic.min.js"  # npm's plotly.js-basic-dist-min: scatter, bar and pie


def page(report: Report) -> str:
    """Return the page."""
    looks = styles(arm for section in report.sections for arm in section.arms)
    plots, sections = [], []
    for place, section in enumerate(report.sections):
        parts = {"scores": score_plots(section, looks), "distances": distance_plots(section, looks)}
        figures = {
            name: [(f"plot-{place}-{name}-{number}", plot) for number, plot in enumerate(part)]
            for name, part in parts.items()
        }
        plots += [{"id": name, **plot.data} for part in figures.values() for name, plot in part]
        sections.append((section, figures, report.examples[place]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly, script = (path.read_text(encoding="utf-8") for path in (PLOTLY, FOLDER / "page.js"))
    return environment.get_template("page.html.j2").render(
        report=report,
        sections=sections,
        plots=plots,
        looks=looks,
        several=len({section.model for section in report.sections}) > 1,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(plotly), Markup(script)],
        hashes=[_hash(plotly), _hash(script)],
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


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
