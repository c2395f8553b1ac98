"""Stage 1 from scores to a selection, as the end of a prompt composes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rocketkv.core.eviction import TORCH_OPS, EvictionOps, prompt_scores
from rocketkv.core.params import AttentionParams


def prompt_positions(
    query: Tensor, key: Tensor, kept: int, params: AttentionParams, *, ops: EvictionOps = TORCH_OPS, **ranking: Any
) -> Tensor:
    """Return the positions [B, Hkv, kept] that stage 1 keeps, given the other arguments of `prompt_scores`."""
    return ops.select_top(prompt_scores(query, key, params, ops=ops, **ranking), kept)
