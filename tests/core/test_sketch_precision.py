"""What a sketch stands for: keys as near as its bits allow, extreme ones too; and scores are products with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv.core import scratch
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import (
    LEVEL_STEP,
    Sketch,
    build_sketch,
    encode,
    grid,
    rotation_matrix,
    rotation_norm,
    score_sketch,
    write_tokens,
)
from rocketkv.core.sketch_decode import decode, unpack
from sketch_case import BITS, DTYPES, SHAPES, no_queries, some_keys, some_queries


def naive_sketch(key: Tensor, mean: Tensor, balance: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sketch one key [D] in float64, without rounding its difference to integers.

    Returns:
        Where each channel lies in steps from the lowest code's lower border; how far rounding may have moved it; and
        the key that is stood for.
    """
    turn = rotation_matrix(len(key)).double() / rotation_norm(len(key))
    difference = (key.double() - mean.double()) * balance.double()
    turned = turn @ difference
    step = LEVEL_STEP[bits] * turned.square().mean().sqrt()
    place = turned / step + 2 ** (bits - 1)
    level = place.floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2
    scale = turned.square().sum() / (turned @ level)
    unit = difference.abs().max() / grid(len(key)) / 2
    moved = unit * turn.abs().sum(1) / step + (turned / step).abs() * unit * len(key) ** 0.5 / difference.norm()
    return place, moved, mean.double() + scale * (turn.t() @ level) / balance.double()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [7, 64, 80, 128])
