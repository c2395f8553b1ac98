"""A page of figures and of the text itself, as one HTML file that loads nothing else.

Like the report's, it has a content security policy that allows two scripts only, by their hashes: the page's own, and
plotly.js, which that unpacks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..eval.report.bundle import render
from ..state.trace import Trace, TracedStep
from .levels import kept_rows, read_rows, share_levels, weight_levels
from .lines import missed
from .maps import kept, reads, step
from .raster import LEVELS, alpha
from .words import BLANK

FOLDER = Path(__file__).parent


def write_page(
    path: str | os.PathLike[str],
    positions: Mapping[int, Tensor],
    tokens: Sequence[str],
    trace: Trace | None = None,
    *,
    facts: Sequence[tuple[str, str]] = (),
    row: int = 0,
) -> None:
    """Write a page with figures of the kept tokens and, of a trace, of the decode steps; and with the text, shaded.

    Args:
        path: the file; an existing one is replaced.
        positions: by layer number, the positions of the stored tokens, [B, Hkv, N], -1 for none.
        tokens: texts of the sequence's tokens (`token_texts`).
        trace: the record of a run, or None.
        facts: names and texts for the page's head.
        row: row of the batch.

    Raises:
        ValueError: there are no layers or tokens, or there is no such row.
        OSError: the file cannot be written.
    """
    if not tokens:
        raise ValueError("tokens must be the texts of the sequence's tokens, got none")
    figures = {"kept": kept(positions, tokens, row=row)}
    steps = [] if trace is None else trace.steps
    worst = max(range(len(steps)), key=lambda number: _missed(steps[number], row), default=None)
    if trace is not None and worst is not None:
        figures |= {
            "reads": reads(trace, tokens, row=row),
            "step": step(trace, worst, tokens, row=row),
            "missed": missed(trace, tokens, row=row),
        }
    text = render(
        FOLDER,
        facts=facts,
        figures=figures,
        text={"tokens": list(tokens), "views": list(_views(positions, steps, tokens, row))},
        steps=steps,
        worst_token=None if worst is None else _token(tokens, steps[worst].position),
        alphas=[f"{0.75 * alpha(level):.2f}" for level in range(1, LEVELS + 1)],
    )
    Path(path).write_text(text, encoding="utf-8")


def _missed(made: TracedStep, row: int) -> float:
    """Return a step's missed mass, the mean of its layers and heads."""
    return sum(float(of.missed[row].mean()) for of in made.layers.values()) / len(made.layers)


def _token(tokens: Sequence[str], place: int) -> str:
    return (" ".join(tokens[place].split()) or BLANK) if place < len(tokens) else str(place)


def _views(
    positions: Mapping[int, Tensor], steps: Sequence[TracedStep], tokens: Sequence[str], row: int
) -> Iterator[dict[str, Any]]:
    """Yield ways to shade the text: groups, names and runs of levels."""
    length = len(tokens)
    end = max(length, max(int(places[row].max()) for places in positions.values()) + 1)
    by_layer = {number: kept_rows({number: places}, end, row) for number, places in positions.items()}
    yield _view("Kept", "by all layers", share_levels(torch.cat(list(by_layer.values())).mean(0)), length)
    for number, rows in by_layer.items():
        yield _view("Kept", f"by layer {number}, {len(rows)} KV heads", share_levels(rows.mean(0)), length)
    for made in steps:
        weight = read_rows(made, max(length, made.position + 1), row).mean(0)
        name = f"{made.position}: {_token(tokens, made.position)}"
        yield _view("Read by the step of", name, weight_levels(weight), length)


def _view(group: str, name: str, levels: Tensor, length: int) -> dict[str, Any]:
    runs = [(level, len(list(run))) for level, run in itertools.groupby(levels[:length].tolist())]
    return {"group": group, "name": name, "runs": [number for run in runs for number in run]}
