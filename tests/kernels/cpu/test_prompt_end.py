"""The compiled code of a prompt's end against the reference."""

from __future__ import annotations

import pytest
import torch

from rocketkv import dispatch
from rocketkv.budget import METHODS
from rocketkv.core import eviction
from rocketkv.core.calibration import weigh_chosen
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import Sketch, build_sketch, rotation_matrix
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from sketch_case import some_keys, some_queries

pytest.importorskip("numba", reason="the extra [cpu] is not installed")

DTYPES = [torch.float32, torch.bfloat16]  # each is compiled apart


def compiled(dtype: torch.dtype) -> eviction.EvictionOps:
    return dispatch.eviction_ops(torch.zeros(1, 1, 1, 8, dtype=dtype), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "head_dim"), [(1, 64), (2, 16), (2, 80), (2, 128), (3, 12), (4, 7)])
def test_a_sketch_has_the_bits_of_the_reference(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    tokens, start = 140, 5
    keys = some_keys(2, 3, start + tokens + 4, head_dim, dtype).transpose(1, 2).contiguous().transpose(1, 2)
    rotation = rotation_matrix(head_dim)
    built = build_sketch(keys, 60, rotation, bits, queries=some_queries(keys))
    expected = built._replace(codes=torch.zeros_like(built.codes), scales=torch.zeros_like(built.scales))
    expected.mean[1, 1] = keys[1, 1, 20]
    keys[0, 1, 9, 3], keys[1, 0, 30, 2] = torch.nan, torch.inf
    found = Sketch(*(tensor.clone() for tensor in expected))
    given = keys[:, :, start : start + tokens]
    eviction.TORCH_OPS.write_sketch(expected, given, start, rotation, bits)
    compiled(dtype).write_sketch(found, given, start, rotation, bits)
    assert expected.scales[1, 1, 20] == 0  # the key that equals the mean
    assert expected.scales.isnan().sum() == 2
    for name, tensor in found._asdict().items():
        torch.testing.assert_close(tensor, getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "value_dim"), [(2100, 40), (1, 8)])
def test_value_aware_scores_are_as_precise_as_the_reference(size: int, value_dim: int, dtype: torch.dtype) -> None:
    scores = torch.rand(2, 3, size) ** 4
    values = (torch.randn(2, size + 32, 3, value_dim) + 1).to(dtype).transpose(1, 2)
    if size > 1:
        scores[0, :, : size // 3] = 0
        values[0, :, : size // 3] = torch.nan
    expected, found = eviction.value_aware(scores, values), compiled(dtype).value_aware(scores, values)
    weights, own = scores.double(), torch.where(scores[..., None] == 0, 0, values[:, :, :size].double())
    out = (weights[..., None] * own).sum(2, keepdim=True) / weights.sum(2)[..., None, None]
    exact = weights * (own - out).norm(dim=-1)
    error, plain = ((each - exact).square().mean().sqrt() for each in (found, expected))
    assert error <= 2 * plain + exact.abs().max() * 2**-24


@pytest.mark.parametrize(
    ("group", "stored", "k", "protected", "by_largest", "sinks"),
    [(3, 300, 127, 0, False, False), (4, 130, 64, 5, True, True), (1, 128, 128, 0, False, True)],
)
def test_the_calibration_chooses_and_weighs_as_the_reference(
    group: int, stored: int, k: int, protected: int, by_largest: bool, sinks: bool
) -> None:
    pairs, count, late = 2, 5, 100
    estimates = torch.randn(pairs, count, group, stored) * 3
    logits, values = estimates + torch.randn_like(estimates) / 2, torch.randn(pairs, stored, 40) + 1
    unseen = torch.ones(count, late, dtype=torch.bool).triu(late - count)
    unseen[0] = True  # a query that sees fewer than k tokens
    for scores in (estimates, logits):
        scores[..., -late:].masked_fill_(unseen[:, None], -torch.inf)
    own_sinks = torch.randn(pairs, count, group) if sinks else None
    rule = {"sinks": own_sinks, "protected": protected, "by_largest": by_largest}
    expected = weigh_chosen(estimates.clone(), logits.clone(), values, k, **rule)  # type: ignore[arg-type]
    found = compiled(torch.float32).weigh_chosen(estimates, logits, values, k, **rule)
    assert found.rest_count.equal(expected.rest_count.float())
    for name, tensor in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), tensor.float(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_prompt_ends_as_on_the_reference(padded: bool, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, size, head_dim = 2, 6, 2, 900, 16
    keys = some_keys(batch, kv_heads, size, head_dim, dtype)
    values = torch.randn(batch, size, kv_heads, head_dim).to(dtype).transpose(1, 2)
    queries = torch.randn(batch, heads, 32, head_dim).to(dtype)
    valid = torch.ones(batch, size, dtype=torch.bool)
    valid[0, :130] = False
    split, stores = METHODS["rocketkv+"].split(size, 128, head_dim, 64), []
    for ops in (eviction.TORCH_OPS, compiled(dtype)):
        store = KVStore()
        store.extend(keys, values, valid if padded else None, expected=size)
        store.prompt.remember(queries, 32)
        params = AttentionParams(head_dim**-0.5)
        close_prompt(store, split, params, decode_reserve=64, kernel_size=13, ops=ops)
        stores.append(store.tensors())
    expected, found = stores
    bias, own_bias = expected.pop("residual_bias"), found.pop("residual_bias")
    assert bias.abs().max() > 0
    torch.testing.assert_close(own_bias, bias, rtol=1e-4, atol=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def test_threads_change_no_bit() -> None:
    ops, before, found = compiled(torch.float32), torch.get_num_threads(), []
    scores, values = torch.rand(1, 2, 700), torch.randn(1, 2, 732, 24)
    logits = torch.randn(2, 6, 3, 300)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            weighed = ops.weigh_chosen(logits.clone(), logits.clone(), values[0, :, :300], 50)
            found.append([ops.value_aware(scores, values), *weighed])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(each.equal(first) for each, first in zip(other, found[0], strict=True))
