"""Attend exactly to a line's tokens in parts of 64, and combine the parts, with the residual and learned sinks.

Letters: D head dim, Dv value dim, G query heads of a line, N stored tokens, k chosen tokens.
"""

import math

import numpy as np

from .append import read_queries
from .lowlevel import array, bytes_of, exact, exp, fast, keep_apart, load, prefetch, put, store, widen
from .operands import AT, PART, REAL, REST, SIZE
from .pages import capped, fill

_ZERO = np.float32(0)


@exact
def attended(ints, stored):
    """Return how many tokens a line of `stored` tokens attends to."""
    if ints[SIZE.top_k] < 0 or stored <= ints[SIZE.budget]:
        return stored
    return min(ints[SIZE.top_k], stored)


@exact
def list_part(ints, line, stored, count, first, slots):
    """Write the slots of the part's tokens, from the `first` attended one on; returns how many."""
    number = min(PART, count - first)
    if ints[SIZE.top_k] < 0 or stored <= ints[SIZE.budget]:
        for i in range(number):
            slots[i] = first + i
    elif ints[SIZE.sinks] >= 0:
        for i in range(number):
            slots[i] = first + i if first + i < ints[SIZE.sinks] else first + i + stored - count
    else:
        chosen = array(ints[SIZE.chosen] + 4 * line * ints[SIZE.top_k], ints[SIZE.top_k], np.int32)
        for i in range(number):
            slots[i] = chosen[first + i]
    return number


@fast
def write_logits(logits, query, keys, slots, number, head_dim, scaling, dtype):
    """Write the logits of a query and a head's keys, which begin at an address, four tokens at a time."""
    keep_apart()
    size = bytes_of(dtype) * head_dim
    for i in range(0, number, 4):
        last = number - 1
        k0 = array(keys + size * slots[i], head_dim, dtype)
        k1 = array(keys + size * slots[min(i + 1, last)], head_dim, dtype)
        k2 = array(keys + size * slots[min(i + 2, last)], head_dim, dtype)
        k3 = array(keys + size * slots[min(i + 3, last)], head_dim, dtype)
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        for c in range(head_dim):
            entry = query[c]
            s0 += entry * widen(k0[c])
            s1 += entry * widen(k1[c])
            s2 += entry * widen(k2[c])
            s3 += entry * widen(k3[c])
        logits[i], logits[i + 1], logits[i + 2], logits[i + 3] = s0 * scaling, s1 * scaling, s2 * scaling, s3 * scaling


@fast
def weigh(logits, number):
    """Replace logits by e^(logit - largest); returns the largest and the sum."""
    keep_apart()
    peak = logits[0]
    for i in range(1, number):
        peak = max(peak, logits[i])
    total = _ZERO
    for i in range(number):
        logits[i] = exp(logits[i] - peak)
        total += logits[i]
    return peak, total


@fast
def add_values(to, values, slots, weights, number, value_dim, dtype):
    """Add to sums [Dv] the weighted values of a head, which begin at an address, four tokens at a time."""
    keep_apart()
    i, size = 0, bytes_of(dtype) * value_dim
    while i + 4 <= number:
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        v0, v1 = (
            array(values + size * slots[i], value_dim, dtype),
            array(values + size * slots[i + 1], value_dim, dtype),
        )
        v2, v3 = (
            array(values + size * slots[i + 2], value_dim, dtype),
            array(values + size * slots[i + 3], value_dim, dtype),
        )
        for c in range(value_dim):
            to[c] += (w0 * widen(v0[c]) + w1 * widen(v1[c])) + (w2 * widen(v2[c]) + w3 * widen(v3[c]))
        i += 4
    while i < number:
        weight, value = weights[i], array(values + size * slots[i], value_dim, dtype)
        for c in range(value_dim):
            to[c] += weight * widen(value[c])
        i += 1


@exact
def record_of(ints, line, part):
    """Return a part's record: for each head the largest logit, the sum of weights, then [G + 1, Dv] sums of values."""
    size = 2 * ints[SIZE.group] + (ints[SIZE.group] + 1) * ints[SIZE.value_dim]
    return array(ints[SIZE.records] + 4 * size * (line * ints[SIZE.parts] + part), size, np.float32)


