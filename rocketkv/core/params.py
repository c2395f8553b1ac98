"""The parameters of a model's attention, as every stage takes them.

Letters: H query heads, D head dim.
"""

from typing import NamedTuple

from torch import Tensor


class AttentionParams(NamedTuple):
    """How a model's attention turns products of queries and keys into weights.

    Attributes:
        scaling: factor of the logits, 1/sqrt(D) in most models.
        softcap: c of `c * tanh(logit / c)` (Gemma 2), or None.
        sinks: learned sinks: [H], one logit a head that joins the softmax's denominator (GPT-OSS), or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
