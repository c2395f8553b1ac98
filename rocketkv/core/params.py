"""The attention parameters of a model, which both stages use.

Letters: H query heads, D head dim.
"""

from typing import NamedTuple

from torch import Tensor


class AttentionParams(NamedTuple):
    """Parameters that turn query-key products into attention weights.

    Attributes:
        scaling: factor of the logits, 1/sqrt(D) in most models.
        softcap: c of `c * tanh(logit / c)` (Gemma 2), or None.
        sinks: [H], learned sinks: one logit per head in the softmax's denominator (GPT-OSS), or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
