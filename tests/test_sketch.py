"""The key sketch: the same bits however written, scores of the keys that it stands for, and the value residual."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rocketkv import sketch as sketch_module
from rocketkv.budget import sketch_bytes
from rocketkv.residual import residual_attend
from rocketkv.sketch import (
    LEVEL_STEP,
    Sketch,
    build_sketch,
    code_bytes,
    decode,
    encode,
    grid,
    grow_sketch,
    mean_key,
    pack,
    rotation,
    rotation_norm,
    score_sketch,
    unpack,
    write_tokens,
)

from .close import assert_as_precise, assert_near
from .naive import attention

BITS = [1, 2, 3, 4]
HEAD_DIMS = [1, 7, 12, 64, 80, 96, 128, 192, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, H, Hkv, D, N
    (1, 3, 3, 8, 37),
    (2, 6, 2, 16, 50),
    (2, 5, 1, 7, 64),
    (1, 14, 2, 12, 301),
    (1, 4, 2, 80, 33),
]


def some_keys(batch: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return keys as models have them: a mean far from zero, channels of other sizes, tokens of other lengths."""
    centre = 3 * torch.randn(1, kv_heads, 1, head_dim)
    spread = torch.rand(1, kv_heads, 1, head_dim) + 0.2
    length = torch.rand(batch, kv_heads, tokens, 1) + 0.5
    return (centre + spread * length * torch.randn(batch, kv_heads, tokens, head_dim)).to(dtype)


def assert_same(found: Sketch, expected: Sketch, tokens: int | None = None) -> None:
    """Assert that two sketches have the same bits, in the first `tokens` tokens."""
    assert torch.equal(found.codes[:, :, :tokens], expected.codes[:, :, :tokens])
    assert torch.equal(found.scales[:, :, :tokens].view(torch.int16), expected.scales[:, :, :tokens].view(torch.int16))
    assert torch.equal(found.mean, expected.mean)


def naive_planes(codes: list[int], bits: int) -> list[int]:
    """Pack the codes of one token as the module's text says, digit by digit."""
    packed = []
    for low, width in [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]:
        size = math.ceil(len(codes) * width / 8)
        for byte in range(size):
            channels = range(byte, len(codes), size)
            packed.append(sum(((codes[c] >> low) % 2**width) << (width * i) for i, c in enumerate(channels)))
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [*range(1, 20), 64, 80, 96, 127, 128, 256])
def test_packing_loses_nothing_and_is_laid_out_as_written(head_dim: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, 5, head_dim), dtype=torch.uint8)
    codes[0, 0, 0], codes[0, 0, 1] = 0, 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 5, code_bytes(head_dim, bits))
    assert torch.equal(unpack(packed, bits, head_dim), codes)
    assert packed[1, 2, 3].tolist() == naive_planes(codes[1, 2, 3].tolist(), bits)


def test_packing_of_a_view() -> None:
    codes = torch.randint(0, 4, (10, 2, 3), dtype=torch.uint8).permute(1, 2, 0)
    packed = pack(codes, 2)
    assert torch.equal(unpack(packed, 2, 10), codes)
    assert torch.equal(unpack(packed.transpose(0, 1), 2, 10), codes.transpose(0, 1))


@pytest.mark.parametrize(
    ("head_dim", "bits", "size"),
    [(64, 1, 10), (64, 2, 18), (64, 3, 26), (64, 4, 34), (128, 2, 34), (256, 1, 34), (80, 3, 32), (7, 3, 5), (1, 1, 3)],
)
def test_bytes_of_a_token(head_dim: int, bits: int, size: int) -> None:
    assert sketch_bytes(head_dim, bits) == size
    sketch = build_sketch(torch.randn(2, 3, 5, head_dim), 5, rotation(head_dim), bits)
    assert sketch.codes.nbytes + sketch.scales.nbytes == 2 * 3 * 5 * size


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_bits_that_there_are_not(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 1, 2, 3 or 4, got {bits}"):
        code_bytes(64, bits)


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 2, 3, 48, 112, 576])
def test_the_rotation_is_integer_and_orthogonal(head_dim: int) -> None:
    turn = rotation(head_dim).double()
    assert torch.equal(turn, turn.round())
    square = round(rotation_norm(head_dim) ** 2)
    assert torch.equal(turn @ turn.t(), square * torch.eye(head_dim, dtype=torch.float64))
    assert torch.equal(turn, rotation(head_dim).double())


