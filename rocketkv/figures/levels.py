"""Matrices of kept and read tokens, and their levels of colour.

Letters: R rows of a matrix (a KV head of a layer, or a decode step), S sequence length, Hkv KV heads, k selected
tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..state.trace import LayerReads, Trace, TracedStep
from .raster import LEVELS

# The first level that a weight has: half decades from 0.0001 on, below them one for all.
LEAST_WEIGHT = 1e-4


def kept_rows(positions: Mapping[int, Tensor], length: int, row: int) -> Tensor:
    """Return which tokens each KV head keeps, [R, S] float32, 1 or 0; layer by layer, head by head.

    Args:
        positions: [B, Hkv, N] by layer number, -1 for none.
        length: S.
        row: row of the batch.
    """
    return torch.cat([_scattered(of[row], torch.ones(of[row].shape), length) for of in positions.values()])


def read_rows(step: TracedStep, length: int, row: int) -> Tensor:
    """Return the attention weight of each KV head on each token, averaged over its query heads, [R, S] float32.

    Args:
        step: the step.
        length: S.
        row: row of the batch.
    """
    return torch.cat([layer_rows(reads, length, row) for reads in step.layers.values()])


def layer_rows(reads: LayerReads, length: int, row: int) -> Tensor:
    """Return `read_rows` of one layer, [Hkv, S]."""
    places = reads.positions[row]
    weights = reads.weights[row].view(places.shape[0], -1, places.shape[1]).mean(1)
    return _scattered(places, weights, length)


def _scattered(places: Tensor, values: Tensor, length: int) -> Tensor:
    """Put values [Hkv, k] at places [Hkv, k] of rows [Hkv, S]; a place of -1 is none."""
    rows = torch.zeros(places.shape[0], length + 1)
    return rows.scatter_(1, torch.where(places < 0, length, places).long(), values.float())[:, :length]


def binned(rows: Tensor, bins: int) -> tuple[Tensor, int]:
    """Return sums over bins of adjacent tokens, [R, bins] at most, and the tokens of a bin.

    Args:
        rows: [R, S].
        bins: the most bins.
    """
    size = max(1, -(-rows.shape[1] // bins))
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return padded.view(rows.shape[0], -1, size).sum(-1), size


def share_levels(share: Tensor) -> Tensor:
    """Return the levels of shares: 0 for none, then ninths."""
    return (share * LEVELS).ceil().clamp(0, LEVELS).long()


def weight_levels(weight: Tensor) -> Tensor:
    """Return the levels of attention weights: 0 for none, 1 below 0.0001, then half decades."""
    above = (2 * (weight.clamp(min=1e-9) / LEAST_WEIGHT).log10()).floor() + 2
    return torch.where(weight > 0, above.clamp(1, LEVELS), 0).long()


def check_trace(trace: Trace, row: int) -> None:
    """Check that a trace has steps, and a row of the batch.

    Raises:
        ValueError: it has not.
    """
    if not trace.steps:
        raise ValueError("the trace has no steps: generate at least two tokens with it")
    check_row(next(iter(trace.steps[0].layers.values())).positions.shape[0], row)


def check_row(batch: int, row: int) -> None:
    """Check the number of a row.

    Raises:
        ValueError: the batch has no such row.
    """
    if not 0 <= row < batch:
        raise ValueError(f"row must be one of the batch's {batch} rows, from 0; got {row}")
