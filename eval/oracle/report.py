"""What the oracles found, brought together: a JSON document, a table for the terminal, heat maps and a page."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any, NamedTuple, TypedDict

from ..measures.kl import Window
from ..records import digest
from ..report.style import CSS
from .bounds import PARTS, percentile, shares
from .heatmap import Scale, heatmap_png, scale_of
from .run import HeadDict, LayerDict, Settings

SCHEMA = 1
NOTE = (
    "Tokens are those of one KV head. Needed: the fewest of largest weight with which a step's attention is within the "
    "error. Stored: those that any step needs. Errors are relative L2, mean over steps: of dense attention to what "
    "stage 1 keeps, of exact top-k of that, of the tokens that the index chooses, and of the method, its residual "
    "included. Shares are projections of each part's error vector on the whole: they add up to 1, may be negative, and "
    "every head counts alike; they say what is left, so that a part which makes the error smaller may still have one. "
    "Bounds count no scores."
)


class FiguresDict(TypedDict):
    """Figures of a head over texts, of a layer over heads and texts, or of all."""

    stored: float  # tokens, mean over heads and texts
    stored_prompt: float
    needed_mean: float  # tokens a step
    needed_median: float
    needed_p90: float
    evicted_error: float
    selected_error: float
    indexed_error: float
    method_error: float
    shares: dict[str, float] | None  # mean over the heads that have an error at all; None: none has
    pooled_shares: dict[str, float] | None  # of all heads' vectors as one, in which large errors count more


class _Map(NamedTuple):
    name: str  # of its file
    title: str
    value: Callable[[FiguresDict], float | None]
    text: Callable[[float], str]
    signed: bool = False


def _share(part: str) -> Callable[[FiguresDict], float | None]:
    return lambda figures: None if figures["shares"] is None else figures["shares"][part]


def _tokens(value: float) -> str:
    return f"{value:.0f}"


def _error(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


MAPS = (
    _Map("stored", "storage oracle, tokens", lambda figures: figures["stored"], _tokens),
    _Map("needed", "compute oracle, mean tokens a step", lambda figures: figures["needed_mean"], _tokens),
    _Map("evicted-error", "error after stage 1", lambda figures: figures["evicted_error"], _error),
    _Map("selected-error", "selection oracle, error", lambda figures: figures["selected_error"], _error),
    _Map("method-error", "error of the method", lambda figures: figures["method_error"], _error),
    *(_Map(f"share-{part}", f"share of {part} in the error", _share(part), _percent, signed=True) for part in PARTS),
)


def document(settings: Settings, windows: Sequence[Window], found: Sequence[Sequence[LayerDict]]) -> dict[str, Any]:
    """Return all figures as plain numbers: of each layer and head, of all together, and of each text.

    Args:
        settings: what was measured.
        windows: the texts.
        found: of each text, its layers.

    Raises:
        ValueError: there is no text.
    """
    if not found:
        raise ValueError("there must be a text at least, got none")
    layers = []
    for column in zip(*found, strict=True):
        heads = [list(head) for head in zip(*(layer["heads"] for layer in column), strict=True)]
        layers.append(
            {
                "layer": column[0]["layer"],
                **figures(heads),
                "method_stored": fmean(layer["method_stored"] for layer in column),
                "heads": [figures([head]) for head in heads],
            }
        )
    every = [layer for text in found for layer in text]
    texts = [
        {
            "id": window.id,
            "sha256": digest(window.ids),
            "notes": window.notes,
            **figures([[head] for layer in text for head in layer["heads"]]),
        }
        for window, text in zip(windows, found, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "layers": layers,
        "total": figures([list(head) for column in zip(*found, strict=True) for head in _heads(column)]),
        "texts": texts,
        "bytes": _bytes(settings, found),
        "gaps": {
            "parts": max(head["gap"] for layer in every for head in layer["heads"]),
            "capture": max(layer["capture_gap"] for layer in every),
        },
    }


def _heads(column: Sequence[LayerDict]) -> Iterable[tuple[HeadDict, ...]]:
    """Return each KV head of a layer, over texts."""
    return zip(*(layer["heads"] for layer in column), strict=True)


def figures(heads: Sequence[Sequence[HeadDict]]) -> FiguresDict:
    """Bring heads together, each of them over its texts."""
    every = [text for head in heads for text in head]
    needed = [size for text in every for size in text["needed"]]
    own = [found for head in heads if (found := _pooled(head)) is not None]
    return {
        "stored": fmean(text["stored"] for text in every),
        "stored_prompt": fmean(text["stored_prompt"] for text in every),
        "needed_mean": fmean(needed),
        "needed_median": median(needed),
        "needed_p90": percentile(needed, 0.9),
        "evicted_error": fmean(text["evicted_error"] for text in every),
        "selected_error": fmean(text["selected_error"] for text in every),
        "indexed_error": fmean(text["indexed_error"] for text in every),
        "method_error": fmean(text["method_error"] for text in every),
        "shares": {part: fmean(found[part] for found in own) for part in PARTS} if own else None,
        "pooled_shares": _pooled(every),
    }


def _pooled(texts: Sequence[HeadDict]) -> dict[str, float] | None:
    products = [sum(column) for column in zip(*(text["products"] for text in texts), strict=True)]
    steps = sum(len(text["needed"]) for text in texts)
    found = shares(sum(text["square"] for text in texts), products, steps)
    return None if found is None else dict(zip(PARTS, found, strict=True))


def _bytes(settings: Settings, found: Sequence[Sequence[LayerDict]]) -> dict[str, dict[str, float]]:
    """Return what each way of attending stores, what it reads a step in all layers, and the time that this implies."""
    every = [layer for text in found for layer in text]
    size = settings.context + settings.steps
    stored = {
        "dense": float(size),
        "method": fmean(layer["method_stored"] for layer in every),
        "storage oracle": fmean(head["stored"] for layer in every for head in layer["heads"]),
        "compute oracle": float(size),
    }
    read = {
        "dense": sum(layer["dense_bytes"] for layer in every),
        "method": sum(layer["method_bytes"] for layer in every),
        "storage oracle": sum(layer["token_bytes"] * head["stored"] for layer in every for head in layer["heads"]),
        "compute oracle": sum(
            layer["token_bytes"] * fmean(head["needed"]) for layer in every for head in layer["heads"]
        ),
    }
    return {
        name: {
            "tokens_stored": stored[name],
            "step_bytes": count / len(found),
            "of_dense": count / read["dense"],
            "microseconds": count / len(found) / (settings.bandwidth * 1e3),
        }
        for name, count in read.items()
    }


def grid(result: Mapping[str, Any], shown: _Map) -> list[list[float | None]]:
    """Return a map's values, a row a KV head and a column a layer."""
    columns = [[shown.value(head) for head in layer["heads"]] for layer in result["layers"]]
    return [list(row) for row in zip(*columns, strict=True)]


