"""Score the pages of a line: see `score_pages` of the reference, whose rules these are.

Letters: D head dim, G query heads of a line, r channels, P page size, N stored tokens, U pages.
"""

import math

import numpy as np

from .append import page_bound, read_queries
from .lowlevel import LANES, array, bits_of, bytes_of, exact, fast, keep_apart, prefetch, widen
from .operands import AT, REAL, SIZE

_TINY, _ZERO, _LEAST = np.float32(1e-30), np.float32(0), np.float32(-np.inf)


@exact
def fill(numbers, first, last, value):
    """Write a value from place `first` up to `last`."""
    for i in range(first, last):
        numbers[i] = value


@exact
def capped(scores, count, softcap):
    """Apply the soft-cap to scores in place."""
    cap = np.float32(softcap)
    for i in range(count):
        scores[i] = np.float32(math.tanh(scores[i] / cap)) * cap


@fast
def choose_channels(queries, group, head_dim, channels, sizes, chosen):
    """Write the r channels of largest |q|, summed over the group, in ascending order; ties go to the lower channel."""
    for c in range(head_dim):
        size = abs(queries[c])
        for g in range(1, group):
            size += abs(queries[g * head_dim + c])
        sizes[c] = size
    low, high = np.int64(0), np.int64(0x7F800001)  # bits of the r-th largest size
    while high - low > 1:
        middle = (low + high) >> 1
        count = 0
        for c in range(head_dim):
            if np.int64(bits_of(sizes[c])) >= middle:
                count += 1
        if count >= channels:
            low = middle
        else:
            high = middle
    above = 0
    for c in range(head_dim):
        if np.int64(bits_of(sizes[c])) > low:
            above += 1
    ties, n = channels - above, 0
    for c in range(head_dim):
        bits = np.int64(bits_of(sizes[c]))
        if n < channels and (bits > low or (bits == low and ties > 0)):
            ties -= bits == low
            chosen[n] = c
            n += 1
    while n < channels:  # sizes that are NaN: so are all scores
        chosen[n] = n
        n += 1


@fast
def weigh_channels(queries, group, head_dim, channels, chosen, weights, scaling):
    """Write the queries [G, r] of the chosen channels, times scaling and temperature."""
    for g in range(group):
        every, own = _ZERO, _ZERO
        for c in range(head_dim):
            every += abs(queries[g * head_dim + c])
        for i in range(channels):
            weights[g * channels + i] = queries[g * head_dim + chosen[i]]
            own += abs(weights[g * channels + i])
        factor = np.float32(math.sqrt(every / max(own, _TINY))) * scaling
        for i in range(channels):
            weights[g * channels + i] *= factor


@fast
def add_products(scores, stride, bounds, group, weights, channels, i):
    """Add to the scores of a tile, which are 128 for each head and `stride` apart, the products of channel i."""
    for g in range(group):
        weight, line = weights[g * channels + i], array(scores + 4 * g * stride, LANES, np.float32)
        for u in range(LANES):
            line[u] += weight * bounds[u]


@fast
def add_four_products(scores, stride, bounds, group, weights, channels, i):
    """Add the products of channels i to i + 3, whose bounds [4, 128] are given by their address."""
    keep_apart()
    first, second = array(bounds, LANES, np.float32), array(bounds + 4 * LANES, LANES, np.float32)
    third, fourth = array(bounds + 8 * LANES, LANES, np.float32), array(bounds + 12 * LANES, LANES, np.float32)
    for g in range(group):
        at, line = g * channels + i, array(scores + 4 * g * stride, LANES, np.float32)
        w0, w1, w2, w3 = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
        for u in range(LANES):
            line[u] += (w0 * first[u] + w1 * second[u]) + (w2 * third[u] + w3 * fourth[u])


@exact
def read_bounds(to, bounds, open_column, own):
    """Widen a row of a tile to float32, with the open page's own bound if its column is not negative."""
    for u in range(LANES):
        to[u] = widen(bounds[u])
    if open_column >= 0:
        to[open_column] = own


@exact
def score_pages(ints, reals, line, stored, first, last, local, dtype, index_dtype):
    """Write the scores of a line's tiles of pages from `first` to `last`; minus infinity behind the last page."""
    group, head_dim, page_size = ints[SIZE.group], ints[SIZE.head_dim], ints[SIZE.page_size]
    channels, padded = ints[SIZE.channels], ints[SIZE.tiles] * LANES
    each = 4 * group * head_dim
    queries, weights = array(local, group * head_dim, np.float32), array(local + each, group * head_dim, np.float32)
    sizes = array(local + 2 * each, head_dim, np.float32)
    chosen = array(local + 2 * each + 4 * head_dim, head_dim, np.int32)
    rows_of = array(local + 2 * each + 8 * head_dim, head_dim, np.int32)
    bounds = local + 2 * each + 12 * head_dim
    read_queries(ints, line, queries, dtype)
    choose_channels(queries, group, head_dim, channels, sizes, chosen)
    for i in range(channels):
        total = queries[chosen[i]]
        for g in range(1, group):
            total += queries[g * head_dim + chosen[i]]
        rows_of[i] = chosen[i] + (head_dim if page_size > 1 and total <= _ZERO else 0)
    weigh_channels(queries, group, head_dim, channels, chosen, weights, np.float32(reals[REAL.scaling]))

    pages, buffer = -(-stored // page_size), line // ints[SIZE.queries]
    rows = head_dim if page_size == 1 else 2 * head_dim
    partial = stored % page_size
    start = buffer * ints[SIZE.capacity] + (pages - 1) * page_size
    keys = array(ints[AT.keys] + bytes_of(dtype) * start * head_dim, max(partial, 1) * head_dim, dtype)
    size, softcap = bytes_of(index_dtype), reals[REAL.softcap]
    for tile in range(first, last):
        at = (buffer * ints[SIZE.tiles] + tile) * rows * LANES
        index = ints[AT.units] + size * at
        place = ints[SIZE.scores] + 4 * (line * group * padded + tile * LANES)
        used = min(LANES, pages - tile * LANES)
        column = used - 1 if partial and tile == (pages - 1) // LANES else -1
        for g in range(group):
            fill(array(place + 4 * g * padded, LANES, np.float32), 0, LANES, _ZERO)
        i = 0
        while i < channels:
            step = 4 if i + 4 <= channels else 1
            for ahead in range(i + step, min(i + 2 * step, channels)):
                for offset in range(0, size * LANES, 64):
                    prefetch(index + size * np.int64(rows_of[ahead]) * LANES + offset)
            for j in range(step):
                row = np.int64(rows_of[i + j])
                own = _ZERO
                if column >= 0:
                    own = page_bound(keys, head_dim, partial, row % head_dim, row < head_dim)
                source = array(index + size * row * LANES, LANES, index_dtype)
                read_bounds(array(bounds + 4 * j * LANES, LANES, np.float32), source, column, own)
            if step == 4:
                add_four_products(place, padded, bounds, group, weights, channels, i)
            else:
                add_products(place, padded, array(bounds, LANES, np.float32), group, weights, channels, i)
            i += step
        for g in range(group):
            scores = array(place + 4 * g * padded, LANES, np.float32)
            if softcap:
                capped(scores, used, softcap)
            fill(scores, used, LANES, _LEAST)