def test_a_sketch_is_what_its_definition_says(head_dim: int, bits: int) -> None:
    keys, turn = some_keys(1, 2, 20, head_dim), rotation_matrix(head_dim)
    sketch = build_sketch(keys, 20, turn, bits, queries=some_queries(keys))
    codes = unpack(sketch.codes, bits, head_dim).double()
    decoded = decode(sketch, 20, turn, bits).double()
    same = 0
    for g in range(2):
        for n in range(20):
            place, moved, expected = naive_sketch(keys[0, g, n], sketch.mean[0, g], sketch.balance[0, g], bits)
            lowest, highest = ((place + by).floor().clamp(0, 2**bits - 1) for by in (-moved, moved))
            assert (codes[0, g, n] >= lowest).all()
            assert (codes[0, g, n] <= highest).all()
            if torch.equal(codes[0, g, n], place.floor().clamp(0, 2**bits - 1)):
                # The scale is kept to a 256th, of a difference whose channels are kept to a 512th of the largest.
                balance = sketch.balance[0, g].float()
                size = ((keys[0, g, n] - sketch.mean[0, g]) * balance).norm()
                assert ((decoded[0, g, n] - expected) * balance).norm() <= 0.02 * size
                same += 1
    assert same >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_a_sketchs_product_with_its_own_key_is_right(head_dim: int, bits: int, dtype: torch.dtype) -> None:
    keys, turn = some_keys(1, 2, 100, head_dim, dtype), rotation_matrix(head_dim)
    sketch = build_sketch(keys, 100, turn, bits, queries=no_queries(keys))
    own = keys.float() - sketch.mean[:, :, None]
    found = decode(sketch, 100, turn, bits) - sketch.mean[:, :, None]
    ratio = (own * found).sum(-1) / own.square().sum(-1)
    # bfloat16 keeps a scale to a 256th, and integers up to 256 a difference to a 512th of its largest channel.
    assert (ratio - 1).abs().max() < 1 / 64


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_the_error_is_that_of_the_best_even_levels(bits: int, distortion: float) -> None:
    # Max 1960, table II: the mean square error of a unit Gaussian, rounded to 2^bits equally spaced levels. Lengthened
    # so that the product with the key is right, the sketch errs by 1 / (1 - distortion) - 1 of the key's square.
    keys, turn = 5 + torch.randn(1, 2, 1000, 512), rotation_matrix(512)
    sketch = build_sketch(keys, 1000, turn, bits, queries=no_queries(keys))
    error = (decode(sketch, 1000, turn, bits) - keys).square().sum() / (keys - sketch.mean[:, :, None]).square().sum()
    assert float(error) == pytest.approx(1 / (1 - distortion) - 1, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_products_with_the_decoded_keys(
    shape: tuple[int, int, int, int, int], bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv_heads, head_dim, tokens = shape
    keys, turn = some_keys(batch, kv_heads, tokens + 5, head_dim, dtype), rotation_matrix(head_dim)
    query = torch.randn(batch, heads, head_dim).to(dtype)
    sketch = build_sketch(keys, tokens + 5, turn, bits, queries=some_queries(keys))
    decoded = decode(sketch, tokens, turn, bits).double()
    by_head = decoded.repeat_interleave(heads // kv_heads, 1)
    exact = (by_head @ query.double()[..., None])[..., 0] * 0.3
    logits = score_sketch(query, sketch, bits, AttentionParams(0.3), stored=tokens)
    assert logits.dtype == torch.float32
    assert logits.shape == (batch, heads, tokens)
    assert_near(logits, exact)
    capped = score_sketch(query, sketch, bits, AttentionParams(0.3, softcap=2.0), stored=tokens)
    assert_near(capped, 2 * torch.tanh(exact / 2))
    monkeypatch.setattr(scratch, "CPU_BYTES", 4 * batch * kv_heads * head_dim * 10)
    assert_near(score_sketch(query, sketch, bits, AttentionParams(0.3), stored=tokens), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_estimates_stand_beside_exact_logits(bits: int, dtype: torch.dtype) -> None:
    # The common part of all keys is a hundred times what tells them apart: without it no softmax over both is right.
    keys = (torch.randn(1, 2, 1, 64) * 100 + torch.randn(1, 2, 500, 64)).to(dtype)
    query, turn = torch.randn(1, 6, 64).to(dtype), rotation_matrix(64)
    logits = score_sketch(
        query, build_sketch(keys, 500, turn, bits, queries=some_queries(keys)), bits, AttentionParams(0.125), stored=500
    )
    exact = (keys.double().repeat_interleave(3, 1) @ query.double()[..., None])[..., 0] * 0.125
    error = logits.double() - exact
    assert error.mean(-1).abs().max() < 0.2
    assert error.std() < 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_all_alike_have_exact_logits(dtype: torch.dtype, bits: int) -> None:
    query, turn = torch.randn(1, 2, 16), rotation_matrix(16)
    for key in (torch.zeros(16), torch.full((16,), 0.5), torch.randn(16)):
        keys = key.to(dtype).expand(1, 1, 8, 16).contiguous()
        logits = score_sketch(
            query, build_sketch(keys, 8, turn, bits, queries=some_queries(keys)), bits, AttentionParams(1.0), stored=8
        )
        assert_near(logits, (query @ keys[0, 0].float().t())[0][None])


@pytest.mark.parametrize("bits", BITS)
def test_a_key_that_is_the_mean_has_no_scale_and_its_exact_logit(bits: int) -> None:
    turn = rotation_matrix(8)
    mean = torch.randn(1, 1, 8)
    ones = torch.ones_like(mean)
    codes, scales = encode(mean[:, :, None], mean, ones, turn, bits)
    assert scales.item() == 0
    assert unpack(codes, bits, 8).tolist() == [[[[2 ** (bits - 1)] * 8]]]
    query = torch.randn(1, 1, 8)
    logits = score_sketch(query, Sketch(codes, scales, mean, ones), bits, AttentionParams(1.0), stored=1)
    assert_near(logits[0, 0, 0], (query * mean).sum())


@pytest.mark.parametrize("bits", BITS)
def test_constant_channels_cost_nothing(bits: int) -> None:
    keys, turn = torch.randn(1, 1, 200, 64), rotation_matrix(64)
    keys[..., ::2] = torch.linspace(-50, 50, 32)
    sketch = build_sketch(keys, 200, turn, bits, queries=no_queries(keys))
    error = (decode(sketch, 200, turn, bits) - keys).norm() / (keys - sketch.mean[:, :, None]).norm()
    assert error < {1: 0.8, 2: 0.4, 3: 0.25, 4: 0.15}[bits]


@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30])
@pytest.mark.parametrize("bits", BITS)
def test_a_token_of_another_size_leaves_the_others_alone(bits: int, size: float) -> None:
    keys, turn = some_keys(1, 2, 40, 64), rotation_matrix(64)
    sketch = build_sketch(keys, 40, turn, bits, queries=no_queries(keys))
    huge = Sketch(*(tensor.clone() for tensor in sketch))
    token = torch.randn(1, 2, 1, 64) * size + (sketch.mean[:, :, None] if size > 1 else 0)
    write_tokens(huge, token, 7, turn, bits)
    rest = torch.arange(40) != 7
    assert torch.equal(huge.codes[:, :, rest], sketch.codes[:, :, rest])
    assert torch.equal(huge.scales[:, :, rest], sketch.scales[:, :, rest])
    found = decode(huge, 40, turn, bits)[:, :, 7]
    own = (token[:, :, 0] - sketch.mean).double()
    assert found.isfinite().all()
    error = (found.double() - sketch.mean.double() - own).square().sum().sqrt() / own.square().sum().sqrt()
    assert error < {1: 0.9, 2: 0.5, 3: 0.3, 4: 0.2}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channel", [0, 33])
def test_one_huge_channel_is_spread_and_kept(channel: int, bits: int) -> None:
    keys, turn = torch.randn(1, 1, 100, 64), rotation_matrix(64)
    keys[..., channel] *= 1000
    sketch = build_sketch(keys, 100, turn, bits, queries=no_queries(keys))
    own, found = (x - sketch.mean[:, :, None] for x in (keys, decode(sketch, 100, turn, bits)))
    # Rotated, it is of one size in all channels: every bit knows its sign, and the scale its size.
    ratio = found[..., channel] / own[..., channel]
    assert (ratio - 1).abs().median() < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_a_key_that_is_no_number_spoils_its_own(bits: int, bad: float) -> None:
    keys, turn, query = some_keys(2, 2, 20, 16), rotation_matrix(16), torch.randn(2, 4, 16)
    sketch = build_sketch(keys, 20, turn, bits, queries=some_queries(keys))
    clean = score_sketch(query, sketch, bits, AttentionParams(1.0), stored=20)
    token = keys[:, :, 5:6].clone()
    token[1, 0, 0, 3] = bad
    write_tokens(sketch, token, 5, turn, bits)
    logits = score_sketch(query, sketch, bits, AttentionParams(1.0), stored=20)
    spoilt = torch.zeros(2, 4, 20, dtype=torch.bool)
    spoilt[1, :2, 5] = True
    assert not logits[spoilt].isfinite().any()
    assert torch.equal(logits[~spoilt], clean[~spoilt])
    # In a prompt it spoils the mean too, and so all of its row and head group.
    keys[1, 0, 5, 3] = bad
    logits = score_sketch(
        query, build_sketch(keys, 20, turn, bits, queries=some_queries(keys)), bits, AttentionParams(1.0), stored=20
    )
    spoilt[1, :2] = True
    assert not logits[spoilt].isfinite().any()
    assert torch.equal(logits[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("bits", BITS)
def test_no_token_at_all(bits: int) -> None:
    turn = rotation_matrix(8)
    keys = torch.full((1, 2, 4, 8), torch.nan)
    sketch = build_sketch(keys, 0, turn, bits, queries=no_queries(keys))
    assert (sketch.mean == 0).all()
    key = torch.randn(1, 2, 1, 8)
    write_tokens(sketch, key, 0, turn, bits)
    found = decode(sketch, 1, turn, bits)
    assert ((found * key).sum(-1) / key.square().sum(-1) - 1).abs().max() < 1 / 64
