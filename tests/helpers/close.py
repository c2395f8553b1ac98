"""How near is near enough: float32 to an absolute bound, lower precisions by what plain PyTorch manages in them."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that every element is within `tolerance` of its reference, relative to it where it is larger than one."""
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def assert_as_precise(found: Tensor, plain: Tensor, reference: Tensor) -> None:
    """Assert that low precision costs at most twice what it costs plain PyTorch.

    Args:
        found: what the library computed in the low precision.
        plain: the same by plain PyTorch, all in the same low precision.
        reference: the same in float32 or float64, from the same (rounded) inputs.
    """
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape == reference.shape
    error = (found.double() - reference.double()).abs().max()
    allowed = 2 * (plain.double() - reference.double()).abs().max()
    assert error <= allowed, f"error {error:.3g}, twice plain PyTorch's is {allowed:.3g}"
