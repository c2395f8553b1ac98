"""The compiled code of a decode step: two entries, each of which all threads run until no task is left.

The first appends and scores; whoever finishes a line's last task selects for it. The second attends to parts of the
tokens; whoever finishes a line's last part combines them. What is computed depends on no task's thread or order.

Each thread has operands of its own, which those of a row replace where the lines belong to rows of a slab.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, types

from .append import append_token, close_page, remember_queries
from .attend import attend_part, attended, combine
from .lowlevel import LANES, add_and_fetch, array, bytes_of, exact, load, named_apart, put, widen
from .operands import AT, INTEGERS, OWN_BYTES, PART, REALS, SIZE, SPARE_COUNTERS
from .pages import score_pages
from .rows import line_of
from .select import select
from .sketch import encode_key, score_sketch

SIGNATURE = types.void(types.CPointer(types.int64))
TASK, THREAD = 0, 1  # counters
_ROUNDER = 1.5 * 2.0**20  # of `rocketkv.core.residual`


@exact
def begin(step):
    """Return the calling thread's own copy of the step's integers, and its scratch memory."""
    own = step[SIZE.local] + add_and_fetch(step[SIZE.counters] + 8 * THREAD, 1) * step[SIZE.local_bytes]
    ints = array(own, INTEGERS, np.int64)
    for i in range(INTEGERS):
        ints[i] = step[i]
    return ints, own + OWN_BYTES


@exact
def next_task(step):
    """Take the next task."""
    return add_and_fetch(step[SIZE.counters] + 8 * TASK, 1)


@exact
def arrive(step, number, entry):
    """Count a task of a line in an entry; returns how many came before."""
    return add_and_fetch(step[SIZE.counters] + 8 * (SPARE_COUNTERS + 2 * number + entry), 1)


@exact
def scored_tiles(ints, stored):
    """Return how many tiles a line scores: none if it attends to every token, or to recent ones."""
    if ints[SIZE.top_k] < 0 or ints[SIZE.sinks] >= 0 or stored <= ints[SIZE.budget]:
        return 0
    return -(-stored // (ints[SIZE.page_size] * LANES))


@exact
def finish_line(ints, line, before, stored, dtype):
    """Raise the line's count and its sum of values; the last line of the step, or of its row, raises the clock."""
    put(ints[AT.seq_lens] + 4 * line, np.int32(stored), np.int32)
    if ints[SIZE.residual] and stored > before:
        size, value_dim = bytes_of(dtype), ints[SIZE.value_dim]
        slot = (line // ints[SIZE.queries]) * ints[SIZE.capacity] + before
        value = array(ints[AT.values] + size * slot * value_dim, value_dim, dtype)
        total = array(ints[AT.value_sum] + 8 * line * value_dim, value_dim, np.float64)
        for c in range(value_dim):
            total[c] += (np.float64(widen(value[c])) + _ROUNDER) - _ROUNDER
    if add_and_fetch(ints[SIZE.lines_done], 1) == ints[AT.lines] - 1:
        put(ints[AT.clock], np.int32(load(ints[AT.clock], np.int32) + 1), np.int32)


def append_and_score(fingerprint: str, dtype: Any, index_dtype: Any, sketched: bool, cache: bool) -> Any:
    """Compile the first entry for keys and an index of these element types.

    Numba's cache looks at this file and the closure's values alone: `fingerprint` stands for the other files.
    """

    def first(block):
        known = fingerprint  # noqa: F841  # part of the closure
        step = carray(block, (INTEGERS,))
        reals = array(step.ctypes.data + 8 * INTEGERS, REALS, np.float64)
        (ints, local), splits = begin(step), step[SIZE.splits]
        while True:
            task = next_task(step)
            if task >= step[AT.lines] * splits:
                break
            number, split = task // splits, task % splits
            line = line_of(step, ints, number, dtype)
            if line < 0:
                continue
            before = np.int64(load(ints[AT.seq_lens] + 4 * line, np.int32))
            stored = min(before + 1, ints[SIZE.capacity])
            tiles = scored_tiles(ints, stored)
            if split == splits - 1:
                if stored > before:
                    append_token(ints, line, before, dtype)
                    if sketched:
                        encode_key(ints, reals, line, before, local, dtype)
                    elif ints[AT.units]:
                        close_page(ints, line, stored, dtype, index_dtype)
                if ints[AT.ring]:
                    remember_queries(ints, line, dtype)
            start, stop = tiles * split // splits, tiles * (split + 1) // splits
            if start < stop:
                if sketched:
                    score_sketch(ints, reals, line, stored, start, stop, local, dtype)
                else:
                    score_pages(ints, reals, line, stored, start, stop, local, dtype, index_dtype)
            if arrive(step, number, 0) == splits - 1:
                if tiles:
                    select(ints, reals, line, stored, local)
                finish_line(ints, line, before, stored, dtype)

    named = named_apart(first, dtype, index_dtype, sketched, fingerprint[:16])
    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named)


def attend_and_combine(fingerprint: str, dtype: Any, cache: bool) -> Any:
    """Compile the second entry for keys and values of this element type."""

    def second(block):
        known = fingerprint  # noqa: F841  # part of the closure
        step = carray(block, (INTEGERS,))
        reals = array(step.ctypes.data + 8 * INTEGERS, REALS, np.float64)
        (ints, local), most = begin(step), step[SIZE.parts]
        while True:
            task = next_task(step)
            if task >= step[AT.lines] * most:
                break
            number, part = task // most, task % most
            line = line_of(step, ints, number, dtype)
            if line < 0:
                continue
            stored = np.int64(load(ints[AT.seq_lens] + 4 * line, np.int32))
            count = attended(ints, stored)
            parts = -(-count // PART)
            if part >= parts:
                continue
            attend_part(ints, reals, line, stored, count, part, local, dtype)
            if arrive(step, number, 1) == parts - 1:
                combine(ints, line, stored, count, parts, local, dtype)

    named = named_apart(second, dtype, fingerprint[:16])
    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named)
