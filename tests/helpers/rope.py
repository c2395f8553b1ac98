"""Tiny models of scaled rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch

from tiny import TRANSFORMERS, build

SHORT = 64  # the length before scaling; prompts end before it, generations after it

ORIGINAL = {"original_max_position_embeddings": SHORT}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Return the field of a configuration that sets the rotary embedding, as this version of transformers names it."""
    if TRANSFORMERS >= (5,):
        return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **fields}}
    return {"rope_scaling": {"rope_type": kind, **fields}}


def factors(seed: int) -> list[float]:
    return (1 + 3 * torch.rand(4, generator=torch.Generator().manual_seed(seed))).tolist()


def longrope(**fields: Any) -> Any:
    half = {"partial_rotary_factor": 0.5}
    scaling = {"short_factor": factors(1), "long_factor": factors(2)}
    if TRANSFORMERS >= (5,):
        return build("phi3", **rope("longrope", **half, **scaling, **ORIGINAL), **ORIGINAL, **fields)
    return build("phi3", rope_scaling={"type": "longrope", **scaling}, **half, **ORIGINAL, **fields)
