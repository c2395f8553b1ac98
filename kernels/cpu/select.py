"""Choose a line's tokens from its scores, by the rule of `rocketkv.core.topk`.

Letters: G query heads of a line, N stored tokens, P page size, U units (pages, or single tokens of a sketch), k tokens.
"""

import math

import numpy as np

from .lowlevel import LANES, array, exact, exp, fast, float_of, keep_apart, load
from .operands import AT, REST, SIZE
from .pages import fill

_ZERO, _ONE, _NAN_RANK, _NO_UNIT, _LEAST = (np.float32(x) for x in (0, 1, -1, -2, -np.inf))
_INFINITE = np.int64(0x7F800000)  # bits of infinity


@exact
def tile_of(numbers, tile):
    """Return a tile of float32 numbers that begin at an address."""
    return array(numbers + 4 * LANES * tile, LANES, np.float32)


@fast
def exponentials(scores, tiles, lanes):
    """Replace the scores at an address by e^(score - peak); returns the peak and the sum."""
    keep_apart()
    fill(lanes, 0, LANES, _LEAST)
    for tile in range(tiles):
        own = tile_of(scores, tile)
        for u in range(LANES):
            lanes[u] = max(lanes[u], own[u])
    peak = lanes[0]
    for u in range(1, LANES):
        peak = max(peak, lanes[u])
    total = _ZERO
    for tile in range(tiles):
        own = tile_of(scores, tile)
        for u in range(LANES):
            own[u] = exp(own[u] - peak)
        for u in range(LANES):
            total += own[u]
    return peak, total


@fast
def rank(shared, scores, tiles, factor, first, by_largest):
    """Add to the units' ranks their weight in one more head, or take the larger."""
    keep_apart()
    for tile in range(tiles):
        to, own = tile_of(shared, tile), tile_of(scores, tile)
        if first:
            for u in range(LANES):
                to[u] = own[u] * factor
        elif by_largest:
            for u in range(LANES):
                weight = own[u] * factor
                to[u] = weight if weight > to[u] or weight != weight else to[u]
        else:
            for u in range(LANES):
                to[u] += own[u] * factor


@fast
def count_above(shared, tiles, least):
    """Return how many units rank at least so high; fewer than 2^24, so float32 counts them."""
    keep_apart()
    count = _ZERO
    for tile in range(tiles):
        own = tile_of(shared, tile)
        for u in range(LANES):
            count += _ONE if own[u] >= least else _ZERO
    return np.int64(count)


@exact
def least_chosen(shared, last, tiles, page_size, lacking, k):
    """Return the largest rank such that the units of it and above have at least k tokens."""
    low, high = np.int64(-1), _INFINITE + 1
    least = _NAN_RANK
    while high - low > 1:
        middle = (low + high) >> 1
        rank_of = float_of(np.uint32(middle))
        tokens = count_above(shared, tiles, rank_of) * page_size - (lacking if last >= rank_of else 0)
        if tokens >= k:
            low, least = middle, rank_of
            if tokens == k:
                break
        else:
            high = middle
    return least


@exact
def list_tokens(shared, taken, units, page_size, last_size, least, k, chosen):
    """Write the k tokens, those above the rank `least` and the lowest of its ties, and how many each unit has."""
    above = 0
    for u in range(units):
        if shared[u] > least:
            above += page_size if u < units - 1 else last_size
    ties, n = k - above, 0
    for u in range(units):
        number = 0
        if shared[u] >= least:
            number = page_size if u < units - 1 else last_size
            if shared[u] == least:
                number = min(number, ties)
                ties -= number
            for j in range(number):
                chosen[n + j] = u * page_size + j
            n += number
        taken[u] = number


@fast
def masses(scores, taken, units, page_size, last_size):
    """Return the sums of e^(score - peak) over the chosen tokens, and over all others."""
    keep_apart()
    own, others = _ZERO, _ZERO
    for u in range(units - 1):
        own += taken[u] * scores[u]
        others += (page_size - taken[u]) * scores[u]
    u = units - 1
    return own + taken[u] * scores[u], others + (last_size - taken[u]) * scores[u]


@exact
def select(ints, reals, line, stored, local):
    """Write the line's chosen tokens in ascending order and, for the residual, the masses of its scores."""
    group, page_size, k = ints[SIZE.group], ints[SIZE.page_size], min(ints[SIZE.top_k], stored)
    padded, units = ints[SIZE.tiles] * LANES, -(-stored // page_size)
    tiles, last_size = -(-units // LANES), stored - (units - 1) * page_size
    lacking = page_size - last_size
    shared, taken = array(local, padded, np.float32), array(local + 4 * padded, padded, np.float32)
    lanes = array(local + 8 * padded, LANES, np.float32)
    rest = array(ints[SIZE.rest] + 8 * REST * line * group, REST * group, np.float64)
    for g in range(group):
        scores = ints[SIZE.scores] + 4 * (line * group + g) * padded
        peak, total = exponentials(scores, tiles, lanes)
        tokens = np.float32(page_size) * total - np.float32(lacking) * load(scores + 4 * (units - 1), np.float32)
        if ints[AT.learned_sinks]:
            head = line % ints[SIZE.kv_heads] * group + g
            tokens += np.float32(math.exp(load(ints[AT.learned_sinks] + 4 * head, np.float32) - peak))
        rank(local, scores, tiles, _ONE / tokens, g == 0, ints[SIZE.by_largest] != 0)
        rest[REST * g] = peak
    for u in range(units):
        if shared[u] != shared[u]:
            shared[u] = _NAN_RANK
    fill(shared, units, tiles * LANES, _NO_UNIT)
    fill(shared, 0, min(-(-ints[SIZE.protected] // page_size), units), np.float32(np.inf))
    least = least_chosen(local, shared[units - 1], tiles, page_size, lacking, k)
    chosen = array(ints[SIZE.chosen] + 4 * line * ints[SIZE.top_k], ints[SIZE.top_k], np.int32)
    list_tokens(shared, taken, units, page_size, last_size, least, k, chosen)
    if ints[SIZE.residual]:
        for g in range(group):
            scores = array(ints[SIZE.scores] + 4 * (line * group + g) * padded, padded, np.float32)
            own, others = masses(scores, taken, units, np.float32(page_size), np.float32(last_size))
            rest[REST * g + 1], rest[REST * g + 2] = own, others
