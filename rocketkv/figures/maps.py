"""Maps over the sequence: tokens that each head keeps, and tokens that decode steps read.

Letters: B batch, Hkv KV heads, N stored tokens, R rows of a map, S sequence length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..state.trace import Trace, TracedStep
from .levels import binned, check_row, check_trace, kept_rows, read_rows, share_levels, weight_levels
from .raster import data_url
from .words import BLANK, quoted

BINS = 800  # columns of a map
POINTS = 160  # of the line above it
MOST_TICKS = 12
Figure = dict[str, Any]
PLAIN: Figure = {"showlegend": False, "paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}  # a layout's start


def kept(positions: Mapping[int, Tensor], tokens: Sequence[str] | None = None, *, row: int = 0) -> Figure:
    """Return a figure of the tokens that each KV head of each layer keeps.

    Above the map, a line has the share of all heads that keep a token.

    Args:
        positions: by layer number, the positions of the stored tokens, [B, Hkv, N], -1 for none: `Trace.kept` or
            `RocketKVCache.positions()`.
        tokens: texts of the sequence's tokens (`token_texts`), for labels.
        row: row of the batch.

    Raises:
        ValueError: there are no layers, or there is no such row.
    """
    if not positions:
        raise ValueError("positions has no layers: decode a step first, or take cache.positions()")
    check_row(next(iter(positions.values())).shape[0], row)
    length = max(int(places[row].max()) for places in positions.values()) + 1
    rows = kept_rows(positions, length, row)
    columns, size = binned(rows, BINS)
    sizes = torch.full(columns.shape[1:], float(size))
    sizes[-1] = length - size * (len(sizes) - 1)
    return _map(
        share_levels(columns / sizes),
        size,
        rows.mean(0),
        "Kept",
        tokens,
        _layer_ticks(positions, [places.shape[1] for places in positions.values()]),
        "Layer, and its KV heads",
    )


def step(trace: Trace, number: int, tokens: Sequence[str] | None = None, *, row: int = 0) -> Figure:
    """Return a figure of the attention of one decode step: the weight of each KV head of each layer on what it reads.

    Above the map, a line has the share of all heads that read a token. Colours are on a logarithmic scale.

    Args:
        trace: the record of a run.
        number: the step's place in `trace.steps`.
        tokens: texts of the sequence's tokens (`token_texts`), for labels.
        row: row of the batch.

    Raises:
        ValueError: the trace has no such step or row.
    """
    check_trace(trace, row)
    if not 0 <= number < len(trace.steps):
        raise ValueError(f"number must be that of one of the trace's {len(trace.steps)} steps, from 0; got {number}")
    made = trace.steps[number]
    rows = read_rows(made, made.position + 1, row)
    columns, size = binned(rows, BINS)
    heads = [reads.positions.shape[1] for reads in made.layers.values()]
    share, ticks = (rows > 0).float().mean(0), _layer_ticks(made.layers, heads)
    return _map(weight_levels(columns), size, share, "Read", tokens, ticks, "Layer, and its KV heads")


def reads(trace: Trace, tokens: Sequence[str] | None = None, *, row: int = 0) -> Figure:
    """Return a figure of the tokens that the decode steps read: a row for each step, layers and heads averaged.

    Above the map, a line has the share of heads, over all steps, that read a token. Colours are on a logarithmic scale.

    Args:
        trace: the record of a run.
        tokens: texts of the sequence's tokens (`token_texts`), for labels; those of generated tokens name the steps.
        row: row of the batch.

    Raises:
        ValueError: the trace has no steps, or no such row.
    """
    check_trace(trace, row)
    length = trace.steps[-1].position + 1
    means, shares = [], []
    for made in trace.steps:
        rows = read_rows(made, length, row)
        means.append(rows.mean(0))
        shares.append((rows > 0).float().mean(0))
    columns, size = binned(torch.stack(means), BINS)
    ticks = [(place + 0.5, _step_name(made, tokens)) for place, made in enumerate(trace.steps)]
    share = torch.stack(shares).mean(0)
    return _map(weight_levels(columns), size, share, "Read", tokens, ticks, "Decode step, by its token")


def _step_name(made: TracedStep, tokens: Sequence[str] | None) -> str:
    known = tokens is not None and made.position < len(tokens)
    return (quoted(tokens, made.position, made.position + 1) or BLANK) if known else str(made.position)


def _layer_ticks(layers: Mapping[int, Any], heads: Sequence[int]) -> list[tuple[float, str]]:
    ends = torch.tensor(heads).cumsum(0).tolist()
    return [(end - count / 2, str(number)) for number, end, count in zip(layers, ends, heads, strict=True)]


def _map(
    levels: Tensor,
    size: int,
    share: Tensor,
    verb: str,
    tokens: Sequence[str] | None,
    ticks: list[tuple[float, str]],
    title: str,
) -> Figure:
    """Return a figure of a map and a line above it over the same tokens.

    Args:
        levels: [R, bins] of the map.
        size: tokens of a bin.
        share: [S], the share of heads that do with a token what the verb says.
        verb: "Kept" or "Read".
        tokens: texts of tokens.
        ticks: places and names on the map's vertical axis.
        title: of that axis.
    """
    length = share.shape[0]
    sums, each = binned(share[None], POINTS)
    starts = [each * place for place in range(sums.shape[1])]
    ends = [min(start + each, length) for start in starts]
    counts = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    values = (sums[0] / counts).tolist()
    texts = [
        f"<b>{verb} by {value:.0%} of the heads</b><br>tokens {start} to {end - 1}<br>{quoted(tokens, start, end)}"
        for start, end, value in zip(starts, ends, values, strict=True)
    ]
    shown = ticks[:: -(-len(ticks) // MOST_TICKS)]
    rows, extent = levels.shape[0], size * levels.shape[1]
    quiet = {"showgrid": False, "zeroline": False, "automargin": True}
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [(start + end) / 2 for start, end in zip(starts, ends, strict=True)],
                "y": [round(value, 5) for value in values],
                "hovertext": texts,
                "hoverinfo": "text",
                "fill": "tozeroy",
                "line": {"color": "#0072b2", "width": 1.5, "shape": "hvh"},
                "fillcolor": "rgba(0, 114, 178, 0.15)",
            },
            # An axis without data is not drawn.
            {
                "type": "scatter",
                "mode": "markers",
                "x": [0, length],
                "y": [0, rows],
                "yaxis": "y2",
                "marker": {"opacity": 0},
                "hoverinfo": "skip",
            },
        ],
        "layout": {
            **PLAIN,
            "height": 440,
            "margin": {"l": 60, "r": 14, "t": 14, "b": 44},
            "hovermode": "x",
            "xaxis": {**quiet, "range": [0, length], "title": {"text": "Token", "standoff": 8}, "anchor": "y2"},
            "yaxis": {**quiet, "domain": [0.8, 1], "rangemode": "tozero", "nticks": 3, "fixedrange": True},
            "yaxis2": {
                **quiet,
                "domain": [0, 0.76],
                "range": [rows, 0],
                "fixedrange": True,
                "tickvals": [place for place, _ in shown],
                "ticktext": [name for _, name in shown],
                "title": {"text": title, "standoff": 8},
            },
            "images": [
                {
                    "source": data_url(levels),
                    "xref": "x",
                    "yref": "y2",
                    "x": 0,
                    "y": 0,
                    "sizex": extent,
                    "sizey": rows,
                    "sizing": "stretch",
                    "layer": "above",
                }
            ],
        },
    }
