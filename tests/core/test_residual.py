"""The value residual: attention to the chosen tokens and the others' mean value, by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from close import assert_as_precise, assert_near
from naive import attention
from rocketkv.core.params import AttentionParams
from rocketkv.core.residual import residual_attend
from sketch_case import SHAPES


def naive_residual(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: list[int],
    logits: Tensor,
    length: int,
    softcap: float | None = None,
    sink: float | None = None,
) -> tuple[Tensor, float]:
    """Attend from one query [D] to the `chosen` of `length` tokens, and to the mean value of the others."""
    total, rest = (0.0 if sink is None else math.exp(sink)), 0.0
    out = torch.zeros(values.shape[-1], dtype=torch.float64)
    others = [n for n in range(length) if n not in chosen]
    near = 0.0
    for n in chosen:
        logit = float(keys[n].double() @ query.double()) * 0.3
        logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
        near += math.exp(logit)
        out += math.exp(logit) * values[n].double()
    total += near
    if others:
        estimated = sum(math.exp(float(logits[n])) for n in chosen)
        rest = sum(math.exp(float(logits[n])) for n in others) * math.sqrt(min(1.0, near / estimated))
        total += rest
        out += rest * values[others].double().mean(0)
    return (out / total, rest / total) if total else (out, 0.0)


@pytest.mark.parametrize(
    ("softcap", "with_sinks"),
    [(None, False), (2.0, False), (None, True), (2.0, True)],
    ids=["", "cap", "sinks", "both"],
)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_by_its_definition(
    shape: tuple[int, int, int, int, int], ragged: bool, softcap: float | None, with_sinks: bool
) -> None:
    batch, heads, kv_heads, head_dim, tokens = shape
    k, group = 6, heads // kv_heads
    query, keys = torch.randn(batch, heads, head_dim), torch.randn(batch, kv_heads, tokens + 3, head_dim)
    values = torch.randn(batch, kv_heads, tokens + 3, 5)
    logits = torch.randn(batch, heads, tokens)
    lengths = torch.full((batch, kv_heads), tokens)
    positions = torch.stack([torch.randperm(tokens)[:k].sort().values for _ in range(batch * kv_heads)])
    positions = positions.view(batch, kv_heads, k)
    if ragged:
        lengths[0, 0] = 3  # fewer than are chosen: the rest are not its tokens, and may be beyond all there are
        positions[0, 0] = torch.tensor([0, 1, 2, 3, tokens - 1, tokens])
        lengths[-1, -1] = 0 if batch * kv_heads > 1 else 3
        for b in range(batch):
            for g in range(kv_heads):
                keys[b, g, lengths[b, g] :] = torch.nan
                values[b, g, lengths[b, g] :] = torch.nan
                logits[b, g * group : (g + 1) * group, lengths[b, g] :] = torch.nan
    sums = torch.stack([values[b, g, : lengths[b, g]].sum(0) for b in range(batch) for g in range(kv_heads)])
    sums, sinks = sums.view(batch, kv_heads, 5), torch.randn(heads) if with_sinks else None
    params, given = AttentionParams(0.3, softcap, sinks), lengths.int() if ragged else None
    out, missed = residual_attend(query, keys, values, positions.int(), logits, sums, params, lengths=given)
    assert out.shape == (batch, heads, 5)
    assert missed.shape == (batch, heads)
    for b in range(batch):
        for h in range(heads):
            g = h // group
            length = int(lengths[b, g])
            expected, weight = naive_residual(
                query[b, h],
                keys[b, g],
                values[b, g],
                [n for n in positions[b, g].tolist() if n < length],
                logits[b, h],
                length,
                softcap,
                None if sinks is None else float(sinks[h]),
            )
            assert_near(out[b, h], expected)
            assert float(missed[b, h]) == pytest.approx(weight, abs=1e-5)


def exact_logits(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    by_head = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (by_head @ query.float()[..., None])[..., 0] * scaling


def test_all_tokens_chosen_is_attention_over_all() -> None:
    query, keys, values = torch.randn(2, 6, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 4)
    positions = torch.arange(9).expand(2, 2, 9)
    logits = torch.full((2, 6, 9), torch.nan)  # no estimate is used
    sums, params = values.sum(2), AttentionParams(0.3)
    out, missed = residual_attend(query, keys, values, positions, logits, sums, params, lengths=None)
    assert_near(out, attention(query, keys, values, 0.3))
    assert (missed == 0).all()


def test_exact_where_estimates_are_and_the_others_values_are_alike() -> None:
    query, keys, values = torch.randn(1, 4, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 4)
    values[:, :, 10:] = values[:, :, 10:11]
    positions = torch.arange(10).expand(1, 2, 10)
    logits = exact_logits(query, keys, 0.3)
    sums, params = values.sum(2), AttentionParams(0.3)
    out, missed = residual_attend(query, keys, values, positions, logits, sums, params, lengths=None)
    assert_near(out, attention(query, keys, values, 0.3))
    assert_near(missed, logits.softmax(-1)[..., 10:].sum(-1))


def test_large_logits_do_not_overflow() -> None:
    query, keys, values = 100 * torch.randn(1, 2, 16), torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 4)
    logits = exact_logits(query, keys, 1.0)
    positions = logits.mean(1, keepdim=True).topk(20).indices.sort().values
    sums, params = values.sum(2), AttentionParams(1.0)
    out, missed = residual_attend(query, keys, values, positions, logits, sums, params, lengths=None)
    assert out.isfinite().all()
    kept = logits.softmax(-1).gather(-1, positions.expand(-1, 2, -1)).sum(-1)
    assert_near(missed, 1 - kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_in_low_precision_costs_the_rounding_of_its_output(dtype: torch.dtype) -> None:
    query, keys, values = (torch.randn(2, *size).to(dtype) for size in ((4, 16), (2, 50, 16), (2, 50, 8)))
    positions = torch.arange(0, 50, 5).expand(2, 2, 10)
    logits = exact_logits(query, keys, 0.3)
    sums, params = values.float().sum(2), AttentionParams(0.3)
    out, _ = residual_attend(query, keys, values, positions, logits, sums, params, lengths=None)
    wide = (tensor.double() for tensor in (query, keys, values))
    reference = residual_attend(*wide, positions, logits, sums, params, lengths=None)[0]
    assert_as_precise(out, reference.to(dtype), reference)


def test_a_value_that_is_no_number_spoils_its_own_row_and_head_group() -> None:
    query, keys, values = torch.randn(2, 4, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 3)
    positions, logits = torch.arange(5).expand(2, 2, 5), torch.randn(2, 4, 20)
    params = AttentionParams(0.3)
    clean, _ = residual_attend(query, keys, values, positions, logits, values.sum(2), params, lengths=None)
    values[1, 0, 13, 2] = torch.nan
    out, _ = residual_attend(query, keys, values, positions, logits, values.sum(2), params, lengths=None)
    spoilt = torch.zeros(2, 4, 3, dtype=torch.bool)
    spoilt[1, :2, 2] = True
    assert out[spoilt].isnan().all()
    assert torch.equal(out[~spoilt], clean[~spoilt])
