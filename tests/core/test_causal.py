"""Causal attention of a prompt's last tokens, by blocks of rows and by rows of a padded batch."""

from __future__ import annotations

import pytest
import torch

from causal_case import CausalCase, plain_attention
from close import assert_as_precise, assert_near
from rocketkv.core import causal, dense
from rocketkv.core.causal import causal_attention
from rocketkv.core.params import AttentionParams
from tracking import Operators, Tracker

EXTRAS: list[dict[str, object]] = [{}, {"softcap": 1.3}, {"sinks": True}, {"softcap": 3.0, "sinks": True}]
SHAPES: list[dict[str, object]] = [
    {},
    {"heads": (3, 3), "length": 41, "size": 41, "batch": 3},
    {"heads": (5, 1), "head_dim": 7, "value_dim": 9, "batch": 1},
    {"length": 1, "size": 19},
]


@pytest.fixture(params=[(1, 128), (900, 7), (64 * 2**20, 128)], ids=["single-rows", "some-rows", "all-rows"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", request.param[0])
    monkeypatch.setattr(causal, "CPU_ROWS", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("padding", ["none", "left", "holes", "turns"])
@pytest.mark.parametrize("window", [None, 1, 12, 1000])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_causal_attention_is_a_masked_softmax(extras: dict[str, object], window: int | None, padding: str) -> None:
    for shape in SHAPES:
        case = CausalCase(**{**shape, **extras, "window": window, "padding": padding})  # type: ignore[arg-type]
        tensors, params, settings = case.tensors(), case.params(), case.settings()
        found = causal_attention(*tensors, params, **settings)
        expected = plain_attention(*tensors, params, valid=settings["valid"], window=window)
        queries = slice(None)
        if padding == "turns":
            queries = settings["valid"][:, 0, -case.length :]  # what padding attends to does not matter
        assert_near(found[queries], expected[queries])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_low_precision_errs_no_more_than_twice_plain_pytorch(extras: dict[str, object], dtype: torch.dtype) -> None:
    case = CausalCase(length=150, size=300, head_dim=32, padding="left", dtype=dtype, **extras)  # type: ignore[arg-type]
    tensors, params, settings = case.tensors(), case.params(), case.settings()
    plain, reference = (
        plain_attention(*tensors, params, valid=settings["valid"], precision=precision)
        for precision in (dtype, torch.float64)
    )
    assert_as_precise(causal_attention(*tensors, params, **settings), plain, reference)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_a_padded_row_is_bitwise_the_row_alone_and_reads_no_padding(extras: dict[str, object]) -> None:
    case = CausalCase(padding="left", batch=3, **extras)  # type: ignore[arg-type]
    (query, key, value), params = case.tensors(), case.params()
    start = case.size - case.length + 3
    key[1, :, :start] = value[1, :, :start] = torch.nan
    found = causal_attention(query, key, value, params, **case.settings())
    assert torch.equal(found[:1], causal_attention(query[:1], key[:1], value[:1], params))
    alone = query[1:2, :, 3:], key[1:2, :, start:], value[1:2, :, start:]
    assert torch.equal(found[1:2, 3:], causal_attention(*alone, params))
    assert not found[1, :3].any()
    assert not found[2].any()


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_a_row_of_two_padded_turns_is_bitwise_the_row_alone(extras: dict[str, object]) -> None:
    case = CausalCase(padding="turns", batch=3, **extras)  # type: ignore[arg-type]
    (query, key, value), params, (valid, _) = case.tensors(), case.params(), case.valid()
    assert valid is not None
    found = causal_attention(query, key, value, params, valid=valid)
    for row in range(3):
        real, first = valid[row, 0], 2 * row
        alone = query[row : row + 1, :, first:], key[row : row + 1, :, real], value[row : row + 1, :, real]
        assert torch.equal(found[row : row + 1, first:], causal_attention(*alone, params))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("softcap", [None, 1.3])
def test_gradients_are_those_of_the_masked_softmax(softcap: float | None, window: int | None) -> None:
    case = CausalCase(softcap=softcap, padding="left", batch=3)
    settings = case.settings() | {"window": window}
    tensors = [tensor.double().requires_grad_() for tensor in case.tensors()]
    weights = torch.randn(3, case.length, 4, 16).double()
    found = causal_attention(*tensors, case.params(), **settings)
    expected = plain_attention(*tensors, case.params(), valid=settings["valid"], window=window)
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_near(one[:2], other[:2])
        assert not one[2].any()


def test_no_mask_of_all_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2**19)
    query, key, value = torch.randn(1, 2, 1500, 4), torch.randn(1, 1, 2000, 4), torch.randn(1, 1, 2000, 4)
    for softcap in (None, 2.0):
        with Tracker([query, key, value]) as tracker:
            causal_attention(query, key, value, AttentionParams(0.4, softcap))
        assert tracker.peak < 1500 * 2000 // 2


def test_a_window_reads_its_own_keys_alone() -> None:
    query, key, value = torch.randn(1, 2, 1000, 4), torch.randn(1, 1, 1400, 4), torch.randn(1, 1, 1400, 4)
    for softcap in (None, 2.0):
        with Tracker([query, key, value]) as tracker:
            causal_attention(query, key, value, AttentionParams(0.4, softcap), window=20)
        # Blocks of 128 rows of 2 heads over 147 keys.
        assert tracker.largest[0] <= 2 * 128 * 147 * 4


def test_blocks_cost_few_operators() -> None:
    query, key, value = torch.randn(1, 4, 1280, 8), torch.randn(1, 2, 3000, 8), torch.randn(1, 2, 3000, 8)
    with Operators() as operators:
        causal_attention(query, key, value, AttentionParams(0.4))
    assert len(operators.names) <= 10 + 10 * 7  # ten blocks


def test_dropout_is_applied() -> None:
    query, key, value = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 50, 8), torch.ones(1, 1, 50, 1)
    for softcap in (None, 5.0):
        out = causal_attention(query, key, value, AttentionParams(0.1, softcap), dropout=0.5)
        assert (out != 1).any()
        assert abs(float(out[:, 20:].mean()) - 1) < 0.2
