"""The key sketch: how its codes are packed and its keys turned, and the same bits however it is written."""

from __future__ import annotations

import math

import pytest
import torch

from close import assert_near
from rocketkv.budget import sketch_bytes
from rocketkv.core import scratch
from rocketkv.core.balance import channel_balance, mean_key
from rocketkv.core.sketch import (
    Sketch,
    build_sketch,
    code_bytes,
    encode,
    grid,
    grow_sketch,
    pack,
    rotation_matrix,
    rotation_norm,
    write_tokens,
)
from rocketkv.core.sketch_decode import unpack
from sketch_case import BITS, DTYPES, some_keys, some_queries

HEAD_DIMS = [1, 7, 12, 64, 80, 96, 128, 192, 256]


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
    keys = torch.randn(2, 3, 5, head_dim)
    sketch = build_sketch(keys, 5, rotation_matrix(head_dim), bits, queries=some_queries(keys))
    assert sketch.codes.nbytes + sketch.scales.nbytes == 2 * 3 * 5 * size


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_bits_that_there_are_not(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 1, 2, 3 or 4, got {bits}"):
        code_bytes(64, bits)


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 2, 3, 48, 112, 576])
def test_the_rotation_is_integer_and_orthogonal(head_dim: int) -> None:
    turn = rotation_matrix(head_dim).double()
    assert torch.equal(turn, turn.round())
    square = round(rotation_norm(head_dim) ** 2)
    assert torch.equal(turn @ turn.t(), square * torch.eye(head_dim, dtype=torch.float64))
    assert torch.equal(turn, rotation_matrix(head_dim).double())


def test_the_rotation_stays_what_it_was() -> None:
    # A saved sketch is read with the rotation of the version that reads it.
    assert rotation_matrix(4).tolist() == [[-1, -1, -1, -1], [-1, 1, -1, 1], [-1, -1, 1, 1], [-1, 1, 1, -1]]
    assert rotation_matrix(3).tolist() == [[1, 2, -2], [-2, -1, -2], [-2, 2, 1]]


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 320, 512, 576])
def test_all_sums_are_of_integers_that_float32_holds(head_dim: int) -> None:
    # The worst sum is of |R x|, times 15 half steps: |R x|_1 <= sqrt(D) |R x|_2 and |x|_2 <= sqrt(D) grid.
    assert grid(head_dim) >= 16
    assert 15 * math.sqrt(head_dim) * rotation_norm(head_dim) * math.sqrt(head_dim) * grid(head_dim) <= 2**24


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_order_of_sums_changes_no_bit(head_dim: int, bits: int) -> None:
    keys = some_keys(2, 2, 200, head_dim)
    mean, turn = mean_key(keys, 200), rotation_matrix(head_dim)
    balance = channel_balance(some_queries(keys), keys, mean, 200)
    codes, scales = encode(keys, mean, balance, turn, bits)
    order = torch.randperm(head_dim)
    shuffled = encode(keys[..., order], mean[..., order], balance[..., order], turn[:, order], bits)
    assert torch.equal(shuffled[0], codes)
    assert torch.equal(shuffled[1], scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [7, 64, 80])
def test_written_step_by_step_it_has_the_bits_of_one_built_at_once(
    head_dim: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, turn = some_keys(2, 3, 61, head_dim, dtype), rotation_matrix(head_dim)
    built = build_sketch(keys, 40, turn, bits, queries=some_queries(keys))
    assert (built.codes[:, :, 40:] == 0).all()
    assert (built.scales[:, :, 40:] == 0).all()
    at_once = built._replace(codes=built.codes.clone(), scales=built.scales.clone())
    write_tokens(at_once, keys, 0, turn, bits)
    for start in range(40, 50):
        write_tokens(built, keys[:, :, start : start + 1], start, turn, bits)
    write_tokens(built, keys[:, :, 50:57], 50, turn, bits)
    for start in range(57, 61):
        place = torch.full((2, 3), start, dtype=torch.int32)
        write_tokens(built, keys[:, :, start : start + 1].contiguous(), place, turn, bits)
    assert_same(built, at_once)
    monkeypatch.setattr(scratch, "CPU_BYTES", 4 * 2 * 3 * head_dim * 17)
    by_blocks = build_sketch(keys, 40, turn, bits, queries=some_queries(keys))
    write_tokens(by_blocks, keys[:, :, 40:], torch.full((2, 3), 40), turn, bits)
    assert_same(by_blocks, at_once)


def test_autocast_changes_no_bit() -> None:
    keys, turn = some_keys(1, 2, 300, 64), rotation_matrix(64)
    expected = build_sketch(keys, 300, turn, 2, queries=some_queries(keys))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(build_sketch(keys, 300, turn, 2, queries=some_queries(keys)), expected)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_several_lengths(bits: int) -> None:
    keys, turn = some_keys(2, 2, 30, 12), rotation_matrix(12)
    lengths = torch.tensor([[30, 7], [0, 19]], dtype=torch.int32)
    for b in range(2):
        for g in range(2):
            keys[b, g, lengths[b, g] :] = torch.nan
    sketch = build_sketch(keys, 30, turn, bits, lengths, queries=some_queries(keys))
    new = some_keys(2, 2, 2, 12)
    sketch = grow_sketch(sketch, 40)
    write_tokens(sketch, new, lengths, turn, bits)
    assert (sketch.mean[1, 0] == 0).all()
    for b in range(2):
        for g in range(2):
            length = int(lengths[b, g])
            own = keys[b : b + 1, g : g + 1, :length]
            alone = grow_sketch(build_sketch(own, length, turn, bits, queries=some_queries(own)), 40)
            assert_near(sketch.mean[b, g], alone.mean[0, 0], 1e-6)
            fixed = {name: getattr(sketch, name)[b : b + 1, g : g + 1] for name in ("mean", "balance")}
            alone = alone._replace(**fixed)
            write_tokens(alone, torch.cat((own, new[b : b + 1, g : g + 1]), 2), 0, turn, bits)
            one = Sketch(*(tensor[b : b + 1, g : g + 1] for tensor in sketch))
            assert_same(one, alone, length + 2)


@pytest.mark.parametrize("bits", BITS)
def test_cropped_and_written_anew_it_is_as_if_nothing_had_been(bits: int) -> None:
    keys, turn = some_keys(1, 2, 50, 16), rotation_matrix(16)
    never = build_sketch(keys, 30, turn, bits, queries=some_queries(keys))
    cropped = Sketch(*(tensor.clone() for tensor in never))
    write_tokens(cropped, some_keys(1, 2, 15, 16), 30, turn, bits)
    for sketch in (never, cropped):
        write_tokens(sketch, keys[:, :, 30:41], 30, turn, bits)
    assert_same(cropped, never, 41)


def test_growth_keeps_what_there_is() -> None:
    keys, turn = some_keys(2, 2, 9, 16), rotation_matrix(16)
    sketch = build_sketch(keys, 9, turn, 2, queries=some_queries(keys))
    assert grow_sketch(sketch, 9) is sketch
    grown = grow_sketch(sketch, 20)
    assert grown.codes.shape == (2, 2, 20, 4)
    assert grown.scales.shape == (2, 2, 20)
    assert_same(grown, sketch, 9)
    assert (grown.codes[:, :, 9:] == 0).all()
    assert (grown.scales[:, :, 9:] == 0).all()