def _scale(values: Sequence[Sequence[float | None]], shown: _Map) -> Scale:
    return scale_of(values, signed=shown.signed)


def shown_maps(result: Mapping[str, Any]) -> list[_Map]:
    """Return the maps that have anything to show."""
    return [shown for shown in MAPS if any(value for row in grid(result, shown) for value in row)]


def pictures(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the heat maps as PNG files, by name."""
    names = [str(layer["layer"]) for layer in result["layers"]]
    found = {}
    for shown in shown_maps(result):
        values = grid(result, shown)
        if shown.text is _percent:
            values = [[None if value is None else 100 * value for value in row] for row in values]
        title = f"{shown.title}, %" if shown.text is _percent else shown.title
        found[f"{shown.name}.png"] = heatmap_png(
            values, _scale(values, shown), title=title, rows="KV head", columns="layer", column_names=names
        )
    return found


_HEAD = (
    "layer",
    "stored",
    "needed",
    "median",
    "p90",
    "evicted",
    "top-k",
    "index",
    "method",
    *(f"% {part}" for part in PARTS),
)


def _row(name: str, found: Mapping[str, Any]) -> list[str]:
    cells = [_tokens(found[key]) for key in ("stored", "needed_mean", "needed_median", "needed_p90")]
    cells += [_error(found[key]) for key in ("evicted_error", "selected_error", "indexed_error", "method_error")]
    parts = found["shares"]
    return [name, *cells, *("-" if parts is None else f"{100 * parts[part]:.0f}" for part in PARTS)]


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's rows, its head first and all layers together last."""
    body = [_row(str(layer["layer"]), layer) for layer in result["layers"]]
    return [list(_HEAD), *body, _row("all", result["total"])]


def byte_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the latency bound, its head first."""
    speed = result["settings"]["bandwidth"]
    body = [
        [
            *(name, f"{row['tokens_stored']:.0f}", f"{row['step_bytes'] / 2**20:.2f}", f"{row['of_dense']:.3f}"),
            f"{row['microseconds']:.1f}",
        ]
        for name, row in result["bytes"].items()
    ]
    return [["in 16 bits", "tokens stored", "MiB a step", "of dense", f"us at {speed:g} GB/s"], *body]


def table(result: Mapping[str, Any]) -> str:
    """Return the tables as text for a terminal."""
    asked = result["settings"]
    count = len(result["texts"])
    head = (
        f"{asked['model']}, {count} text{'s' if count > 1 else ''} of {asked['context']} tokens and {asked['steps']} "
        f"steps; {asked['method']} {asked['token_budget']}; tokens needed for an error of {asked['error']:g}"
    )
    return "\n".join([head, "", *_aligned(rows(result)), "", *_aligned(byte_rows(result))]) + "\n"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def page(result: Mapping[str, Any]) -> str:
    """Return the page: facts, the latency bound, heat maps and the table; it needs nothing beside it, nor a script."""
    asked = result["settings"]
    facts = {
        "Model": f"{asked['model']} ({asked['dtype']})",
        "Method": f"{asked['method']}, budget {asked['token_budget']}",
        "Texts": f"{len(result['texts'])}, of {asked['context']} tokens and {asked['steps']} steps",
        "Error of the oracles": f"{asked['error']:g}, relative L2",
    }
    listed = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(text)}</dd></div>" for name, text in facts.items())
    maps = "".join(_map(result, shown) for shown in shown_maps(result))
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_h(f"Oracle bounds: {asked['model']}")}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>Oracle bounds of attention</h1>
<p class="lead">How few tokens attention needs, and where a method&#8217;s error comes from.</p>
<dl class="facts">{listed}</dl>
<p class="note">{_h(NOTE)}</p>
</header>
<main>
<section><h2>Latency that the bytes imply</h2>
{_html_table("Bytes read by a step", byte_rows(result))}</section>
<section><h2>Layer by KV head</h2>
<div class="maps">{maps}</div></section>
<section><h2>By layer</h2>
{_html_table("Figures of each layer", rows(result))}</section>
</main>
</body>
</html>
"""


def _h(text: str) -> str:
    return html.escape(text)


def _html_table(title: str, lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" style="padding:10px 12px">{_h(cell)}</th>' for cell in lines[0])
    body = "".join(
        f'<tr class="first"><th scope="row">{_h(first)}</th>{"".join(f"<td>{_h(cell)}</td>" for cell in others)}</tr>'
        for first, *others in lines[1:]
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_h(title)}"><table><caption>{_h(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _map(result: Mapping[str, Any], shown: _Map) -> str:
    values = grid(result, shown)
    scale = _scale(values, shown)
    head = "".join(f'<th scope="col">{head}</th>' for head in range(len(values)))
    lines = []
    for place, layer in enumerate(result["layers"]):
        cells = "".join(_map_cell(row[place], scale, shown) for row in values)
        lines.append(f'<tr><th scope="row">{layer["layer"]}</th>{cells}</tr>')
    title = _h(f"{shown.title}, %" if shown.text is _percent else shown.title)
    return (
        f'<figure class="map"><figcaption>{title}</figcaption><table><caption>{title}, layer by KV head</caption>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></figure>'
    )


def _map_cell(value: float | None, scale: Scale, shown: _Map) -> str:
    if value is None:
        return '<td class="none">-</td>'
    red, green, blue = scale.color(value)
    ink = "#1c2126" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
    return f'<td style="background:#{red:02x}{green:02x}{blue:02x};color:{ink}">{_h(shown.text(value))}</td>'
