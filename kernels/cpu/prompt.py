"""The compiled code of a prompt's end: the sketch of its keys, and the distances of its values from the output.

Tokens are handled in tiles of 128, whose loops over tokens have no remainder. What is computed depends on no task's
thread or order.

Letters: D head dim, Dv value dim, n tokens, C code bytes of a token. A *line* is a row's KV head.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, types

from .lowlevel import (
    LANES,
    add_and_fetch,
    array,
    bytes_of,
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

SIGNATURE = types.void(types.CPointer(types.int64))
PARTS = 16  # of a line's values: the sums depend on it, so it does not change with the number of threads
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


class SketchOperands(NamedTuple):
    """The integers and addresses of `write_sketch`; strides are in elements."""

    counters: int  # int64: next task, threads that came
    local: int  # of each thread: float32 [D + 5, 128], then uint8 [C, 128]
    local_bytes: int
    lines: int
    kv_heads: int
    tokens: int
    capacity: int
    head_dim: int
    odd: int  # the largest odd factor of D
    bits: int
    code_bytes: int
    grid: int
    keys: int
    row_stride: int
    head_stride: int
    token_stride: int
    starts: int  # int64 [lines]
    mean: int
    balance: int  # bfloat16
    signs: int  # float32 [D]
    codes: int
    scales: int
    constants: int  # float32: `rotation_norm` over the grid, spacing


class ValueOperands(NamedTuple):
    """The integers and addresses of `sum_weighted` and `measure_values`; strides are in elements."""

    counters: int  # int64: next task
    lines: int
    kv_heads: int
    tokens: int
    value_dim: int
    values: int
    row_stride: int
    head_stride: int
    token_stride: int
    scores: int  # float32 [lines, n]
    sums: int  # float32 [lines, PARTS, Dv + 1]: weighted sums of values, and of scores
    out: int  # float32 [lines, n]


_S, _V = SketchOperands(*range(len(SketchOperands._fields))), ValueOperands(*range(len(ValueOperands._fields)))


@exact
def _lanes(local, number):
    """Return 128 numbers of the thread's memory."""
    return array(local + 4 * LANES * number, LANES, np.float32)


@exact
def _round_differences(ints, line, first, count, local, dtype):
    """Write integers w of a tile's keys [D, 128]; then the largest differences, and the squares of the integers."""
    keep_apart()
    head_dim, size = ints[_S.head_dim], bytes_of(dtype)
    row, head = line // ints[_S.kv_heads], line % ints[_S.kv_heads]
    keys = ints[_S.keys] + size * (row * ints[_S.row_stride] + head * ints[_S.head_stride])
    mean = array(ints[_S.mean] + 4 * line * head_dim, head_dim, np.float32)
    balance = array(ints[_S.balance] + 2 * line * head_dim, head_dim, np.uint16)
    largest, square = _lanes(local, head_dim), _lanes(local, head_dim + 1)
    for t in range(LANES):
        largest[t] = _ZERO
        square[t] = _ZERO
    for t in range(LANES):
        # Behind the last token, a tile repeats it.
        key = array(keys + size * (first + min(t, count - 1)) * ints[_S.token_stride], head_dim, dtype)
        for c in range(head_dim):
            put(local + 4 * (c * LANES + t), (widen(key[c]) - mean[c]) * widen(balance[c]), np.float32)
    for c in range(head_dim):
        own = _lanes(local, c)
        for t in range(LANES):
            entry = abs(own[t])
            largest[t] = entry if entry > largest[t] or entry != entry else largest[t]
    top = np.float32(ints[_S.grid])
    for c in range(head_dim):
        own = _lanes(local, c)
        for t in range(LANES):
            entry = nearest(own[t] / largest[t] * top)
            own[t] = entry if entry == entry else _ZERO  # NaN if the key is not finite, or equals the mean: 0 / 0
            square[t] += own[t] * own[t]


