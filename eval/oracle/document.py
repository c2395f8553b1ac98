"""The oracles' figures over texts as one JSON document, and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import numpy as np

from ..measures.kl import Window
from ..records import digest
from ..report.markdown import escaped, markdown_table
from .bounds import PARTS, shares
from .run import HeadDict, LayerDict, Settings

SCHEMA = 1
NOTE = (
    "Tokens are those of one KV head. Needed: the fewest tokens of largest weight for which a step's attention is "
    "within the error. Stored: the tokens that any step needs. Errors are relative L2, mean over steps, of: dense "
    "attention to the tokens that stage 1 keeps (evicted), exact top-k of these (top-k), the method without its "
    "residual (index), and the method. Shares project each part's error vector on the total error: they add up to 1 "
    "and may be negative, and every head has the same weight. Bytes exclude the scoring of the bounds."
)
_TOKENS = {"stored": "stored", "needed_mean": "needed", "needed_median": "median", "needed_p90": "p90"}
_ERRORS = {"evicted_error": "evicted", "selected_error": "top-k", "indexed_error": "index", "method_error": "method"}


Figures = dict[str, Any]


def document(settings: Settings, windows: Sequence[Window], results: Sequence[Sequence[LayerDict]]) -> dict[str, Any]:
    """Return all figures as plain numbers: of each layer and head, of all together, and of each text.

    Args:
        settings: of the measurement.
        windows: the texts.
        results: the layers of each text, at least one.
    """
    layers, heads = [], []
    for column in zip(*results, strict=True):
        by_head = [list(head) for head in zip(*(layer["heads"] for layer in column), strict=True)]
        heads += by_head
        layers.append(
            {
                "layer": column[0]["layer"],
                **figures(by_head),
                "method_stored": fmean(layer["method_stored"] for layer in column),
                "heads": [figures([head]) for head in by_head],
            }
        )
    texts = [
        {
            "id": window.id,
            "sha256": digest(window.ids),
            "notes": window.notes,
            **figures([[head] for layer in text for head in layer["heads"]]),
        }
        for window, text in zip(windows, results, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "layers": layers,
        "total": figures(heads),
        "texts": texts,
        "bytes": _bytes(settings, results),
        "gaps": {
            "parts": max(text["gap"] for head in heads for text in head),
            "capture": max(layer["capture_gap"] for text in results for layer in text),
        },
    }


def figures(heads: Sequence[Sequence[HeadDict]]) -> Figures:
    """Return the figures of one head over texts, of a layer over heads and texts, or of all heads.

    Args:
        heads: for each head, its figures on each text.

    Returns:
        Means over heads and texts of the tokens stored (`stored`, `stored_prompt`) and of the errors; tokens needed per
        step (`needed_mean`, `needed_median`, `needed_p90`); `shares`, the mean over the heads with an error, None if
        there are none; `pooled_shares`, of all heads' vectors as one, in which large errors have more weight.
    """
    every: list[Any] = [text for head in heads for text in head]
    needed = [size for text in every for size in text["needed"]]
    by_head = [pooled for head in heads if (pooled := _pooled_shares(head)) is not None]
    return {
        **{key: fmean(text[key] for text in every) for key in ("stored", "stored_prompt")},
        "needed_mean": fmean(needed),
        "needed_median": median(needed),
        "needed_p90": int(np.quantile(needed, 0.9, method="inverted_cdf")),
        **{key: fmean(text[key] for text in every) for key in _ERRORS},
        "shares": {part: fmean(pooled[part] for pooled in by_head) for part in PARTS} if by_head else None,
        "pooled_shares": _pooled_shares(every),
    }


def _pooled_shares(texts: Sequence[HeadDict]) -> dict[str, float] | None:
    products = [sum(column) for column in zip(*(text["products"] for text in texts), strict=True)]
    steps = sum(len(text["needed"]) for text in texts)
    pooled = shares(sum(text["square"] for text in texts), products, steps)
    return None if pooled is None else dict(zip(PARTS, pooled, strict=True))


def _bytes(settings: Settings, results: Sequence[Sequence[LayerDict]]) -> dict[str, dict[str, float]]:
    """Return tokens stored, bytes read per step in all layers and the time this takes at the bandwidth, by method."""
    layers = [layer for text in results for layer in text]
    size = float(settings.context + settings.steps)
    # Tokens stored per KV head, and bytes read per step over all texts.
    rows = {
        "dense": (size, sum(layer["dense_bytes"] for layer in layers)),
        "method": (
            fmean(layer["method_stored"] for layer in layers),
            sum(layer["method_bytes"] for layer in layers),
        ),
        "storage oracle": (
            fmean(head["stored"] for layer in layers for head in layer["heads"]),
            sum(layer["token_bytes"] * head["stored"] for layer in layers for head in layer["heads"]),
        ),
        "compute oracle": (
            size,
            sum(layer["token_bytes"] * fmean(head["needed"]) for layer in layers for head in layer["heads"]),
        ),
    }
    dense = rows["dense"][1]
    return {
        name: {
            "tokens_stored": stored,
            "step_bytes": read / len(results),
            "of_dense": read / dense,
            "microseconds": read / len(results) / (settings.bandwidth * 1e3),
        }
        for name, (stored, read) in rows.items()
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the document's tables: figures by layer with all layers last, and bytes read per step."""
    settings, count = result["settings"], len(result["texts"])
    about = (
        f"{settings['model']}, {count} text{'s' if count > 1 else ''} of {settings['context']} tokens and "
        f"{settings['steps']} steps; {settings['method']} {settings['token_budget']}; tokens needed for an error of "
        f"{settings['error']:g}"
    )
    rows = [_row(str(layer["layer"]), layer) for layer in result["layers"]] + [_row("all", result["total"])]
    figures_table = markdown_table(
        ["layer", *_TOKENS.values(), *_ERRORS.values(), *(f"% {part}" for part in PARTS)], rows
    )
    bytes_table = markdown_table(
        ["16-bit", "tokens stored", "MiB per step", "of dense", f"µs at {settings['bandwidth']:g} GB/s"],
        [
            [
                name,
                f"{row['tokens_stored']:.0f}",
                f"{row['step_bytes'] / 2**20:.2f}",
                f"{row['of_dense']:.3f}",
                f"{row['microseconds']:.1f}",
            ]
            for name, row in result["bytes"].items()
        ],
    )
    return "\n\n".join([escaped(about), figures_table, NOTE, bytes_table]) + "\n"


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    parts = row["shares"]
    return [
        name,
        *(f"{row[key]:.0f}" for key in _TOKENS),
        *(f"{row[key]:.3f}" for key in _ERRORS),
        *("-" if parts is None else f"{100 * parts[part]:.0f}" for part in PARTS),
    ]
