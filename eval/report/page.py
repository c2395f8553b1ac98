"""The report as one HTML page that needs nothing beside it: no other file, no other host.

Whatever comes out of records is escaped where it is put in, and a content security policy lets the browser run the
page's own two scripts alone, by their hashes, and ask no host for anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence

from .arms import FULL, Arm
from .plots import Plot, Style, distance_plots, score_plots, styles
from .provenance import DepthMap
from .style import CSS, JS
from .tables import COSTS, MODES, Column, Figure, Section
from .text import (
    ADAPTER,
    DISTANCES_NOTE,
    METHODS_NOTE,
    SCORES_NOTE,
    arm_text,
    cost_texts,
    cost_units,
    costs_source,
    difference_text,
    differs,
    map_text,
    mean_title,
    score_text,
    signed,
    value_text,
)
from .write import Report

_WIDE = 9  # columns; a table of more is printed across
# On a square of 12 by 12, as plotly draws them.
_MARKS = {
    "circle": '<circle cx="6" cy="6" r="5"/>',
    "square": '<rect x="1.2" y="1.2" width="9.6" height="9.6"/>',
    "diamond": '<path d="M6 0l6 6-6 6-6-6z"/>',
    "triangle-up": '<path d="M6 .5l6 10.5H0z"/>',
    "triangle-down": '<path d="M6 11.5L0 1h12z"/>',
    "cross": '<path d="M4 0h4v4h4v4H8v4H4V8H0V4h4z"/>',
    "x": '<path d="M3 .2L6 3.2l3-3L11.8 3l-3 3 3 3L9 11.8l-3-3-3 3L.2 9l3-3-3-3z"/>',
}


def page(report: Report) -> str:
    """Return the page.

    Raises:
        ImportError: plotly is not installed.
    """
    plotly = _plotly()
    looks = styles(arm for section in report.sections for arm in section.arms)
    several = len({section.model for section in report.sections}) > 1
    plots: list[tuple[str, Plot]] = []
    bodies = []
    for place, section in enumerate(report.sections):
        own = [(f"plot-{place}-{n}", p) for n, p in enumerate(score_plots(section, looks))]
        far = [(f"plot-{place}-d{n}", p) for n, p in enumerate(distance_plots(section, looks))]
        bodies.append(_section(f"section-{place}", section, looks, own, far, several=several))
        plots += own + far
    bodies += [_map(f"map-{place}", depths, looks, several=several) for place, depths in enumerate(report.maps)]
    data = ",".join(f'{{"id":"{name}",{plot.json[1:]}' for name, plot in plots)
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_hash(plotly)} {_hash(JS)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_h(_title(report))}</title>
<style>{CSS}</style>
</head>
<body>
{_head(report, several=several)}
<main>
{"".join(bodies)}
{_origin(report)}
</main>
<script type="application/json" id="plots">[{data}]</script>
<script>{plotly}</script>
<script>{JS}</script>
</body>
</html>
"""


def _plotly() -> str:
    """Return plotly's script."""
    try:
        from plotly.offline import get_plotlyjs  # here: an optional dependency
    except ImportError as error:
        raise ImportError(
            "the page of a report needs plotly: pip install 'rocketkv[eval]'; or write .md, .csv"
        ) from error
    return str(get_plotlyjs())


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _h(text: str) -> str:
    return html.escape(text)


def _typographic(text: str) -> str:
    """Return figures with a minus sign in place of the hyphen."""
    return _h(text).replace("-", "\u2212") if text != "-" else "-"


def _title(report: Report) -> str:
    return f"KV-cache compression: {dict(report.facts)['Model']}"


def _head(report: Report, *, several: bool) -> str:
    facts = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(text)}</dd></div>" for name, text in report.facts)
    warnings = "".join(
        f'<p class="warning"><strong>Note.</strong> {_h(warning)}</p>' for warning in report.origin.warnings
    )
    links = [(f"section-{n}", _section_name(s, several=several)) for n, s in enumerate(report.sections)]
    links += [(f"map-{n}", f"{m.task} by depth, {MODES[m.mode]}") for n, m in enumerate(report.maps)]
    links.append(("origin", "Provenance"))
    items = "".join(f'<li><a href="#{name}">{_h(text)}</a></li>' for name, text in links)
    return f"""<header>
<h1>Evaluation of KV-cache compression</h1>
<p class="lead">How much of the full cache&#8217;s accuracy each method keeps, and what it costs.</p>
<dl class="facts">{facts}</dl>
<p class="note">{_h(METHODS_NOTE)}</p>
{warnings}
<noscript><p class="warning">The plots need JavaScript; all their figures are in the tables.</p></noscript>
</header>
<nav aria-label="Contents"><ul>{items}</ul></nav>"""


