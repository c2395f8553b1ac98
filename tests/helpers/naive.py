"""Attention by its definition, for comparison: loops over rows, heads and queries, in float64, nothing shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_weights(
    query: Tensor, keys: Tensor, scaling: float, softcap: float | None = None, sink: float | None = None
) -> Tensor:
    """Return the weights [N] of one query [D] over keys [N, D]; a sink's own weight is left out."""
    logits = (keys.double() @ query.double()) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    peak = float(logits.max()) if sink is None else max(float(logits.max()), sink)
    weights = torch.exp(logits - peak)
    total = weights.sum() if sink is None else weights.sum() + torch.exp(torch.tensor(sink - peak).double())
    return weights / total


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    seen: Sequence[Sequence[Sequence[int]]] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return [B, H, Dv] float64 for one query [B, H, D] over keys and values [B, Hkv, N, D].

    `seen[b][g]` lists the tokens that row b, KV head g may see; None is all of them, an empty list gives zeros.
    """
    batch, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(batch, heads, values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            tokens = list(range(keys.shape[2])) if seen is None else list(seen[b][h // group])
            if tokens:
                sink = None if sinks is None else float(sinks[h])
                weights = softmax_weights(query[b, h], keys[b, h // group][tokens], scaling, softcap, sink)
                out[b, h] = weights @ values[b, h // group][tokens].double()
    return out


def top(scores: Sequence[float] | Tensor, n: int) -> list[int]:
    """Return the places of the n largest scores, the lowest place first among equals, in order; NaN is the least."""
    order = sorted(range(len(scores)), key=lambda i: (-_rank(float(scores[i])), i))
    return sorted(order[:n])


def _rank(score: float) -> float:
    return score if score == score else float("-inf")
