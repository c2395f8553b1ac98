"""The sketch of a prompt's keys in one launch; `rocketkv.core.sketch` defines it, and its bits are the same here.

Letters: B batch, Hkv KV heads, D head dim, N stored tokens, C code bytes.
"""

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .decode import INTERPRETED
from .decode_shape import SketchRule
from .math import as_bfloat16


@triton.jit(do_not_specialize=["tokens", "start", "capacity"])
def build_sketch_kernel(
    keys,  # [B, Hkv, tokens, D], by strides
    mean,  # [B, Hkv, D] float32
    balance,  # [B, Hkv, D] bfloat16
    rotation,  # [D, D] float32, R times the length of its rows
    codes,  # [B, Hkv, capacity, C] uint8, written
    scales,  # [B, Hkv, capacity] bfloat16, written
    tokens,
    start,
    capacity,
    kv_heads,
    key_batch,
    key_head,
    key_token,
    top,
    rescale,
    step,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,  # bits of a packed digit
    HIGHER: tl.constexpr,  # whether a code has another digit, of one bit, in bytes of its own
    BYTES: tl.constexpr,  # C
    BLOCK: tl.constexpr,  # bytes of the first digits, padded
    BLOCK_HIGHER: tl.constexpr,  # of the other ones
    BN: tl.constexpr,
    EXACT: tl.constexpr,  # rotate in float32, for the interpreter
):
    """Write the codes and scales of some tokens, from slot `start` on; grid (B * Hkv, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    stored = token < tokens
    place = row * capacity + start + token
    keys += row // kv_heads * key_batch + row % kv_heads * key_head
    channel = tl.arange(0, DP)
    real = channel[None, :] < D
    centre = tl.load(mean + row * D + channel, mask=channel < D, other=0.0)
    factors = tl.load(balance + row * D + channel, mask=channel < D, other=1.0).to(tl.float32)
    lines = token[:, None].to(tl.int64) * key_token
    key = tl.load(keys + lines + channel[None, :], mask=stored[:, None] & real, other=0.0)
    difference = tl.where(real, (key.to(tl.float32) - centre[None, :]) * factors[None, :], 0.0)
    size = tl.abs(difference)
    # A maximum may drop NaN; one channel that is not finite spoils all of the key.
    finite = tl.sum((size < float("inf")).to(tl.int32), 1) == DP
    largest = tl.where(finite, tl.max(size, 1), float("nan"))
    usable = (largest > 0)[:, None]
    # Whole numbers of at most `top`; zeros where the largest is zero or NaN.
    whole = tl.div_rn(tl.where(usable, difference, 0.0), tl.where(usable, largest[:, None], 1.0))
    nearest: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding and taking it away rounds to whole numbers, ties to even
    whole = whole * top + nearest - nearest
    square = tl.sum(whole * whole, 1)
    # Levels count from the middle; the largest difference is `top`, so only zeros have squares under 1.
    distance = tl.sqrt_rn(tl.maximum(square, 1.0))[:, None] * step
    half: tl.constexpr = 4.0 if HIGHER else (1 << WIDTH) / 2.0
    product = tl.zeros([BN], tl.float32)
    first: tl.constexpr = (D * WIDTH + 7) // 8
    byte = tl.arange(0, BLOCK)
    packed = tl.zeros([BN, BLOCK], tl.int32)
    for digit in tl.static_range(8 // WIDTH):
        turned, code, level, there = _rotated(
            whole, rotation, distance, digit * first + byte, byte < first, channel, D, half, EXACT
        )
        product += tl.sum(tl.where(there, turned * (level + 0.5), 0.0), 1)
        packed |= (code & ((1 << WIDTH) - 1)) << (digit * WIDTH)
    written = codes + place[:, None] * BYTES
    tl.store(written + byte[None, :], packed.to(tl.uint8), mask=stored[:, None] & (byte < first)[None, :])
    if HIGHER:
        higher: tl.constexpr = (D + 7) // 8
        byte_higher = tl.arange(0, BLOCK_HIGHER)
        bits = tl.zeros([BN, BLOCK_HIGHER], tl.int32)
        for digit in tl.static_range(8):
            _, code, _, _ = _rotated(
                whole, rotation, distance, digit * higher + byte_higher, byte_higher < higher, channel, D, half, EXACT
            )
            bits |= (code >> WIDTH) << digit
        there = stored[:, None] & (byte_higher < higher)[None, :]
        tl.store(written + first + byte_higher[None, :], bits.to(tl.uint8), mask=there)
    scale = largest * tl.div_rn(square * rescale, tl.maximum(product, 0.5))
    tl.store(scales + place, as_bfloat16(scale), mask=stored)


@triton.jit
def _rotated(
    whole, rotation, distance, column, inside, channel, D: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr
):
    """Return some channels of rotated differences, their codes (0 where no channel is), levels, and where one is."""
    there = inside & (column < D)
    entries = tl.load(
        rotation + column[None, :] * D + channel[:, None], mask=there[None, :] & (channel < D)[:, None], other=0.0
    )
    if EXACT:
        turned = tl.dot(whole, entries, input_precision="ieee")
    else:  # both are integers of at most 256
        turned = tl.dot(whole.to(tl.bfloat16), entries.to(tl.bfloat16))
    level = tl.floor(tl.div_rn(turned, distance))
    level = tl.minimum(tl.maximum(level, -HALF), HALF - 1.0)
    return turned, tl.where(there[None, :], level + HALF, 0.0).to(tl.int32), level, there[None, :]


def write_sketch(
    encoding: Callable[[int, int], tuple[int, float, float]],
    sketch: Sequence[Tensor],
    keys: Tensor,
    start: int,
    rotation: Tensor,
    bits: int,
) -> None:
    """Write the codes and scales of consecutive tokens of a buffer, in one launch.

    Args:
        encoding: function of (head_dim, bits) that returns the other fields of a `SketchRule`.
        sketch: codes [B, Hkv, capacity, C] uint8 and scales [B, Hkv, capacity] bfloat16, contiguous, which are written;
            mean [B, Hkv, D] float32 and balance [B, Hkv, D] bfloat16.
        keys: [B, Hkv, n, D], the tokens; channels side by side.
        start: slot of the first token.
        rotation: [D, D] float32, R times the length of its rows.
        bits: of a channel, 1 to 4.
    """
    codes, scales, mean, balance = sketch
    batch, kv_heads, tokens, head_dim = keys.shape
    rule = SketchRule(bits, *encoding(head_dim, bits))
    width = rule.widths[0]
    padded = max(16, triton.next_power_of_2(head_dim))
    block = 64 if padded <= 128 else 32
    build_sketch_kernel[(batch * kv_heads, triton.cdiv(tokens, block))](
        keys, mean, balance, rotation, codes, scales, tokens, start, codes.shape[2], kv_heads, *keys.stride()[:3],
        rule.grid, rule.norm / rule.grid, rule.step,
        D=head_dim, DP=padded, WIDTH=width, HIGHER=len(rule.widths) > 1, BYTES=codes.shape[3],
        BLOCK=max(16, triton.next_power_of_2(-(-head_dim * width // 8))),
        BLOCK_HIGHER=max(16, triton.next_power_of_2(-(-head_dim // 8))),
        BN=block, EXACT=INTERPRETED, num_warps=4,
    )  # fmt: skip