def _section_name(section: Section, *, several: bool) -> str:
    return f"{section.model}: {section.title}" if several else section.title


def _note(text: str) -> str:
    return f'<p class="note">{_h(text)}</p>'


def _badge(mode: str) -> str:
    return f'<span class="mode">{_h(MODES[mode])}</span>'


def _section(
    name: str,
    section: Section,
    looks: dict[str, Style],
    plots: Sequence[tuple[str, Plot]],
    far: Sequence[tuple[str, Plot]],
    *,
    several: bool,
) -> str:
    title = section.title.rsplit(", ", 1)[0]
    title = title[0].upper() + title[1:]
    parts = [f'<section id="{name}"><h2>{_h(title)}{_badge(section.mode)}</h2>']
    if several:
        parts.append(f'<p class="note">{_h(section.model)}, {_h(section.dtype)}</p>')
    if plots or far:
        parts.append(_legend(section, looks))
    if plots:
        tasks = section.common
        over = f"Means over the {len(tasks)} tasks that all methods have" if len(tasks) > 1 else f"Scores on {tasks[0]}"
        note = f"{over}. Up and to the left is better; a larger mark is a larger budget. Dashed: full cache."
        parts.append(_part("Accuracy against cost", section, _figures(plots), _note(note)))
    if section.scores:
        table = _scores(f"Scores, {section.title}", section, section.scores, looks)
        parts.append(_part("Scores", section, table, _note(SCORES_NOTE)))
    if section.distances:
        table = _scores(f"Distances, {section.title}", section, section.distances, looks)
        parts.append(_part("Distance from the full cache", section, _figures(far), table, _note(DISTANCES_NOTE)))
    if section.notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_h(note)}</li>" for note in section.notes)}</ul>')
    if section.costs.source:
        parts.append(_part("Cost", section, _costs(section, looks), _note(costs_source(section))))
    return "\n".join([*parts, "</section>"])


def _part(title: str, section: Section, *contents: str) -> str:
    """Return a part of a section under its heading; one with a wide table is printed across."""
    wide = ' class="wide"' if any(content.count('<th scope="col"') > _WIDE for content in contents) else ""
    return f"<div{wide}><h3>{title}{_badge(section.mode)}</h3>{''.join(contents)}</div>"


def _swatch(look: Style) -> str:
    hollow = f'fill="none" stroke="{look.color}" stroke-width="2"'
    paint = f'fill="{look.color}"' if look.number else hollow
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true" {paint}>{_MARKS[look.symbol]}</svg>'


def _legend(section: Section, looks: dict[str, Style]) -> str:
    methods = dict.fromkeys((arm.method, arm.adapter) for arm in section.arms)
    items = "".join(
        f'<li><button type="button" aria-pressed="true" data-trace="m{looks[method].number}">'
        f"{_swatch(looks[method])}{_h(method)}{f' {ADAPTER}' if adapter else ''}</button></li>"
        for method, adapter in methods
    )
    return f'<ul class="legend" aria-label="Methods shown in the plots">{items}</ul>'


def _figures(plots: Sequence[tuple[str, Plot]]) -> str:
    if not plots:
        return ""
    figures = "".join(
        f'<figure><figcaption>{_h(plot.title)}</figcaption><div class="plot" id="{name}" role="img" '
        f'aria-label="{_h(plot.description)}"></div></figure>'
        for name, plot in plots
    )
    return f'<div class="plots">{figures}</div>'