@exact
def _rotate(ints, local):
    """Replace a tile's integers by their rotation, as `rotation_matrix` is made: signs, reflection, butterflies."""
    keep_apart()
    head_dim, odd = ints[_S.head_dim], ints[_S.odd]
    signs, total = array(ints[_S.signs], head_dim, np.float32), _lanes(local, head_dim + 2)
    for first in range(0, head_dim, odd):
        for t in range(LANES):
            total[t] = _ZERO
        for c in range(first, first + odd):
            own = _lanes(local, c)
            for t in range(LANES):
                own[t] *= signs[c]
                total[t] += own[t]
        for c in range(first, first + odd):
            own = _lanes(local, c)
            for t in range(LANES):
                own[t] = np.float32(odd) * own[t] - _TWO * total[t]
    half = odd
    while half < head_dim:
        for first in range(0, head_dim, 2 * half):
            for c in range(first, first + half):
                upper, lower = _lanes(local, c), _lanes(local, c + half)
                for t in range(LANES):
                    a, b = upper[t], lower[t]
                    upper[t] = a + b
                    lower[t] = a - b
        half *= 2


@exact
def _write_levels(ints, local):
    """Replace a tile's rotated integers by codes, as floats; returns nothing but writes the scales' products."""
    keep_apart()
    head_dim = ints[_S.head_dim]
    half = np.float32(1 << (ints[_S.bits] - 1))
    spacing = load(ints[_S.constants] + 4, np.float32)
    square, step, product = _lanes(local, head_dim + 1), _lanes(local, head_dim + 2), _lanes(local, head_dim + 3)
    for t in range(LANES):
        step[t] = np.float32(math.sqrt(max(square[t], _ONE))) * spacing
        product[t] = _ZERO
    for c in range(head_dim):
        own = _lanes(local, c)
        for t in range(LANES):
            level = min(max(np.float32(math.floor(own[t] / step[t])), -half), half - _ONE)
            product[t] += own[t] * (level + _HALF)
            own[t] = level + half


