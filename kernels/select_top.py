"""The positions of a row's n largest scores: a radix selection that several programs share.

Eight bits of the n-th largest score a launch, from the top: each program adds the digits of its chunk to the row's
histogram, and reads from the earlier ones which scores are still in question. Then two launches count and write.
Integer additions commute, so the result does not depend on their order.

Letters: R rows, S scores a row.
"""

import triton
import triton.language as tl

BINS = tl.constexpr(256)
BITS = tl.constexpr(8)
DIGITS = tl.constexpr(4)
LOWEST = tl.constexpr(-2147483648)


@triton.jit
def _ordered(scores, row, position, size):
    """Return integers in the order of the scores; NaN with minus infinity."""
    score = tl.load(scores + row * size + position, mask=position < size, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # minus zero is no smaller
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 2147483647, bits)


@triton.jit
def _threshold(histograms, row, n, ROUNDS: tl.constexpr):
    """Return the first digits, in place, of the n-th largest value, and the rank of it among those that share them."""
    value = tl.full([], 0, tl.int32)
    rank = tl.full([], 0, tl.int32) + n
    digit = tl.arange(0, BINS)
    for i in tl.static_range(ROUNDS):
        count = tl.load(histograms + (row * DIGITS + i) * BINS + digit)
        larger = tl.sum(count, 0) - tl.cumsum(count, 0)  # those of larger digits
        found = tl.sum((larger + count >= rank).to(tl.int32), 0) - 1
        rank -= tl.sum(tl.where(digit == found, larger, 0), 0)
        value |= found << (BITS * (DIGITS - 1 - i))
    return value, rank


@triton.jit(do_not_specialize=["size", "n"])
def digits_kernel(
    scores,  # [R, S] float32
    histograms,  # [R, DIGITS, BINS] int32, zero for this round; added to
    size,
    n,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the digits that follow the first `ROUND` ones of the n-th largest value; grid (R, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    bits = _ordered(scores, row, position, size) ^ LOWEST  # so that digits are in order without a sign
    value, _ = _threshold(histograms, row, n, ROUND)
    shift: tl.constexpr = BITS * (DIGITS - 1 - ROUND)
    asked = position < size
    if ROUND > 0:
        asked &= ((bits ^ value) >> (shift + BITS)) == 0
    digit = tl.where(asked, (bits >> shift) & (BINS - 1), 0)
    # Those not in question count as zeros, which no number of larger digits includes: older versions cannot mask them.
    count = tl.histogram(digit, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + (row * DIGITS + ROUND) * BINS + bins, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["size", "n"])
def count_kernel(
    scores,  # [R, S] float32
    histograms,  # [R, DIGITS, BINS] int32
    counts,  # [R, 2, chunks] int32, written: how many lie above the n-th largest value, and at it
    size,
    n,
    CHUNK: tl.constexpr,
):
    """Count what a chunk has to give; grid (R, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    bits = _ordered(scores, row, position, size)
    value, _ = _threshold(histograms, row, n, DIGITS)
    value = value ^ LOWEST
    inside = position < size
    tl.store(counts + row * 2 * chunks + chunk, tl.sum((inside & (bits > value)).to(tl.int32), 0))
    tl.store(counts + (row * 2 + 1) * chunks + chunk, tl.sum((inside & (bits == value)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["size", "n"])
def positions_kernel(
    scores,  # [R, S] float32
    histograms,  # [R, DIGITS, BINS] int32
    counts,  # [R, 2, chunks] int32
    positions,  # [R, n] int32, written
    size,
    n,
    CHUNKS: tl.constexpr,  # earlier chunks whose counts are read at once
    CHUNK: tl.constexpr,
):
    """Write a chunk's positions behind those of the earlier chunks; grid (R, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    bits = _ordered(scores, row, position, size)
    value, rank = _threshold(histograms, row, n, DIGITS)
    value = value ^ LOWEST
    above, tied = tl.zeros([CHUNKS], tl.int32), tl.zeros([CHUNKS], tl.int32)
    for first in range(0, chunk, CHUNKS):
        earlier = first + tl.arange(0, CHUNKS)
        above += tl.load(counts + row * 2 * chunks + earlier, mask=earlier < chunk, other=0)
        tied += tl.load(counts + (row * 2 + 1) * chunks + earlier, mask=earlier < chunk, other=0)
    above_before, tied_before = tl.sum(above, 0), tl.sum(tied, 0)
    inside = position < size
    at_value = (inside & (bits == value)).to(tl.int32)
    # Of those at the n-th largest value, the first `rank` of the row.
    taken = (inside & (bits > value)) | ((at_value > 0) & (tied_before + tl.cumsum(at_value, 0) <= rank))
    number = above_before + tl.minimum(tied_before, rank) + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(positions + row * n + number, position, mask=taken)
