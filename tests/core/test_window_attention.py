"""Attention of the observation window, by blocks of keys."""

from __future__ import annotations

import pytest
import torch

from causal_case import CausalCase, plain_attention
from close import assert_near
from rocketkv.core import scratch
from rocketkv.core.window_attention import window_attention
from tracking import Operators, Tracker

EXTRAS: list[dict[str, object]] = [{}, {"softcap": 1.3}, {"sinks": True}, {"softcap": 3.0, "sinks": True}]


@pytest.fixture(params=[1, 2**13, 2**24], ids=["blocks-of-a-window", "some", "at-once"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CPU_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_masked_softmax(extras: dict[str, object], padding: str, dtype: torch.dtype) -> None:
    for shape in ({}, {"heads": (5, 1), "head_dim": 7, "value_dim": 9, "batch": 1}, {"length": 1, "size": 19}):
        case = CausalCase(**{**shape, **extras, "padding": padding, "dtype": dtype})  # type: ignore[arg-type]
        tensors, params, valid = case.tensors(), case.params(), case.settings()["valid"]
        found = window_attention(*tensors, params, valid=valid)
        expected = plain_attention(*tensors, params, valid=valid, precision=torch.float64)
        assert found.dtype == torch.float32
        assert_near(found, expected)


@pytest.mark.parametrize("heads", [(8, 2), (64, 8)])
def test_operators_grow_with_blocks_alone(heads: tuple[int, int]) -> None:
    counts = []
    for size in (2_000, 32_000):
        query, key = torch.empty(4, heads[0], 32, 16, device="meta"), torch.empty(4, heads[1], size, 16, device="meta")
        with Operators() as operators:
            window_attention(query, key, key, CausalCase(heads=heads, sinks=True).params())
        blocks = -(-size // scratch.block_length(key.device, 4 * 4 * heads[0] * 32))
        counts.append(len(operators.names) - 20 * blocks)
    assert max(counts) <= 20


def test_a_key_that_is_not_a_number_is_not_hidden() -> None:
    query, key = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16)
    key[0, 0, 3] = torch.nan
    out = window_attention(query, key, key, CausalCase(heads=(2, 2), batch=1).params())
    assert out[0, :, 0].isnan().all()
    assert out[0, :, 1].isfinite().all()


def test_scratch_does_not_grow_with_the_prompt() -> None:
    query, key = torch.randn(1, 8, 32, 16), torch.randn(1, 2, 40_000, 16)
    case = CausalCase(heads=(8, 2), batch=1)
    with Tracker([query, key]) as tracker:
        window_attention(query, key, key, case.params())
    assert tracker.largest[0] <= scratch.CPU_BYTES