@exact
def _pack(ints, place, width, shift, first_byte, count, local):
    """Write one bit plane of a tile's codes, which begin at the address `place`."""
    keep_apart()
    head_dim, code_bytes = ints[_S.head_dim], ints[_S.code_bytes]
    size, mask = -(-head_dim * width // 8), np.int32((1 << width) - 1)
    packed = array(local + 4 * LANES * (head_dim + 4), LANES, np.int32)
    for c in range(size):
        for t in range(LANES):
            packed[t] = np.int32(0)
        for i in range(8 // width):
            if i * size + c < head_dim:
                own, place_value = _lanes(local, i * size + c), np.int32(1 << (i * width))
                for t in range(LANES):
                    packed[t] += ((np.int32(own[t]) >> np.int32(shift)) & mask) * place_value
        for t in range(count):
            put(place + t * code_bytes + first_byte + c, np.uint8(packed[t]), np.uint8)


@exact
def _encode_tile(ints, line, first, count, local, dtype):
    """Write the sketch of a tile's `count` keys, from the line's `first` one on."""
    head_dim, bits = ints[_S.head_dim], ints[_S.bits]
    slot = line * ints[_S.capacity] + load(ints[_S.starts] + 8 * line, np.int64) + first
    _round_differences(ints, line, first, count, local, dtype)
    _rotate(ints, local)
    _write_levels(ints, local)
    largest, square, product = _lanes(local, head_dim), _lanes(local, head_dim + 1), _lanes(local, head_dim + 3)
    factor = load(ints[_S.constants], np.float32)
    for t in range(count):
        scale = square[t] * factor / max(product[t], _HALF) * largest[t]
        put(ints[_S.scales] + 2 * (slot + t), to_bfloat16(scale), np.uint16)
    place = ints[_S.codes] + slot * ints[_S.code_bytes]
    if bits == 3:
        _pack(ints, place, 2, 0, 0, count, local)
        _pack(ints, place, 1, 2, -(-head_dim // 4), count, local)
    else:
        _pack(ints, place, bits, 0, 0, count, local)


def write_sketch(fingerprint: str, dtype: Any, cache: bool) -> Any:
    """Compile the entry that encodes keys of this element type: see `encode` of the reference."""

    def encode(block):
        known = fingerprint  # noqa: F841  # part of the closure
        ints = carray(block, (len(_S),))
        local = ints[_S.local] + add_and_fetch(ints[_S.counters] + 8, 1) * ints[_S.local_bytes]
        tiles = -(-ints[_S.tokens] // LANES)
        while True:
            task = add_and_fetch(ints[_S.counters], 1)
            if task >= ints[_S.lines] * tiles:
                break
            first = task % tiles * LANES
            _encode_tile(ints, task // tiles, first, min(LANES, ints[_S.tokens] - first), local, dtype)

    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named_apart(encode, dtype, fingerprint[:16]))


@exact
def _value_place(ints, line, dtype):
    row, head = line // ints[_V.kv_heads], line % ints[_V.kv_heads]
    return ints[_V.values] + bytes_of(dtype) * (row * ints[_V.row_stride] + head * ints[_V.head_stride])


@fast
def _add_value(sums, value, score, count):
    for c in range(count):
        sums[c] += score * widen(value[c])


@fast
def _squared_distance(value, mean, count):
    total = _ZERO
    for c in range(count):
        difference = widen(value[c]) - mean[c]
        total += difference * difference
    return total


def sum_weighted(fingerprint: str, dtype: Any, cache: bool) -> Any:
    """Compile the entry that sums a line's values, weighted by their scores, in `PARTS` parts."""

    def add(block):
        known = fingerprint  # noqa: F841  # part of the closure
        ints = carray(block, (len(_V),))
        tokens, dim, size = ints[_V.tokens], ints[_V.value_dim], bytes_of(dtype)
        while True:
            task = add_and_fetch(ints[_V.counters], 1)
            if task >= ints[_V.lines] * PARTS:
                break
            line, part = task // PARTS, task % PARTS
            sums = array(ints[_V.sums] + 4 * task * (dim + 1), dim + 1, np.float32)
            scores = array(ints[_V.scores] + 4 * line * tokens, tokens, np.float32)
            place, step = _value_place(ints, line, dtype), size * ints[_V.token_stride]
            for c in range(dim + 1):
                sums[c] = _ZERO
            for t in range(tokens * part // PARTS, tokens * (part + 1) // PARTS):
                score = scores[t]
                if score != _ZERO:  # values at padding are arbitrary
                    _add_value(sums, array(place + t * step, dim, dtype), score, dim)
                    sums[dim] += score

    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named_apart(add, dtype, fingerprint[:16]))


def measure_values(fingerprint: str, dtype: Any, cache: bool) -> Any:
    """Compile the entry that multiplies scores by the distances of their values from the weighted mean."""
    tiny = np.finfo(np.float32).tiny

    def measure(block):
        known = fingerprint  # noqa: F841  # part of the closure
        ints = carray(block, (len(_V),))
        tokens, dim, size = ints[_V.tokens], ints[_V.value_dim], bytes_of(dtype)
        mean = np.empty(dim, np.float32)
        while True:
            task = add_and_fetch(ints[_V.counters], 1)
            if task >= ints[_V.lines] * PARTS:
                break
            line, part = task // PARTS, task % PARTS
            total = _ZERO
            for c in range(dim + 1):
                summed = _ZERO
                for i in range(PARTS):
                    summed += load(ints[_V.sums] + 4 * ((line * PARTS + i) * (dim + 1) + c), np.float32)
                if c < dim:
                    mean[c] = summed
                else:
                    total = max(tiny, summed)
            for c in range(dim):
                mean[c] /= total
            scores = array(ints[_V.scores] + 4 * line * tokens, tokens, np.float32)
            out = array(ints[_V.out] + 4 * line * tokens, tokens, np.float32)
            place, step = _value_place(ints, line, dtype), size * ints[_V.token_stride]
            for t in range(tokens * part // PARTS, tokens * (part + 1) // PARTS):
                score = scores[t]
                if score == _ZERO:
                    out[t] = _ZERO
                else:
                    value = array(place + t * step, dim, dtype)
                    out[t] = score * np.float32(math.sqrt(_squared_distance(value, mean, dim)))

    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named_apart(measure, dtype, fingerprint[:16]))
