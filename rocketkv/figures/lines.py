"""The missed mass of each layer over the decode steps."""

from collections.abc import Sequence

import torch

from ..state.trace import Trace
from .levels import check_trace
from .maps import PLAIN, Figure
from .words import quoted

FIRST, LAST = (158, 202, 225), (8, 81, 156)  # colours of the first and of the last layer
MEAN = "#d55e00"


def missed(trace: Trace, tokens: Sequence[str] | None = None, *, row: int = 0) -> Figure:
    """Return a figure of the missed mass of each layer over the decode steps, and of the mean of all layers.

    The missed mass is a head's exact attention weight on stored tokens that the step does not attend to; a layer's is
    the mean over its query heads.

    Args:
        trace: the record of a run.
        tokens: texts of the sequence's tokens (`token_texts`), for labels.
        row: row of the batch.

    Raises:
        ValueError: the trace has no steps, or no such row.
    """
    check_trace(trace, row)
    numbers = list(trace.steps[0].layers)
    found = torch.stack([torch.stack([of.missed[row].mean() for of in made.layers.values()]) for made in trace.steps])
    places = [made.position for made in trace.steps]
    names = [quoted(tokens, place, place + 1) for place in places]
    lines = []
    for i, number in enumerate([*numbers, None]):
        values = found.mean(1) if number is None else found[:, i]
        name = "Mean of all layers" if number is None else f"Layer {number}"
        share = i / max(1, len(numbers) - 1)
        color = ", ".join(str(round(low + share * (high - low))) for low, high in zip(FIRST, LAST, strict=True))
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if number is None else "lines",
                "name": name,
                "x": places,
                "y": [round(value, 5) for value in values.tolist()],
                "hovertext": [
                    f"<b>{name}</b><br>{value:.3f} missed at token {place}<br>{text}"
                    for value, place, text in zip(values.tolist(), places, names, strict=True)
                ],
                "hoverinfo": "text",
                "line": {"color": MEAN, "width": 3} if number is None else {"color": f"rgb({color})", "width": 1},
                "marker": {"size": 6, "color": MEAN},
            }
        )
    axis = {"zeroline": False, "automargin": True, "gridcolor": "#dfe4e9"}
    return {
        "data": lines,
        "layout": {
            **PLAIN,
            "height": 360,
            "margin": {"l": 60, "r": 14, "t": 14, "b": 44},
            "hovermode": "closest",
            "xaxis": {**axis, "title": {"text": "Token of the decode step", "standoff": 8}, "showgrid": False},
            "yaxis": {**axis, "title": {"text": "Missed mass", "standoff": 8}, "rangemode": "tozero"},
        },
    }
