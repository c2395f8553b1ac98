"""The rule of the selection in registers: weights of pages, the k-th largest, and which tokens lie at or above it.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, N stored tokens, P page size, k tokens read.
"""

import triton
import triton.language as tl

TILE_PAGES = tl.constexpr(128)  # as in score_plan.py
HIGHEST = tl.constexpr(2147483647)
INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity
NO_TOKENS = tl.constexpr(-2)  # in place of the bits of a page without tokens
FEW_HEADS = tl.constexpr(8)  # so many heads' loads are unrolled, to be in flight together,
FEW_PAGES = tl.constexpr(8192)  # where so many pages leave the registers for it
HALF = tl.constexpr(16)  # bits of a count of pages, two of which share an integer
LOWER = tl.constexpr(0xFFFF)


@triton.jit
def _head_weight(
    scores, peaks, sums, sinks, row, kv_head, g, split, splits, page, pages, tiles, G: tl.constexpr, GP: tl.constexpr
):
    """Return one head's weight of one token of each page."""
    partial = (row * splits + split) * GP + g
    peak = tl.load(peaks + partial, mask=split < splits, other=float("-inf"))
    mass = tl.load(sums + partial, mask=split < splits, other=0.0)
    highest = tl.max(peak, 0)
    total = tl.sum(mass * tl.exp(peak - highest), 0)
    if sinks is not None:
        total += tl.exp(tl.load(sinks + kv_head * G + g).to(tl.float32) - highest)
    # Whole tiles are read: a mask by the row's pages would part the wide loads.
    logit = tl.load(scores + (row * G + g) * tiles * TILE_PAGES + page, mask=page < tiles * TILE_PAGES, other=0.0)
    return tl.exp(tl.where(page < pages, logit, float("-inf")) - highest) / total


@triton.jit
def _with_head(weight, head_weight, LARGEST: tl.constexpr):
    """Return the heads' sum of weights, or the largest, with one head more; NaN stays."""
    if LARGEST:
        weight = tl.where((head_weight > weight) | (head_weight != head_weight), head_weight, weight)
    else:
        weight += head_weight
    return weight


@triton.jit
def page_weights(
    scores, peaks, sums, sinks, row, kv_head, splits, page, pages, tiles,
    G: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Return the weight of one token of each page, a softmax over stored tokens: the heads' average, or the largest."""
    weight = tl.zeros(page.shape, tl.float32)
    split = tl.arange(0, SP)
    if (G <= FEW_HEADS) & (page.shape[0] <= FEW_PAGES):
        for g in tl.static_range(G):
            weight = _with_head(
                weight,
                _head_weight(scores, peaks, sums, sinks, row, kv_head, g, split, splits, page, pages, tiles, G, GP),
                LARGEST,
            )
    else:
        for head in range(G):
            weight = _with_head(
                weight,
                _head_weight(scores, peaks, sums, sinks, row, kv_head, head, split, splits, page, pages, tiles, G, GP),
                LARGEST,
            )
    if not LARGEST:
        weight /= G
    return weight


@triton.jit
def ordered_bits(weight, count, first):
    """Return integers in the order of the weights, which are not negative.

    Pages that begin with one of the `first` tokens come before all; NaN comes last, and pages without tokens after it.
    """
    bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), -1)
    bits = tl.where(first, INFINITE, bits)
    return tl.where(count > 0, bits, NO_TOKENS)


@triton.jit
def tokens_in(page, stored, P):
    """Return how many of a row's tokens lie in each page."""
    return tl.minimum(tl.maximum(stored - page * P, 0), P)


@triton.jit
def _at_least(bits, count, value, SINGLE: tl.constexpr):
    """Return how many tokens have at least this value, which is no less than -1."""
    each = 1 if SINGLE else count
    return tl.sum(tl.where(bits >= value, each, 0), 0)


@triton.jit
def threshold(bits, count, held, k, P, SINGLE: tl.constexpr):
    """Return the value at which the k-th of `held` tokens falls in descending order, and how many lie above it.

    k is at least one and no more than `held`. SINGLE tells whether pages are known to be single tokens.
    """
    low = tl.full([], -1, tl.int32)
    high = tl.max(bits, 0) + 1
    reached = held
    # Bisection over the bits; what is left within a page's tokens of k is one or two values.
    while (high - low > 1) & (reached >= k + P):
        middle = low + (high - low) // 2
        found = _at_least(bits, count, middle, SINGLE)
        enough = found >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, found, reached)
    value = tl.min(tl.where(bits >= low, bits, HIGHEST), 0)
    above = _at_least(bits, count, value + 1, SINGLE)
    while above >= k:
        value = tl.min(tl.where(bits > value, bits, HIGHEST), 0)
        above = _at_least(bits, count, value + 1, SINGLE)
    return value, above


@triton.jit
def cut(bits, count, value, rest, P):
    """Choose the tokens above a value, and of those at it the first `rest`.

    Only the last page may have fewer than P tokens.

    Returns:
        taken: tokens of each page.
        number: tokens chosen before each page.
        order: pages with a chosen token before each page.
    """
    above, tied = bits > value, bits == value
    # One running sum for both: pages above in the lower half, pages at the value in the upper.
    flags = above.to(tl.int32) + (tied.to(tl.int32) << HALF)
    before = tl.cumsum(flags, 0) - flags
    tied_before = before >> HALF
    above_before = before & LOWER
    left = tl.minimum(tl.maximum(rest - tied_before * P, 0), count)
    taken = tl.where(above, count, tl.where(tied, left, 0))
    number = above_before * P + tl.minimum(tied_before * P, rest)
    order = above_before + tl.minimum(tied_before, (rest + P - 1) // P)
    return taken, number, order


@triton.jit
def mass_over(estimates):
    """Return the largest of some logits, and the sum of exponentials over it."""
    highest = tl.max(estimates, 0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum(tl.exp(estimates - anchor), 0)


@triton.jit
def joined(peak, mass, other_peak, other_mass):
    """Return the largest logit and the sum of exponentials over it of two sets of logits."""
    higher = tl.maximum(peak, other_peak)
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, mass * tl.exp(peak - anchor) + other_mass * tl.exp(other_peak - anchor)


@triton.jit
def write_rest(rest, row, part: tl.constexpr, g, peak, mass, GP: tl.constexpr):
    """Write a head's estimated mass of the tokens that were not chosen (part 0) or were (1): largest logit, and sum."""
    tl.store(rest + (row * 4 + 2 * part) * GP + g, peak)
    tl.store(rest + (row * 4 + 2 * part + 1) * GP + g, mass)