def test_the_rotation_stays_what_it_was() -> None:
    # A saved sketch is read with the rotation of the version that reads it.
    assert rotation(4).tolist() == [[-1, -1, -1, -1], [-1, 1, -1, 1], [-1, -1, 1, 1], [-1, 1, 1, -1]]
    assert rotation(3).tolist() == [[1, 2, -2], [-2, -1, -2], [-2, 2, 1]]


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 320, 512, 576])
def test_all_sums_are_of_integers_that_float32_holds(head_dim: int) -> None:
    # The worst sum is of |R x|, times 15 half steps: |R x|_1 <= sqrt(D) |R x|_2 and |x|_2 <= sqrt(D) grid.
    assert grid(head_dim) >= 16
    assert 15 * math.sqrt(head_dim) * rotation_norm(head_dim) * math.sqrt(head_dim) * grid(head_dim) <= 2**24


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_order_of_sums_changes_no_bit(head_dim: int, bits: int) -> None:
    keys = some_keys(2, 2, 200, head_dim)
    mean, turn = mean_key(keys, 200), rotation(head_dim)
    codes, scales = encode(keys, mean, turn, bits)
    order = torch.randperm(head_dim)
    shuffled = encode(keys[..., order], mean[..., order], turn[:, order], bits)
    assert torch.equal(shuffled[0], codes)
    assert torch.equal(shuffled[1], scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [7, 64, 80])
