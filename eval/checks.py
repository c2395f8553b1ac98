"""Checks that a result must pass before it is timed."""

import torch
from torch import Tensor

# Share of the largest logit, through all layers of a model: float32 sums in any order, or 16 bits.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class WrongResultError(RuntimeError):
    """A result differs from its reference; nothing is timed then."""


def require_near(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Require the largest difference to be at most `tolerance` times the largest expected value.

    Raises:
        WrongResultError: the shapes differ, the difference is larger, or a value is NaN.
    """
    if result.shape != expected.shape:
        raise WrongResultError(f"{name} has shape {tuple(result.shape)}, not {tuple(expected.shape)}; nothing is timed")
    error = float((result.double() - expected.double()).abs().max())
    allowed = tolerance * float(expected.double().abs().max())
    if not error <= allowed:  # also where it is NaN
        raise WrongResultError(f"{name} is wrong by {error:.2e}, more than {allowed:.2e}; nothing is timed")


def require_near_logits(name: str, result: Tensor, expected: Tensor) -> None:
    """Require logits or log-probabilities to be as near as their precision allows.

    Raises:
        WrongResultError: they are not.
    """
    require_near(name, result, expected, LOGITS_TOLERANCE[result.dtype])
