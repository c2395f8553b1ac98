"""The sums of a residual's values after a crop, in one launch that reads nothing back.

Letters: B batch, Hkv KV heads, DV head dim of values.
"""

import triton
import triton.language as tl
from torch import Tensor

LARGEST_EXACT = tl.constexpr(1048576.0)  # 2^20, also in rocketkv.core.residual; a test compares them
CHANNELS = 64
TOKENS = 32


@triton.jit
def _sum(values, first, last, channel, DV: tl.constexpr, BN: tl.constexpr):
    """Return the sum of the values of slots `first` to `last`, rounded to multiples of 2^-32."""
    total = tl.zeros([BN, channel.shape[0]], tl.float64)
    summable: tl.constexpr = 1572864.0  # 1.5 * 2^20: in float64 it rounds to multiples of 2^-32
    for start in range(first, last, BN):
        token = start + tl.arange(0, BN)[:, None]
        there = (token < last) & (channel[None, :] < DV)
        vector = tl.load(values + token.to(tl.int64) * DV + channel[None, :], mask=there, other=0.0)
        total += vector.to(tl.float32).to(tl.float64) + summable - summable
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["capacity", "count"])
def subtract_last_kernel(
    value_sum,  # [B, Hkv, DV] float64, changed
    values,  # [B, Hkv, capacity, DV]
    lengths,  # [B, Hkv] int32, the last tokens included
    capacity,
    count,
    DV: tl.constexpr,
    DVP: tl.constexpr,  # channels of a program
    BN: tl.constexpr,  # tokens that are summed at once
):
    """Take the values of a row's last `count` tokens off their sum; grid (B * Hkv, blocks of channels)."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * DVP + tl.arange(0, DVP)
    length = tl.load(lengths + row)
    values += row * capacity * DV
    removed = _sum(values, length - count, length, channel, DV, BN)
    total = tl.load(value_sum + row * DV + channel, mask=channel < DV, other=0.0)
    exact = (tl.abs(total) < LARGEST_EXACT) & (tl.abs(removed) < LARGEST_EXACT)
    if tl.sum(exact.to(tl.int32), 0) == DVP:  # noqa: SIM108  # only one of the two is to run
        left = total - removed
    else:
        # Values that are not finite or very large: what is left is summed anew.
        left = _sum(values, 0, length - count, channel, DV, BN)
    tl.store(value_sum + row * DV + channel, left, mask=channel < DV)


def subtract_last(
    value_sum: Tensor, values: Tensor, lengths: Tensor, *, count: int, longest: int, shortest: int
) -> None:
    """Subtract the values of each row's last `count` tokens from their sum, in place; where inexact, sum anew.

    Args:
        value_sum: [B, Hkv, DV] float64, contiguous; written.
        values: [B, Hkv, capacity, DV], contiguous.
        lengths: [B, Hkv] int32, contiguous, tokens of each row, the last ones included.
        count: tokens to remove from every row.
        longest: tokens of the longest row; the kernel reads `lengths`.
        shortest: tokens of the shortest row, likewise.
    """
    batch, kv_heads, capacity, value_dim = values.shape
    block = min(CHANNELS, triton.next_power_of_2(value_dim))
    subtract_last_kernel[(batch * kv_heads, triton.cdiv(value_dim, block))](
        value_sum, values, lengths, capacity, count, DV=value_dim, DVP=block, BN=TOKENS, num_warps=4
    )