def test_written_step_by_step_it_has_the_bits_of_one_built_at_once(
    head_dim: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, turn = some_keys(2, 3, 61, head_dim, dtype), rotation(head_dim)
    built = build_sketch(keys, 40, turn, bits)
    assert (built.codes[:, :, 40:] == 0).all()
    assert (built.scales[:, :, 40:] == 0).all()
    at_once = Sketch(built.codes.clone(), built.scales.clone(), built.mean)
    write_tokens(at_once, keys, 0, turn, bits)
    for start in range(40, 50):
        write_tokens(built, keys[:, :, start : start + 1], start, turn, bits)
    write_tokens(built, keys[:, :, 50:57], 50, turn, bits)
    for start in range(57, 61):
        place = torch.full((2, 3), start, dtype=torch.int32)
        write_tokens(built, keys[:, :, start : start + 1].contiguous(), place, turn, bits)
    assert_same(built, at_once)
    monkeypatch.setattr(sketch_module, "BLOCK_BYTES", 4 * 2 * 3 * head_dim * 17)
    by_blocks = build_sketch(keys, 40, turn, bits)
    write_tokens(by_blocks, keys[:, :, 40:], torch.full((2, 3), 40), turn, bits)
    assert_same(by_blocks, at_once)


def test_autocast_changes_no_bit() -> None:
    keys, turn = some_keys(1, 2, 300, 64), rotation(64)
    expected = build_sketch(keys, 300, turn, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(build_sketch(keys, 300, turn, 2), expected)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_several_lengths(bits: int) -> None:
    keys, turn = some_keys(2, 2, 30, 12), rotation(12)
    lengths = torch.tensor([[30, 7], [0, 19]], dtype=torch.int32)
    for b in range(2):
        for g in range(2):
            keys[b, g, lengths[b, g] :] = torch.nan
    sketch = build_sketch(keys, 30, turn, bits, lengths)
    new = some_keys(2, 2, 2, 12)
    sketch = grow_sketch(sketch, 40)
    write_tokens(sketch, new, lengths, turn, bits)
    assert (sketch.mean[1, 0] == 0).all()
    for b in range(2):
        for g in range(2):
            length = int(lengths[b, g])
            own = keys[b : b + 1, g : g + 1, :length]
            alone = grow_sketch(build_sketch(own, length, turn, bits), 40)
            assert_near(sketch.mean[b, g], alone.mean[0, 0], 1e-6)
            alone = alone._replace(mean=sketch.mean[b : b + 1, g : g + 1])
            write_tokens(alone, torch.cat((own, new[b : b + 1, g : g + 1]), 2), 0, turn, bits)
            one = Sketch(*(tensor[b : b + 1, g : g + 1] for tensor in sketch))
            assert_same(one, alone, length + 2)


@pytest.mark.parametrize("bits", BITS)
def test_cropped_and_written_anew_it_is_as_if_nothing_had_been(bits: int) -> None:
    keys, turn = some_keys(1, 2, 50, 16), rotation(16)
    never = build_sketch(keys, 30, turn, bits)
    cropped = Sketch(*(tensor.clone() for tensor in never))
    write_tokens(cropped, some_keys(1, 2, 15, 16), 30, turn, bits)
    for sketch in (never, cropped):
        write_tokens(sketch, keys[:, :, 30:41], 30, turn, bits)
    assert_same(cropped, never, 41)


def test_growth_keeps_what_there_is() -> None:
    keys, turn = some_keys(2, 2, 9, 16), rotation(16)
    sketch = build_sketch(keys, 9, turn, 2)
    assert grow_sketch(sketch, 9) is sketch
    grown = grow_sketch(sketch, 20)
    assert grown.codes.shape == (2, 2, 20, 4)
    assert grown.scales.shape == (2, 2, 20)
    assert_same(grown, sketch, 9)
    assert (grown.codes[:, :, 9:] == 0).all()
    assert (grown.scales[:, :, 9:] == 0).all()


def naive_sketch(key: Tensor, mean: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sketch one key [D] in float64, without rounding its difference to integers.

    Returns:
        Where each channel lies in steps from the lowest code's lower border; how far rounding may have moved it; and
        the key that is stood for.
    """
    turn = rotation(len(key)).double() / rotation_norm(len(key))
    difference = key.double() - mean.double()
    turned = turn @ difference
    step = LEVEL_STEP[bits] * turned.square().mean().sqrt()
    place = turned / step + 2 ** (bits - 1)
    level = place.floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2
    scale = turned.square().sum() / (turned @ level)
    unit = difference.abs().max() / grid(len(key)) / 2
    moved = unit * turn.abs().sum(1) / step + (turned / step).abs() * unit * len(key) ** 0.5 / difference.norm()
    return place, moved, mean.double() + scale * (turn.t() @ level)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [7, 64, 80, 128])
def test_a_sketch_is_what_its_definition_says(head_dim: int, bits: int) -> None:
    keys, turn = some_keys(1, 2, 20, head_dim), rotation(head_dim)
    sketch = build_sketch(keys, 20, turn, bits)
    codes = unpack(sketch.codes, bits, head_dim).double()
    decoded = decode(sketch, 20, turn, bits).double()
    same = 0
    for g in range(2):
        for n in range(20):
            place, moved, expected = naive_sketch(keys[0, g, n], sketch.mean[0, g], bits)
            lowest, highest = ((place + by).floor().clamp(0, 2**bits - 1) for by in (-moved, moved))
            assert (codes[0, g, n] >= lowest).all()
            assert (codes[0, g, n] <= highest).all()
            if torch.equal(codes[0, g, n], place.floor().clamp(0, 2**bits - 1)):
                # The scale is kept to a 256th, of a difference whose channels are kept to a 512th of the largest.
                size = (keys[0, g, n] - sketch.mean[0, g]).norm()
                assert (decoded[0, g, n] - expected).norm() <= 0.02 * size
                same += 1
    assert same >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_a_sketchs_product_with_its_own_key_is_right(head_dim: int, bits: int, dtype: torch.dtype) -> None:
    keys, turn = some_keys(1, 2, 100, head_dim, dtype), rotation(head_dim)
    sketch = build_sketch(keys, 100, turn, bits)
    own = keys.float() - sketch.mean[:, :, None]
    found = decode(sketch, 100, turn, bits) - sketch.mean[:, :, None]
    ratio = (own * found).sum(-1) / own.square().sum(-1)
    # bfloat16 keeps a scale to a 256th, and integers up to 256 a difference to a 512th of its largest channel.
    assert (ratio - 1).abs().max() < 1 / 64


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_the_error_is_that_of_the_best_even_levels(bits: int, distortion: float) -> None:
    # Max 1960, table II: the mean square error of a unit Gaussian, rounded to 2^bits equally spaced levels. Lengthened
    # so that the product with the key is right, the sketch errs by 1 / (1 - distortion) - 1 of the key's square.
    keys, turn = 5 + torch.randn(1, 2, 1000, 512), rotation(512)
    sketch = build_sketch(keys, 1000, turn, bits)
    error = (decode(sketch, 1000, turn, bits) - keys).square().sum() / (keys - sketch.mean[:, :, None]).square().sum()
    assert float(error) == pytest.approx(1 / (1 - distortion) - 1, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_products_with_the_decoded_keys(
    shape: tuple[int, int, int, int, int], bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv_heads, head_dim, tokens = shape
    keys, turn = some_keys(batch, kv_heads, tokens + 5, head_dim, dtype), rotation(head_dim)
    query = torch.randn(batch, heads, head_dim).to(dtype)
    sketch = build_sketch(keys, tokens + 5, turn, bits)
    decoded = decode(sketch, tokens, turn, bits).double()
    by_head = decoded.repeat_interleave(heads // kv_heads, 1)
    exact = (by_head @ query.double()[..., None])[..., 0] * 0.3
    settings: dict[str, Any] = {"stored": tokens, "scaling": 0.3}
    logits = score_sketch(query, sketch, bits, **settings)
    assert logits.dtype == torch.float32
    assert logits.shape == (batch, heads, tokens)
    assert_near(logits, exact)
    capped = score_sketch(query, sketch, bits, softcap=2.0, **settings)
    assert_near(capped, 2 * torch.tanh(exact / 2))
    monkeypatch.setattr(sketch_module, "BLOCK_BYTES", 4 * batch * kv_heads * head_dim * 10)
    assert_near(score_sketch(query, sketch, bits, **settings), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_estimates_stand_beside_exact_logits(bits: int, dtype: torch.dtype) -> None:
    # The common part of all keys is a hundred times what tells them apart: without it no softmax over both is right.
    keys = (torch.randn(1, 2, 1, 64) * 100 + torch.randn(1, 2, 500, 64)).to(dtype)
    query, turn = torch.randn(1, 6, 64).to(dtype), rotation(64)
    logits = score_sketch(query, build_sketch(keys, 500, turn, bits), bits, stored=500, scaling=0.125)
    exact = (keys.double().repeat_interleave(3, 1) @ query.double()[..., None])[..., 0] * 0.125
    error = logits.double() - exact
    assert error.mean(-1).abs().max() < 0.2
    assert error.std() < 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_all_alike_have_exact_logits(dtype: torch.dtype, bits: int) -> None:
    query, turn = torch.randn(1, 2, 16), rotation(16)
    for key in (torch.zeros(16), torch.full((16,), 0.5), torch.randn(16)):
        keys = key.to(dtype).expand(1, 1, 8, 16).contiguous()
        logits = score_sketch(query, build_sketch(keys, 8, turn, bits), bits, stored=8, scaling=1.0)
        assert_near(logits, (query @ keys[0, 0].float().t())[0][None])


@pytest.mark.parametrize("bits", BITS)
def test_a_key_that_is_the_mean_has_no_scale_and_its_exact_logit(bits: int) -> None:
    turn = rotation(8)
    mean = torch.randn(1, 1, 8)
    codes, scales = encode(mean[:, :, None], mean, turn, bits)
    assert scales.item() == 0
    assert unpack(codes, bits, 8).tolist() == [[[[2 ** (bits - 1)] * 8]]]
    query = torch.randn(1, 1, 8)
    logits = score_sketch(query, Sketch(codes, scales, mean), bits, stored=1, scaling=1.0)
    assert_near(logits[0, 0, 0], (query * mean).sum())


@pytest.mark.parametrize("bits", BITS)
def test_constant_channels_cost_nothing(bits: int) -> None:
    keys, turn = torch.randn(1, 1, 200, 64), rotation(64)
    keys[..., ::2] = torch.linspace(-50, 50, 32)
    sketch = build_sketch(keys, 200, turn, bits)
    error = (decode(sketch, 200, turn, bits) - keys).norm() / (keys - sketch.mean[:, :, None]).norm()
    assert error < {1: 0.8, 2: 0.4, 3: 0.25, 4: 0.15}[bits]


@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30])
@pytest.mark.parametrize("bits", BITS)
def test_a_token_of_another_size_leaves_the_others_alone(bits: int, size: float) -> None:
    keys, turn = some_keys(1, 2, 40, 64), rotation(64)
    sketch = build_sketch(keys, 40, turn, bits)
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
    keys, turn = torch.randn(1, 1, 100, 64), rotation(64)
    keys[..., channel] *= 1000
    sketch = build_sketch(keys, 100, turn, bits)
    own, found = (x - sketch.mean[:, :, None] for x in (keys, decode(sketch, 100, turn, bits)))
    # Rotated, it is of one size in all channels: every bit knows its sign, and the scale its size.
    ratio = found[..., channel] / own[..., channel]
    assert (ratio - 1).abs().median() < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_a_key_that_is_no_number_spoils_its_own(bits: int, bad: float) -> None:
    keys, turn, query = some_keys(2, 2, 20, 16), rotation(16), torch.randn(2, 4, 16)
    sketch = build_sketch(keys, 20, turn, bits)
    clean = score_sketch(query, sketch, bits, stored=20, scaling=1.0)
    token = keys[:, :, 5:6].clone()
    token[1, 0, 0, 3] = bad
    write_tokens(sketch, token, 5, turn, bits)
    logits = score_sketch(query, sketch, bits, stored=20, scaling=1.0)
    spoilt = torch.zeros(2, 4, 20, dtype=torch.bool)
    spoilt[1, :2, 5] = True
    assert not logits[spoilt].isfinite().any()
    assert torch.equal(logits[~spoilt], clean[~spoilt])
    # In a prompt it spoils the mean too, and so all of its row and head group.
    keys[1, 0, 5, 3] = bad
    logits = score_sketch(query, build_sketch(keys, 20, turn, bits), bits, stored=20, scaling=1.0)
    spoilt[1, :2] = True
    assert not logits[spoilt].isfinite().any()
    assert torch.equal(logits[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("bits", BITS)
def test_no_token_at_all(bits: int) -> None:
    turn = rotation(8)
    sketch = build_sketch(torch.full((1, 2, 4, 8), torch.nan), 0, turn, bits)
    assert (sketch.mean == 0).all()
    key = torch.randn(1, 2, 1, 8)
    write_tokens(sketch, key, 0, turn, bits)
    found = decode(sketch, 1, turn, bits)
    assert ((found * key).sum(-1) / key.square().sum(-1) - 1).abs().max() < 1 / 64


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
    for n in chosen:
        logit = float(keys[n].double() @ query.double()) * 0.3
        logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
        total += math.exp(logit)
        out += math.exp(logit) * values[n].double()
    if others:
        rest = sum(math.exp(float(logits[n])) for n in others)
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
    sinks = torch.randn(heads) if with_sinks else None
    out, missed = residual_attend(
        query,
        keys,
        values,
        positions.int(),
        logits,
        sums.view(batch, kv_heads, 5),
        lengths=lengths.int() if ragged else None,
        scaling=0.3,
        softcap=softcap,
        sinks=sinks,
    )
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
    out, missed = residual_attend(query, keys, values, positions, logits, values.sum(2), lengths=None, scaling=0.3)
    assert_near(out, attention(query, keys, values, 0.3))
    assert (missed == 0).all()


def test_exact_where_estimates_are_and_the_others_values_are_alike() -> None:
    query, keys, values = torch.randn(1, 4, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 4)
    values[:, :, 10:] = values[:, :, 10:11]
    positions = torch.arange(10).expand(1, 2, 10)
    logits = exact_logits(query, keys, 0.3)
    out, missed = residual_attend(query, keys, values, positions, logits, values.sum(2), lengths=None, scaling=0.3)
    assert_near(out, attention(query, keys, values, 0.3))
    assert_near(missed, logits.softmax(-1)[..., 10:].sum(-1))


def test_large_logits_do_not_overflow() -> None:
    query, keys, values = 100 * torch.randn(1, 2, 16), torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 4)
    logits = exact_logits(query, keys, 1.0)
    positions = logits.mean(1, keepdim=True).topk(20).indices.sort().values
    out, missed = residual_attend(query, keys, values, positions, logits, values.sum(2), lengths=None, scaling=1.0)
    assert out.isfinite().all()
    kept = logits.softmax(-1).gather(-1, positions.expand(-1, 2, -1)).sum(-1)
    assert_near(missed, 1 - kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_in_low_precision_costs_the_rounding_of_its_output(dtype: torch.dtype) -> None:
    query, keys, values = (torch.randn(2, *size).to(dtype) for size in ((4, 16), (2, 50, 16), (2, 50, 8)))
    positions = torch.arange(0, 50, 5).expand(2, 2, 10)
    logits = exact_logits(query, keys, 0.3)
    sums = values.float().sum(2)
    out, _ = residual_attend(query, keys, values, positions, logits, sums, lengths=None, scaling=0.3)
    wide = (tensor.double() for tensor in (query, keys, values))
    reference = residual_attend(*wide, positions, logits, sums, lengths=None, scaling=0.3)[0]
    assert_as_precise(out, reference.to(dtype), reference)


def test_a_value_that_is_no_number_spoils_its_own_row_and_head_group() -> None:
    query, keys, values = torch.randn(2, 4, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 3)
    positions, logits = torch.arange(5).expand(2, 2, 5), torch.randn(2, 4, 20)
    settings: dict[str, Any] = {"lengths": None, "scaling": 0.3}
    clean, _ = residual_attend(query, keys, values, positions, logits, values.sum(2), **settings)
    values[1, 0, 13, 2] = torch.nan
    out, _ = residual_attend(query, keys, values, positions, logits, values.sum(2), **settings)
    spoilt = torch.zeros(2, 4, 3, dtype=torch.bool)
    spoilt[1, :2, 2] = True
    assert out[spoilt].isnan().all()
    assert torch.equal(out[~spoilt], clean[~spoilt])
