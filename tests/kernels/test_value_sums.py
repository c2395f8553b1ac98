"""The sums of values after a crop by the kernel: the bits of the reference, without a read from the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rocketkv.core import residual
from rocketkv.core.residual import subtract_last, sum_values

pytest.importorskip("triton", reason="Triton has no package for this platform")

from layer_case import DEVICE, Case, make
from rocketkv import dispatch
from rocketkv.config import RocketKVConfig
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.kernels import value_sums
from tracking import Tracker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [80, 16])
@pytest.mark.parametrize("wrong", [None, torch.nan, torch.inf, 1e7])
def test_a_crop_leaves_the_sum_of_what_stays(wrong: float | None, value_dim: int, dtype: torch.dtype) -> None:
    """Also where a removed or a remaining value is not finite or very large."""
    lengths, count = torch.tensor([[90, 41], [7, 60]], dtype=torch.int32, device=DEVICE), 5
    values = torch.randn(2, 2, 96, value_dim, device=DEVICE).to(dtype)
    if wrong is not None:
        values[0, 0, 88, 3] = values[1, 1, 20, 9] = wrong  # taken off, and staying
    found = sum_values(values, 90, lengths)
    expected = found.clone()
    counts = {"count": count, "longest": 90, "shortest": 7}
    subtract_last(expected, values, lengths, **counts)
    dispatch.value_subtraction(values, "triton")(found, values, lengths, **counts)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    left = sum_values(values, 85, lengths - count)
    assert torch.equal(found.nan_to_num(), left.nan_to_num())


def test_values_that_the_kernel_does_not_take_are_left_to_the_reference() -> None:
    assert dispatch.value_subtraction(torch.zeros(1, 1, 8, 4, device=DEVICE).double(), "triton") is subtract_last
    assert dispatch.value_subtraction(torch.zeros(1, 1, 8, 4, device=DEVICE), "torch") is subtract_last


def test_the_limit_of_exact_sums_is_the_references() -> None:
    assert value_sums.LARGEST_EXACT.value == residual.LARGEST_EXACT


@pytest.mark.parametrize("lengths", [(90,), (90, 71)])
def test_a_layer_is_cropped_without_a_read_from_the_device(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(lengths=lengths, sketch_bits=2, head_dim=16, steps=4)
    layer = RocketKVLayer(RocketKVConfig(method="rocketkv+", token_budget=case.token_budget, backend="triton"))
    layer.store, steps, _ = make(case)
    for _, key, value in steps:
        layer.store.append(key, value)
    subtracted = []

    def note(value_sum: Tensor, values: Tensor, lengths: Tensor, **counts: int) -> None:
        subtracted.append(counts["count"])

    monkeypatch.setattr(value_sums, "subtract_last", note)  # which the interpreter makes of other operations
    with Tracker() as tracker:
        layer.crop(-3)
    assert subtracted == [3]
    assert tracker.syncs() == []
