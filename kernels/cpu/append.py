"""Write a line's new token: key, value, position, queries for the ring, and the page that it fills.

Letters: D head dim, Dv value dim, G query heads of a line, P page size.
"""

import numpy as np

from .lowlevel import LANES, array, bytes_of, exact, load, put, store, widen
from .operands import AT, SIZE


@exact
def queries_of(ints, line, dtype):
    """Return the line's queries [G D]."""
    size = ints[SIZE.group] * ints[SIZE.head_dim]
    kv_heads = ints[SIZE.kv_heads]
    first = (line // kv_heads) * ints[AT.query_stride] + (line % kv_heads) * size
    return array(ints[AT.query] + bytes_of(dtype) * first, size, dtype)


@exact
def read_queries(ints, line, to, dtype):
    """Write the line's queries as float32."""
    queries = queries_of(ints, line, dtype)
    for i in range(len(queries)):
        to[i] = widen(queries[i])


@exact
def copy(to, start):
    """Copy elements."""
    for i in range(len(to)):
        to[i] = start[i]


@exact
def append_token(ints, line, stored, dtype):
    """Write the token behind the line's `stored` tokens, for which there is room, but raise no count."""
    queries, head_dim, value_dim = ints[SIZE.queries], ints[SIZE.head_dim], ints[SIZE.value_dim]
    kv_heads, size = ints[SIZE.kv_heads], bytes_of(dtype)
    row, head = line // kv_heads, line % kv_heads
    slot = line // queries * ints[SIZE.capacity] + stored
    new = array(ints[AT.key] + size * (row * ints[AT.key_stride] + head * head_dim), head_dim, dtype)
    copy(array(ints[AT.keys] + size * slot * head_dim, head_dim, dtype), new)
    new = array(ints[AT.value] + size * (row * ints[AT.value_stride] + head * value_dim), value_dim, dtype)
    copy(array(ints[AT.values] + size * slot * value_dim, value_dim, dtype), new)
    put(ints[AT.positions] + 4 * slot, position(ints, line), np.int32)


@exact
def position(ints, line):
    """Return the new token's position in the sequence."""
    return np.int32(load(ints[AT.clock], np.int32) + line % ints[SIZE.queries])


@exact
def remember_queries(ints, line, dtype):
    """Write the line's queries into the ring."""
    group, head_dim, ring = ints[SIZE.group], ints[SIZE.head_dim], ints[AT.ring_size]
    queries, size = queries_of(ints, line, dtype), bytes_of(dtype)
    place = np.int64(position(ints, line)) % ring
    for g in range(group):
        to = array(ints[AT.ring] + size * ((line * group + g) * ring + place) * head_dim, head_dim, dtype)
        for i in range(head_dim):
            to[i] = queries[g * head_dim + i]


@exact
def page_bound(keys, head_dim, count, row, larger):
    """Return the largest or smallest of channel `row` in `count` keys; NaN stays."""
    bound = widen(keys[row])
    for token in range(1, count):
        other = widen(keys[token * head_dim + row])
        takes = other > bound if larger else other < bound
        if takes or other != other:
            bound = other
    return bound


@exact
def close_page(ints, line, stored, dtype, index_dtype):
    """Write the bounds of the page that the last of `stored` tokens has filled, if it has."""
    page_size, head_dim = ints[SIZE.page_size], ints[SIZE.head_dim]
    if stored % page_size:
        return
    page, buffer = stored // page_size - 1, line // ints[SIZE.queries]
    rows = head_dim if page_size == 1 else 2 * head_dim
    first = buffer * ints[SIZE.capacity] + page * page_size
    keys = array(ints[AT.keys] + bytes_of(dtype) * first * head_dim, page_size * head_dim, dtype)
    tile = (buffer * ints[SIZE.tiles] + page // LANES) * rows * LANES
    bounds = array(ints[AT.units] + bytes_of(index_dtype) * tile, rows * LANES, index_dtype)
    column = page % LANES
    for row in range(rows):
        store(bounds, row * LANES + column, page_bound(keys, head_dim, page_size, row % head_dim, row < head_dim))
