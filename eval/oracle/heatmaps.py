"""Heat maps of the oracles' figures, KV head by layer, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..optional import optional
from .bounds import PARTS
from .document import Figures

Grid = npt.NDArray[np.float64]

TITLES = {
    "stored": "storage oracle, tokens",
    "needed_mean": "compute oracle, mean tokens per step",
    "evicted_error": "error after stage 1",
    "selected_error": "selection oracle, error",
    "method_error": "error of the method",
}


def heat_maps(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Return PNG files by name; a map without any value but 0 is left out.

    Args:
        result: see `document.document`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = [str(layer["layer"]) for layer in result["layers"]]
    pictures = {}
    for key in (*TITLES, *PARTS):
        columns = [[_value(head, key) for head in layer["heads"]] for layer in result["layers"]]
        grid = np.array(columns, dtype=float).T  # a missing value is NaN
        if np.nan_to_num(grid).any():
            share = key in PARTS
            name = f"share-{key}.png" if share else f"{key.replace('_', '-')}.png"
            title = f"share of {key} in the error, %" if share else TITLES[key]
            pictures[name] = heat_map_png(grid, title, layers, signed=share)
    return pictures


def _value(head: Figures, key: str) -> float | None:
    if key not in PARTS:
        return float(head[key])
    return None if head["shares"] is None else 100 * float(head["shares"][key])


def heat_map_png(grid: Grid, title: str, columns: list[str], *, signed: bool = False) -> bytes:
    """Return a grid as a PNG file, rows from the top; a cell that is NaN is grey.

    Args:
        grid: values, KV heads by layers.
        title: of the picture.
        columns: name of each layer.
        signed: whether to use diverging colours with the same range on both sides of 0.

    Raises:
        ImportError: matplotlib is not installed.
    """
    colors = optional("matplotlib").colormaps["PuOr" if signed else "viridis"].with_extremes(bad="0.85")
    rows, width = grid.shape
    size = max(4.5, 1.5 + min(0.28 * width, 12)), 1.2 + 0.28 * rows
    figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="layer", ylabel="KV head")
    largest = np.nanmax(np.abs(grid)) if signed else None
    image = axes.imshow(grid, aspect="auto", cmap=colors, vmin=None if largest is None else -largest, vmax=largest)
    every = max(1, width // 16)
    axes.set_xticks(range(0, width, every), columns[::every])
    axes.set_yticks(range(0, rows, max(1, rows // 16)))
    figure.colorbar(image, pad=0.01)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
