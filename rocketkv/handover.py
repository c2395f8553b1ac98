"""From a cache's `update` to the attention call that follows it: which layer's keys these are.

Nothing but the present thread's last hand-over is kept, and the next call takes it or drops it.
"""

import threading
from typing import Any

from torch import Tensor


class _HandOver(threading.local):
    """What `update` left for the attention call that follows it in the same thread."""

    layer: Any = None


_hand_over = _HandOver()


def hand_over(layer: Any) -> None:
    """Leave a layer, whose `pending` key and value were just returned to the model, for the attention call."""
    _hand_over.layer = layer


def claim(key: Tensor) -> Any:
    """Return the layer whose `update` returned this very key, or None where a layer of another kind did.

    Raises:
        ValueError: a layer of ours handed over another tensor: the model changes keys between cache and attention.
    """
    layer = _hand_over.layer
    _hand_over.layer = None
    if layer is None:
        return None
    if layer.pending is None or layer.pending[0] is not key:
        raise ValueError(
            "this model changes keys between its cache and its attention (as models with latent or shared KV do); "
            "RocketKV cannot compress it. Call rocketkv.unpatch(model)."
        )
    return layer


def forget_hand_over() -> None:
    """Drop what an interrupted forward may have left."""
    _hand_over.layer = None
