"""The factors of a sketch's channels: logits err least, whatever the size of the keys' channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv.core.balance import channel_balance, mean_key
from rocketkv.core.params import AttentionParams
from rocketkv.core.residual import overestimate
from rocketkv.core.sketch import build_sketch, rotation_matrix, score_sketch
from sketch_case import some_keys, some_queries

D, N = 64, 400


def logit_error(query: Tensor, keys: Tensor, asked: Tensor, bits: int = 2) -> float:
    """Return the rms error of the logits of queries [B, H, n, D] by a sketch that was built for `asked`."""
    sketch = build_sketch(keys, keys.shape[2], rotation_matrix(keys.shape[3]), bits, queries=asked)
    group = query.shape[1] // keys.shape[1]
    exact = query @ keys.repeat_interleave(group, 1).transpose(2, 3)
    params = AttentionParams(1.0)
    found = [score_sketch(q, sketch, bits, params, stored=keys.shape[2]) for q in query.unbind(2)]
    return float((torch.stack(found, 2) - exact).square().mean().sqrt())


def unlike(channels: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Return queries and keys of a head, some channels of the keys larger and of the queries smaller by a factor."""
    factor = torch.ones(D)
    for channel, size in channels.items():
        factor[channel] = size
    return torch.randn(1, 2, 40, D) / factor.sqrt(), torch.randn(1, 1, N, D) * factor


@pytest.mark.parametrize("bits", [1, 2])
def test_a_few_large_channels_cost_little(bits: int) -> None:
    query, keys = unlike({3: 40.0, 17: 25.0, 40: 40.0})
    balanced, plain = (logit_error(query, keys, asked, bits) for asked in (query, torch.zeros_like(query)))
    assert balanced < 0.5 * plain


def test_channels_that_are_alike_stay_as_they_are() -> None:
    query, keys = torch.randn(1, 2, 5000, D), torch.randn(1, 1, 5000, D)
    found = channel_balance(query, keys, mean_key(keys, 5000), 5000)
    assert found.dtype == torch.bfloat16
    assert float(found.max() / found.min()) < 1.05


@pytest.mark.parametrize("head_dim", [7, 64])
def test_the_factors_are_the_square_roots_of_the_sizes(head_dim: int) -> None:
    keys = some_keys(2, 3, 50, head_dim)
    asked, mean = some_queries(keys), mean_key(keys, 50)
    expected = asked.square().mean(2).sqrt() / (keys - mean[:, :, None]).square().mean(2).sqrt()
    found = channel_balance(asked, keys, mean, 50).float()
    ratio = found / expected.sqrt()
    assert ((ratio / ratio.amin(-1, keepdim=True) - 1).abs() < 2**-6).all()
    assert ((found.amin(-1) >= 1) & (found.amin(-1) <= 2)).all()


def test_scaled_keys_and_queries_have_the_same_logits() -> None:
    """Queries over a factor and keys times it are the same attention: the sketch's logits are the same, too."""
    query, keys = torch.randn(1, 2, 30, D), torch.randn(1, 1, N, D)
    factor = 2.0 ** torch.randint(-3, 4, (D,))  # exact
    rotation, params = rotation_matrix(D), AttentionParams(0.125)
    logits = [
        score_sketch(q[:, :, 0], build_sketch(k, N, rotation, 2, queries=q), 2, params, stored=N)
        for q, k in ((query, keys), (query / factor, keys * factor))
    ]
    assert_near(logits[0], logits[1], 1e-5)


def test_channels_nobody_asks_for_and_keys_that_are_not_finite() -> None:
    query, keys = torch.randn(1, 2, 5, D), torch.randn(1, 2, 30, D)
    query[..., 5] = 0
    keys[:, 0, :, 7] = 1.5
    found = channel_balance(query, keys, mean_key(keys, 30), 30)
    assert found.isfinite().all()
    keys[0, 1, 4, 9] = torch.nan
    found = channel_balance(query, keys, mean_key(keys, 30), 30)
    assert (found[0, 1] == 1).all()
    assert (found[0, 0] != 1).any()
    assert (channel_balance(torch.zeros_like(query), keys, mean_key(keys, 30), 30) == 1).all()


def test_only_an_overestimate_lowers_the_others() -> None:
    exact = torch.tensor([2.0, 2.0, 2.0, -torch.inf, 2.0, 2.0])
    estimated = torch.tensor([3.0, 2.0, 1.0, 0.5, torch.inf, torch.nan])
    assert overestimate(exact, estimated).tolist() == [0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
