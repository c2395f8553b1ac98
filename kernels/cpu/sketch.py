"""Encode a line's new key, and score the sketches of all its tokens: see `encode` and `score_sketch` of the reference.

Letters: D head dim, G query heads of a line, N stored tokens, C code bytes of a token.
"""

import math

import numpy as np

from .append import read_queries
from .lowlevel import (
    LANES,
    array,
    bytes_of,
    digit,
    exact,
    fast,
    keep_apart,
    load,
    named_apart,
    nearest,
    put,
    to_bfloat16,
    widen,
)
from .operands import AT, REAL, SIZE
from .pages import capped, fill

HEADS = 4  # heads of a group that are scored at once
_ZERO, _HALF, _ONE, _LEAST = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-np.inf)


@exact
def _plane(bits, plane):
    """Return shift and width of a bit plane of codes; 3 bits have two."""
    if bits == 3:
        return (0, 2) if plane == 0 else (2, 1)
    return 0, bits


@exact
def rotation_row(ints, c):
    """Return a row of the rotation [D]."""
    return array(ints[SIZE.rotation] + 4 * c * ints[SIZE.head_dim], ints[SIZE.head_dim], np.float32)


@exact
def encode_key(ints, reals, line, stored, local, dtype):
    """Write the sketch of the key in slot `stored`. Sums are of integers, and exact in any order."""
    head_dim, bits, size = ints[SIZE.head_dim], ints[SIZE.bits], bytes_of(dtype)
    buffer = line // ints[SIZE.queries]
    slot = buffer * ints[SIZE.capacity] + stored
    key = array(ints[AT.keys] + size * slot * head_dim, head_dim, dtype)
    mean = array(ints[AT.mean] + 4 * buffer * head_dim, head_dim, np.float32)
    balance = array(ints[AT.balance] + 2 * buffer * head_dim, head_dim, np.uint16)
    floats = array(local, head_dim, np.float32)
    levels = array(local + 4 * head_dim, head_dim, np.uint8)
    largest = _ZERO
    for c in range(head_dim):
        floats[c] = (widen(key[c]) - mean[c]) * widen(balance[c])
        entry = abs(floats[c])
        if entry > largest or entry != entry:
            largest = entry
    top, square = np.float32(ints[SIZE.grid]), _ZERO
    for c in range(head_dim):
        entry = nearest(floats[c] / largest * top)
        floats[c] = entry if entry == entry else _ZERO  # NaN if the key is not finite, or equals the mean: 0 / 0
        square += floats[c] * floats[c]
    half = np.float32(1 << (bits - 1))
    step = np.float32(math.sqrt(max(square, _ONE))) * np.float32(reals[REAL.spacing])
    product = _ZERO
    for c in range(head_dim):
        rotated = _dot(rotation_row(ints, c), floats, head_dim)
        level = min(max(np.float32(math.floor(rotated / step)), -half), half - _ONE)
        product += rotated * (level + _HALF)
        levels[c] = np.uint8(level + half)
    scale = square * np.float32(reals[REAL.norm]) / max(product, _HALF) * largest
    put(ints[AT.scales] + 2 * slot, to_bfloat16(scale), np.uint16)
    codes = array(ints[AT.units] + slot * ints[SIZE.code_bytes], ints[SIZE.code_bytes], np.uint8)
    byte = 0
    for plane in range(2 if bits == 3 else 1):
        shift, width = _plane(bits, plane)
        count = -(-head_dim * width // 8)
        for c in range(count):
            packed = np.int64(0)
            for i in range(8 // width):
                channel = i * count + c
                if channel < head_dim:
                    packed |= ((np.int64(levels[channel]) >> shift) & ((1 << width) - 1)) << (i * width)
            codes[byte] = packed
            byte += 1


@fast
def _dot(first, second, count):
    total = _ZERO
    for c in range(count):
        total += first[c] * second[c]
    return total


@fast
def weigh_digits(ints, reals, line, queries, rotated, weights, constants, dtype):
    """Write the weight of each digit of a word of codes, and of each head the constants of its scores.

    Weights are [words, fours of heads, digits, 4], with zeros for the heads that the last four lacks. Constants are
    [heads, 2]: the logit of the mean key, and what is added to the digits' products.
    """
    group, head_dim, bits = ints[SIZE.group], ints[SIZE.head_dim], ints[SIZE.bits]
    buffer, heads = line // ints[SIZE.queries], -(-group // HEADS) * HEADS
    mean = array(ints[AT.mean] + 4 * buffer * head_dim, head_dim, np.float32)
    balance = array(ints[AT.balance] + 2 * buffer * head_dim, head_dim, np.uint16)
    read_queries(ints, line, queries, dtype)
    fill(weights, 0, len(weights), _ZERO)
    scaling, norm = np.float32(reals[REAL.scaling]), np.float32(reals[REAL.rotation_norm])
    middle = np.float32(0.5) * np.float32((1 << bits) - 1)
    for g in range(group):
        query = array(queries.ctypes.data + 4 * g * head_dim, head_dim, np.float32)
        shift = _ZERO
        for c in range(head_dim):
            query[c] *= scaling
            shift += query[c] * mean[c]
            query[c] /= widen(balance[c])
        total = _ZERO
        for c in range(head_dim):
            rotated[c] = _dot(rotation_row(ints, c), query, head_dim) / norm
            total += rotated[c]
        constants[2 * g], constants[2 * g + 1] = shift, -total * middle
        start = 0
        for plane in range(2 if bits == 3 else 1):
            place, width = _plane(bits, plane)
            size, digits = -(-head_dim * width // 8), 32 // width
            factor = np.float32(1 << place)
            for c in range(head_dim):
                byte, i = c % size, c // size
                word, at = byte // 4, (byte % 4) * (8 // width) + i
                quad = (start + word * digits) * heads + g // HEADS * HEADS * digits
                weights[quad + at * HEADS + g % HEADS] = rotated[c] * factor
            start += -(-size // 4) * digits


@exact
def read_words(codes, code_bytes, count, size, words):
    """Write the first `size` of up to four code bytes at an address, of 128 tokens, as words; zeros behind `count`."""
    keep_apart()
    if size == 4:
        for t in range(count):
            words[t] = load(codes + t * code_bytes, np.uint32)
    else:
        for t in range(count):
            word = np.uint32(0)
            for q in range(size):
                word |= np.uint32(load(codes + t * code_bytes + q, np.uint8)) << np.uint32(8 * q)
            words[t] = word
    for t in range(count, LANES):
        words[t] = np.uint32(0)


@fast
def finish_scores(scores, sums, scales, shift, middle):
    """Write the scores of a tile from the sums of its digits' products."""
    keep_apart()
    to, own = array(scores, LANES, np.float32), array(sums, LANES, np.float32)
    for t in range(LANES):
        to[t] = shift + (own[t] + middle) * scales[t]


def _adder(width):
    """Return compiled code that adds the products of a word's digits of `width` bits, for 4 heads."""
    digits, mask = 32 // width, np.uint32((1 << width) - 1)
    width = np.uint32(width)

    def add(words, weights, sums):
        keep_apart()
        own = array(weights, digits * HEADS, np.float32)
        s0, s1 = array(sums, LANES, np.float32), array(sums + 4 * LANES, LANES, np.float32)
        s2, s3 = array(sums + 8 * LANES, LANES, np.float32), array(sums + 12 * LANES, LANES, np.float32)
        for t in range(LANES):
            word = words[t]
            a0, a1, a2, a3 = s0[t], s1[t], s2[t], s3[t]
            for d in range(digits):
                value = digit(word, np.uint32(d) * width, mask)
                a0 += own[d * HEADS] * value
                a1 += own[d * HEADS + 1] * value
                a2 += own[d * HEADS + 2] * value
                a3 += own[d * HEADS + 3] * value
            s0[t], s1[t], s2[t], s3[t] = a0, a1, a2, a3

    return fast(named_apart(add, width))


_add_1, _add_2, _add_4 = _adder(1), _adder(2), _adder(4)


@exact
def score_sketch(ints, reals, line, stored, first, last, local, dtype):
    """Write the scores of a line's tiles of 128 tokens from `first` to `last`; minus infinity behind the last token."""
    group, head_dim, bits = ints[SIZE.group], ints[SIZE.head_dim], ints[SIZE.bits]
    padded, code_bytes, buffer = ints[SIZE.tiles] * LANES, ints[SIZE.code_bytes], line // ints[SIZE.queries]
    heads = -(-group // HEADS) * HEADS
    most = (code_bytes + 6) * 8 * heads  # weights, at least
    queries, end = array(local, group * head_dim, np.float32), local + 4 * group * head_dim
    rotated, end = array(end, head_dim, np.float32), end + 4 * head_dim
    weights, end = array(end, most, np.float32), end + 4 * most
    constants, end = array(end, 2 * heads, np.float32), end + 8 * heads
    sums, end = array(end, heads * LANES, np.float32), end + 4 * heads * LANES
    words, factors = array(end, LANES, np.uint32), array(end + 4 * LANES, LANES, np.float32)
    weigh_digits(ints, reals, line, queries, rotated, weights, constants, dtype)
    slots = buffer * ints[SIZE.capacity]
    codes = ints[AT.units] + slots * code_bytes
    scales = array(ints[AT.scales] + 2 * slots, ints[SIZE.capacity], np.uint16)
    softcap = reals[REAL.softcap]
    for tile in range(first, last):
        start, count = tile * LANES, min(LANES, stored - tile * LANES)
        fill(sums, 0, heads * LANES, _ZERO)
        byte, at = 0, 0
        for plane in range(2 if bits == 3 else 1):
            width = _plane(bits, plane)[1]
            size = -(-head_dim * width // 8)
            for word in range(-(-size // 4)):
                first_byte = codes + start * code_bytes + byte + 4 * word
                read_words(first_byte, code_bytes, count, min(4, size - 4 * word), words)
                for h in range(0, heads, HEADS):
                    own = weights.ctypes.data + 4 * (at * heads + h * 32 // width)
                    to = sums.ctypes.data + 4 * h * LANES
                    if width == 2:
                        _add_2(words, own, to)
                    elif width == 1:
                        _add_1(words, own, to)
                    else:
                        _add_4(words, own, to)
                at += 32 // width
            byte += size
        place = ints[SIZE.scores] + 4 * (line * group * padded + start)
        for t in range(count):
            factors[t] = widen(scales[start + t])
        for g in range(group):
            scores = array(place + 4 * g * padded, LANES, np.float32)
            own = sums.ctypes.data + 4 * g * LANES
            finish_scores(place + 4 * g * padded, own, factors, constants[2 * g], constants[2 * g + 1])
            if softcap:
                capped(scores, count, softcap)
            fill(scores, count, LANES, _LEAST)
