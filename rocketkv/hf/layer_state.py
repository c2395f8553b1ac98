"""The state of a layer between forwards: snapshots, crops, rows and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.residual import subtract_last
from ..dispatch import value_subtraction
from ..state.history import HistorySnapshot
from ..state.snapshot import StoreSnapshot
from ..state.stats import LayerStats, live_bytes, store_stats

if TYPE_CHECKING:
    from .layer import RocketKVLayer

# Fields of a layer that its snapshot has, in addition to the store's snapshot.
_SNAPPED = ("prompt_end", "prompt_tokens", "prompt_ids", "turn_begins", "speculative", "step", "backend", "params")


@dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """The state of one layer at one time: of its store, of its history, and its fields by name."""

    store: StoreSnapshot
    history: HistorySnapshot | None
    fields: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over the tensors that the snapshot keeps alive."""
        yield from self.store.tensors.values()
        yield from self.store.copies.values()
        yield from (part for _, part in self.store.saved.values())
        if self.history is not None:
            yield from self.history.tensors.values()
        step = self.fields["step"]
        if step is not None:
            yield step.out


def crop_layer(layer: RocketKVLayer, max_length: int) -> None:
    """Remove tokens at the end, as `RocketKVLayer.crop`."""
    seen = layer.store.seen
    length = seen + max_length if max_length <= 0 else max_length
    if length < 0:
        raise ValueError(f"cannot remove {-max_length} tokens: the sequence has {seen}; remove at most those")
    if length == 0:
        layer.reset()
        return
    if layer.history is not None and not layer.store.closed:
        layer.history.guard(layer.store, length)
    if not layer.store.closed and length < seen:
        layer.prompt_tokens = max(0, layer.prompt_tokens - (seen - length))
    values = layer.store.values
    subtract = subtract_last if values is None else value_subtraction(values, layer.backend)
    layer.store.crop(length, subtract)
    if layer.history is not None:
        layer.history.crop(length)
    if layer.prompt_ids is not None and length < seen:
        layer.prompt_ids = layer.prompt_ids[:, : length - seen]
    if not layer.store.closed:
        layer.step = None


def snapshot_of(layer: RocketKVLayer) -> LayerSnapshot:
    """Return the present state."""
    history = None if layer.history is None else layer.history.snapshot(layer.store)
    return LayerSnapshot(layer.store.snapshot(), history, {name: getattr(layer, name) for name in _SNAPPED})


def restore_layer(layer: RocketKVLayer, snapshot: LayerSnapshot) -> None:
    """Return to a snapshot, as `RocketKVLayer.restore`."""
    step = layer.step
    layer.store.restore(snapshot.store)
    if layer.history is not None and snapshot.history is not None:
        layer.history.restore(snapshot.history)
        if not layer.store.closed:
            layer.history.guard(layer.store, layer.store.stored)
    layer.pending, layer.armed = None, False
    for name, value in snapshot.fields.items():
        setattr(layer, name, value)
    if step is not None and layer.store.closed and step.decoding.keys is layer.store.keys:
        layer.step = step  # forwards compiled or captured since then refer to it


def map_rows(layer: RocketKVLayer, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor by a function of it, which reorders or selects rows."""
    if layer.store.closed and layer.store.decoding.ring is not None:
        layer.store.decoding.ring.saved = None
    layer.store.map(function)
    if layer.history is not None:
        layer.history.map(function)
    if layer.store.marks is not None:
        rows = function(torch.arange(len(layer.store.marks))).tolist()
        layer.store.marks = tuple(layer.store.marks[row] for row in rows)
    if layer.prompt_ids is not None:
        layer.prompt_ids = function(layer.prompt_ids)


def layer_stats(layer: RocketKVLayer) -> LayerStats:
    """Return the tokens and bytes of a layer."""
    stats = store_stats(layer.store)
    if layer.step is not None:
        stats = replace(stats, other_bytes=stats.other_bytes + live_bytes(layer.step.out))
    held = {} if layer.history is None else layer.history.tensors()
    if held:
        size = sum(live_bytes(tensor) for tensor in held.values())
        stats = replace(stats, history_bytes=size, history_device=str(held["keys"].device))
    return stats