def _table(title: str, heads: Sequence[str], rows: Sequence[tuple[Arm, Sequence[str]]], looks: dict[str, Style]) -> str:
    """Return a sortable table; `rows` hold their cells as HTML, heads are text."""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{_h(text).replace("_", "_<wbr>")}</button></th>'
        for text in ("Method", *heads)
    )
    lines = []
    before = None
    for place, (arm, cells) in enumerate(rows):
        first = ' class="first"' if arm.method != before else ""
        before = arm.method
        name = f'{_swatch(looks[arm.method])}<span class="arm" title="{_h(arm_text(arm))}">{_h(arm_text(arm))}</span>'
        lines.append(f'<tr{first}><th scope="row" data-value="{place}">{name}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_h(title)}"><table>'
        f"<caption>{_h(title)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _scores(title: str, section: Section, columns: Sequence[Column], looks: dict[str, Style]) -> str:
    mean = section.has_mean and columns == section.scores
    values = [(column, name) for column in columns if not column.higher_is_better for name in column.value_names]
    heads = [*([mean_title(section)] if mean else []), *(column.name for column in columns)]
    heads += [f"{column.name}: {name}" for column, name in values]
    rows = []
    for arm in section.arms:
        cells = [_score(section.mean[arm], name=' class="mean"')] if mean else []
        cells += [_score(column.figures[arm], percent=column.higher_is_better) for column in columns]
        cells += [_value(column, arm, name) for column, name in values]
        rows.append((arm, cells))
    return _table(title, heads, rows, looks)


def _score(figure: Figure, *, percent: bool = True, name: str = "") -> str:
    text = _typographic(score_text(figure, percent=percent))
    if figure.score is None:
        return f"<td{name or ' class=none'}>{text}</td>"
    below = ""
    if figure.difference is not None:
        whole, sign = difference_text(figure, percent=percent), signed(figure.difference, percent=percent)
        mark = ' class="differs"' if differs(figure) else ""
        below = f"<small{mark}>{_typographic(sign)} <span>{_typographic(whole[len(sign) :].strip())}</span></small>"
    elif figure.interval is not None:
        below = f"<small><span>{_typographic(difference_text(figure, percent=percent))}</span></small>"
    return f'<td{name} data-value="{figure.score!r}"><b>{text}</b>{below}</td>'


def _value(column: Column, arm: Arm, name: str) -> str:
    text = value_text(column, arm, name)
    value = column.cells[arm]["values"].get(name) if arm in column.cells else None
    return f'<td class="none">{text}</td>' if value is None else f'<td data-value="{value!r}">{_typographic(text)}</td>'


def _costs(section: Section, looks: dict[str, Style]) -> str:
    units = cost_units(section.costs)
    rows = []
    for arm in section.arms:
        cells = []
        for key, _, _ in COSTS:
            text, ratio = cost_texts(section, arm, key)
            value = section.costs.rows[arm][key].value if arm in section.costs.rows else None
            if value is None:
                cells.append(f'<td class="none">{text}</td>')
            else:
                below = f"<small>{_h(ratio).replace('x', '&#215;')}</small>" if ratio and arm.method != FULL else ""
                cells.append(f'<td data-value="{value!r}"><b>{text}</b>{below}</td>')
        rows.append((arm, cells))
    heads = [f"{title}, {units[key][1]}" for key, title, _ in COSTS]
    return _table(f"Cost, {section.title}", heads, rows, looks)


def _map(name: str, depths: DepthMap, looks: dict[str, Style], *, several: bool) -> str:
    methods: dict[str, list[Arm]] = {}
    for arm in depths.arms:
        methods.setdefault(arm.method, []).append(arm)
    blocks = []
    for method, arms in methods.items():
        maps = "".join(_map_table(depths, arm) for arm in arms)
        title = f"{_swatch(looks[method])}{_h(method)}{f' {ADAPTER}' if arms[0].adapter else ''}"
        blocks.append(f'<div class="method"><h4>{title}</h4><div>{maps}</div></div>')
    model = f'<p class="note">{_h(depths.model)}</p>' if several else ""
    return f"""<section id="{name}"><h2>{_h(depths.task)} by depth{_badge(depths.mode)}</h2>{model}
{_note("Mean scores by the needle's depth, from start to end of the context, and by length in tokens.")}
<div class="scale" aria-hidden="true">0<i></i>100</div>
<div class="maps">{"".join(blocks)}</div></section>"""


def _map_table(depths: DepthMap, arm: Arm) -> str:
    head = "".join(f'<th scope="col">{_h(_short_length(length))}</th>' for length in depths.lengths)
    rows = []
    for depth in depths.depths:
        cells = "".join(_map_cell(depths, arm, depth, length) for length in depths.lengths)
        rows.append(f'<tr><th scope="row">{_h(depth)}</th>{cells}</tr>')
    budget = "all tokens" if arm.token_budget is None else f"budget {arm.token_budget}"
    title = f"{budget}, {arm.settings}" if arm.settings else budget
    return (
        f'<figure class="map"><figcaption>{_h(title)}</figcaption><table><caption>{_h(arm_text(arm))}</caption>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></figure>'
    )


def _map_cell(depths: DepthMap, arm: Arm, depth: str, length: str) -> str:
    text = map_text(depths, arm, depth, length)
    found = depths.cells.get((arm, depth, length))
    if found is None or isinstance(found, str):
        return f'<td class="none">{text}</td>'
    score, samples = found
    high, low = 1.3 * max(0.0, score - 50), 1.3 * max(0.0, 50 - score)
    return f'<td style="--h:{high:.0f}%;--l:{low:.0f}%" title="{samples} samples">{text}</td>'


def _short_length(length: str) -> str:
    return f"{int(length) // 1024}K" if length.isdigit() and int(length) % 1024 == 0 else length


def _origin(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_h(name)}</th><td>{"".join(f"<div>{_h(value)}</div>" for value in values)}</td></tr>'
        for name, values in report.origin.facts
    )
    return (
        '<section id="origin"><h2>Provenance</h2><div class="origin"><table><caption>Provenance</caption><tbody>'
        f"{rows}</tbody></table></div></section>"
    )
