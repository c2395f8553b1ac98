"""Scalar functions that more than one kernel needs."""

import triton
import triton.language as tl


@triton.jit
def soft_capped(x, cap):
    """Return cap * tanh(x / cap): a series where the closed form would cancel."""
    x = x / cap
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decayed = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - decayed) / (1.0 + decayed)
    return tl.where(square < 0.04, small, large) * cap


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 values to the nearest that an index's dtype holds: in 8 bits, within its range; else as they are.

    Devices that do not convert to 8 bits, and the interpreter, round in ways of their own: from here it is exact.
    """
    if dtype == tl.float8e5:
        x = _rounded(x, 2, -14, 57344.0)
    return x


@triton.jit
def _rounded(x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LIMIT: tl.constexpr):
    """Return float32 values to the nearest of so many bits of mantissa, above the least exponent; NaN stays NaN."""
    x = tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (LEAST + 127) << 23)
    # A float32 of this size has no bits below those that stay, and sums are rounded to the nearest, ties to even.
    large = (exponent + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True) * 1.5
    return x + large - large


@triton.jit
def as_bound(x, dtype: tl.constexpr):
    """Return float32 values in an index's dtype, `rounded`; NaN stays NaN, which conversions may lose."""
    bound = rounded(x, dtype)
    if dtype == tl.float8e5:
        # The upper half of a float16: not every Triton converts it on every GPU.
        bits = bound.to(tl.float16).to(tl.uint16, bitcast=True) >> 8
        bound = tl.where(x == x, bits, 0x7F).to(tl.uint8).to(dtype, bitcast=True)
    else:
        bound = bound.to(dtype)
    return bound


@triton.jit
def widened(bounds):
    """Return what was read of an index in a dtype that converts everywhere."""
    if bounds.dtype == tl.float8e5:
        bounds = (bounds.to(tl.uint8, bitcast=True).to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return bounds


@triton.jit
def as_bfloat16(x):
    """Return float32 values as the nearest bfloat16, ties to even; the interpreter would cut off."""
    bits = x.to(tl.int32, bitcast=True)
    near = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return near.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def softmax_summed(peak, mass, logits):
    """Return the running peaks and masses of a softmax [heads, 16] with more logits [heads, a multiple of 32].

    As a matrix product leaves its result, a thread holds all that one peak is of: nothing is exchanged until the end.
    """
    parts = tl.reshape(logits, [logits.shape[0], logits.shape[1] // 32, 16, 2])
    higher = tl.maximum(peak, tl.max(tl.max(parts, 3), 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(parts - anchor[:, None, :, None])
    return higher, mass * tl.exp(peak - anchor) + tl.sum(tl.sum(weights, 3), 1)


@triton.jit
def softmax_merged(peak, mass):
    """Return each head's peak and mass, of those of `softmax_summed`."""
    highest = tl.max(peak, 1)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum(mass * tl.exp(peak - anchor[:, None]), 1)