@exact
def attend_part(ints, reals, line, stored, count, part, local, dtype):
    """Attend to one part of a line's `count` attended tokens, and write its record."""
    group, head_dim, value_dim = ints[SIZE.group], ints[SIZE.head_dim], ints[SIZE.value_dim]
    slots, end = array(local, PART, np.int64), local + 8 * PART
    logits, end = end, end + 4 * (group + 1) * PART
    read_queries(ints, line, array(end, group * head_dim, np.float32), dtype)
    number = list_part(ints, line, stored, count, part * PART, slots)
    first, size = (line // ints[SIZE.queries]) * ints[SIZE.capacity], bytes_of(dtype)
    keys, values = ints[AT.keys] + size * first * head_dim, ints[AT.values] + size * first * value_dim
    for i in range(number):  # tokens are apart: ask for all lines before the first is needed
        for offset in range(0, size * head_dim, 64):
            prefetch(keys + size * slots[i] * head_dim + offset)
        for offset in range(0, size * value_dim, 64):
            prefetch(values + size * slots[i] * value_dim + offset)
    scaling = np.float32(reals[REAL.scaling])
    record = record_of(ints, line, part)
    fill(record, 2 * group, len(record), _ZERO)
    sums = record.ctypes.data + 8 * group
    for g in range(group):
        own, query = array(logits + 4 * g * PART, PART, np.float32), array(end + 4 * g * head_dim, head_dim, np.float32)
        write_logits(own, query, keys, slots, number, head_dim, scaling, dtype)
        if reals[REAL.softcap]:
            capped(own, number, reals[REAL.softcap])
        record[2 * g], record[2 * g + 1] = weigh(own, number)
        to = array(sums + 4 * g * value_dim, value_dim, np.float32)
        add_values(to, values, slots, own, number, value_dim, dtype)
    if ints[SIZE.residual]:
        ones = array(logits + 4 * group * PART, PART, np.float32)
        fill(ones, 0, PART, np.float32(1))
        to = array(sums + 4 * group * value_dim, value_dim, np.float32)
        add_values(to, values, slots, ones, number, value_dim, dtype)


@exact
def combine(ints, line, stored, count, parts, local, dtype):
    """Write a line's outputs from the records of its parts and, with a residual, the missed mass."""
    group, value_dim = ints[SIZE.group], ints[SIZE.value_dim]
    out, mean = array(local, value_dim, np.float32), array(local + 4 * value_dim, value_dim, np.float32)
    rest = array(ints[SIZE.rest] + 8 * REST * line * group, REST * group, np.float64)
    leaves = ints[SIZE.residual] != 0 and count < stored
    if leaves:
        total = array(ints[AT.value_sum] + 8 * line * value_dim, value_dim, np.float64)
        for c in range(value_dim):
            own = 0.0
            for part in range(parts):
                own += record_of(ints, line, part)[2 * group + group * value_dim + c]
            mean[c] = (total[c] - own) / (stored - count)
    head = line % ints[SIZE.kv_heads] * group
    for g in range(group):
        peak, mass = -np.inf, 0.0
        for part in range(parts):
            peak = max(peak, record_of(ints, line, part)[2 * g])
        fill(out, 0, value_dim, _ZERO)
        for part in range(parts):
            record = record_of(ints, line, part)
            factor = math.exp(record[2 * g] - peak)
            mass += record[2 * g + 1] * factor
            place = 2 * group + g * value_dim
            for c in range(value_dim):
                out[c] += np.float32(factor) * record[place + c]
        lowered, others, estimate = 0.0, 0.0, -np.inf
        if leaves:
            estimate, others = rest[REST * g], rest[REST * g + 2]
            excess = estimate + math.log(rest[REST * g + 1]) - (peak + math.log(mass))
            if excess > 0.0 and excess < np.inf:
                lowered = 0.5 * excess
            if ints[AT.bias]:
                lowered -= load(ints[AT.bias] + 4 * (line * group + g), np.float32)
        sink = -np.inf
        if ints[AT.learned_sinks]:
            sink = load(ints[AT.learned_sinks] + 4 * (head + g), np.float32) + lowered
        top = max(peak + lowered, sink)
        if others > 0.0:
            top = max(top, estimate)
        own = math.exp(peak + lowered - top)
        left = others * math.exp(estimate - top) if leaves else 0.0
        every = mass * own + left + math.exp(sink - top)
        for c in range(value_dim):
            out[c] *= np.float32(own / every)
        if leaves:
            for c in range(value_dim):
                out[c] += np.float32(left / every) * mean[c]
        place = ints[AT.out] + bytes_of(dtype) * (line * group + g) * value_dim
        to = array(place, value_dim, dtype)
        for c in range(value_dim):
            store(to, c, out[c])
        if ints[AT.missed]:
            put(ints[AT.missed] + 4 * (line * group + g), np.float32(left / every), np.float32)
