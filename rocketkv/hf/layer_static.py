"""Static buffers of a layer: steps that are traced or captured, and room for new tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.params import AttentionParams
from ..state.compress import kept_when_full

if TYPE_CHECKING:
    from ..static_step import StaticStep
    from .layer import RocketKVLayer


def step_statically(
    layer: RocketKVLayer, step: StaticStep, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor:
    """Run a step that is traced or captured, and return [B, 1, H, Dv].

    Raises:
        ValueError: the query requires gradients.
    """
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("a compiled decode step has no gradients: run it under torch.inference_mode()")
    out = step(query[:, :, 0], key[:, :, 0], value[:, :, 0], params)
    # Host reads become constants under tracing; host writes are repeated after each run of a compiled forward.
    if not torch.compiler.is_dynamo_compiling():
        layer.store.note_captured()
    layer.store.lens.uncounted = True
    return out[:, None]


def ensure_room(layer: RocketKVLayer, count: int) -> None:
    """Make room for `count` tokens, as `RocketKVLayer.ensure_room`."""
    store, decoding = layer.store, layer.store.decoding
    capacity = decoding.buffers.keys.shape[2]
    if store.lens.longest + count <= capacity and not store.lens.uncounted:
        return
    kept, ring, tensor = kept_when_full(layer.config, decoding.split), decoding.ring, decoding.buffers.query_ring
    ranks = ring is not None and tensor is not None and ring.count(tensor, store.seen) > 0
    if kept is not None and ranks and store.stored + count > capacity and store.generated > kept and layer.params:
        if layer.history is not None:
            layer.history.absorb(store)
        layer.evict_generated(kept, layer.params)
    store.next_fill()
