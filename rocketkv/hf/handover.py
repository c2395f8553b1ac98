"""From a cache's `update` to the attention call that follows it: which layer's keys these are.

Nothing but the present thread's last hand-over is kept, and the next call takes it or drops it. A hand-over that
`torch.compile` traces has a place of its own: dynamo does not see what a thread alone has, and takes it for unset.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _HandOver(threading.local):
    """What `update` left for the attention call that follows it in the same thread."""

    layer: Any = None


class _Traced:
    """What a traced `update` left for the attention call that follows it, as a rule in the same graph."""

    layer: Any = None
    eager_forwards: int = 0  # in any thread: those with a hand-over that must not be traced


_hand_over = _HandOver()
_traced = _Traced()
_counting = threading.Lock()


def hand_over(layer: Any) -> None:
    """Leave a layer, whose `pending` key and value were just returned to the model, for the attention call."""
    if torch.compiler.is_dynamo_compiling():
        _traced.layer = layer
    else:
        _hand_over.layer = layer


def claim(key: Tensor) -> Any:
    """Return the layer whose `update` returned this very key, or None where a layer of another kind did.

    Raises:
        ValueError: a layer of ours handed over another tensor: the model changes keys between cache and attention.
    """
    if torch.compiler.is_dynamo_compiling():
        layer = _traced.layer
        _traced.layer = None
        if layer is None and _traced.eager_forwards:
            from .untraced import call_untraced

            return call_untraced(claim, key)
    else:
        layer = _hand_over.layer
        _hand_over.layer = None
        if layer is None and _holds(_traced.layer, key):  # the graph broke in between
            layer = _traced.layer
            _traced.layer = None
    if layer is None:
        return None
    if not _holds(layer, key):
        raise ValueError(
            "this model changes keys between its cache and its attention (as models with latent or shared KV do); "
            "RocketKV cannot compress it. Call rocketkv.unpatch(model)."
        )
    return layer


def _holds(layer: Any, key: Tensor) -> bool:
    """Whether a layer, or None, has handed this very key over."""
    return layer is not None and layer.pending is not None and layer.pending[0] is key


def forget_hand_over() -> None:
    """Drop what an interrupted forward may have left."""
    _traced.layer = None
    if not torch.compiler.is_dynamo_compiling():
        _hand_over.layer = None


@contextmanager
def eager_hand_over() -> Iterator[None]:
    """Have parts of a model that are compiled each for itself hand over eagerly within this context."""
    with _counting:
        _traced.eager_forwards += 1
    try:
        yield
    finally:
        with _counting:
            _traced.eager_forwards -= 1
