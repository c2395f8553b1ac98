"""The compiled code of the calibration at a prompt's end: see `rocketkv.core.calibration.weigh_chosen`.

Letters: p rows and KV heads, n queries of each, G query heads of a KV head, N stored tokens, Dv value dim, k tokens.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, types

from .attend import add_values
from .lowlevel import LANES, add_and_fetch, array, exact, exp, fast, keep_apart, load, named_apart
from .pages import fill
from .select import exponentials, least_chosen, list_tokens, masses, rank

SIGNATURE = types.void(types.CPointer(types.int64))
NUMBERS = 3  # of a query and head: mass of the chosen tokens, its estimate, and that of the rest
_ZERO, _ONE, _LEAST, _INFINITE = (np.float32(x) for x in (0, 1, -np.inf, np.inf))
_NAN_RANK, _NO_UNIT = np.float32(-1), np.float32(-2)


class WeighOperands(NamedTuple):
    """The integers and addresses of `weigh_chosen`."""

    counters: int  # int64: next task, threads that came
    local: int  # of each thread: float32 [G + 2, padded N], [128], [2, k], int32 [k]
    local_bytes: int
    queries: int  # p n
    window: int  # n
    group: int
    stored: int
    value_dim: int
    top_k: int
    protected: int
    by_largest: int
    estimates: int  # float32 [p n, G, N]
    logits: int  # float32 [p n, G, N]
    values: int  # float32 [p, N, Dv]
    sinks: int  # float32 [p n, G], or 0
    numbers: int  # float32 [p n, G, NUMBERS]
    sums: int  # float32 [p n, G + 1, Dv]: outputs of the chosen tokens, and the sum of their values
    counts: int  # float32 [p n]


_W = WeighOperands(*range(len(WeighOperands._fields)))


@exact
def _copy(start, to, count):
    """Copy `count` numbers between addresses."""
    keep_apart()
    source, target = array(start, count, np.float32), array(to, count, np.float32)
    for i in range(count):
        target[i] = source[i]


@exact
def _padded_exponentials(start, to, stored, tiles, lanes):
    """Write e^(score - peak) of scores at an address, in whole tiles; returns the peak and the sum."""
    _copy(start, to, stored)
    fill(array(to, tiles * LANES, np.float32), stored, tiles * LANES, _LEAST)
    return exponentials(to, tiles, lanes)


@exact
def _choose(ints, query, local, tiles, lanes, chosen):
    """Write the chosen tokens of a query, and its heads' estimated masses of these and the rest."""
    stored, group, k = ints[_W.stored], ints[_W.group], ints[_W.top_k]
    step = 4 * tiles * LANES
    shared, taken, scores = array(local, tiles * LANES, np.float32), local + step, local + 2 * step
    numbers = array(ints[_W.numbers] + 4 * NUMBERS * query * group, NUMBERS * group, np.float32)
    for g in range(group):
        own, place = scores + g * step, ints[_W.estimates] + 4 * (query * group + g) * stored
        peak, total = _padded_exponentials(place, own, stored, tiles, lanes)
        if ints[_W.sinks]:
            total += np.float32(math.exp(load(ints[_W.sinks] + 4 * (query * group + g), np.float32) - peak))
        rank(local, own, tiles, _ONE / total, g == 0, ints[_W.by_largest] != 0)
        numbers[NUMBERS * g + 1] = peak
    for t in range(stored):
        if shared[t] != shared[t]:
            shared[t] = _NAN_RANK
    fill(shared, stored, tiles * LANES, _NO_UNIT)
    fill(shared, 0, min(ints[_W.protected], stored), _INFINITE)
    least = least_chosen(local, shared[stored - 1], tiles, 1, 0, k)
    number = array(taken, tiles * LANES, np.float32)
    list_tokens(shared, number, stored, 1, 1, least, k, chosen)
    for g in range(group):
        own, others = masses(array(scores + g * step, tiles * LANES, np.float32), number, stored, _ONE, _ONE)
        peak = numbers[NUMBERS * g + 1]
        numbers[NUMBERS * g + 1] = peak + np.float32(math.log(own))
        numbers[NUMBERS * g + 2] = peak + np.float32(math.log(others))


@fast
def _weigh(weights, peak):
    """Replace logits by e^(logit - peak); returns the sum."""
    keep_apart()
    total = _ZERO
    for i in range(len(weights)):
        weights[i] = exp(weights[i] - peak)
        total += weights[i]
    return total


@exact
def _attend(ints, query, chosen, weights, ones):
    """Attend to the chosen tokens with each head of a query."""
    stored, group, dim, k = ints[_W.stored], ints[_W.group], ints[_W.value_dim], ints[_W.top_k]
    values = ints[_W.values] + 4 * (query // ints[_W.window]) * stored * dim
    sums = ints[_W.sums] + 4 * query * (group + 1) * dim
    fill(array(sums, (group + 1) * dim, np.float32), 0, (group + 1) * dim, _ZERO)
    numbers = array(ints[_W.numbers] + 4 * NUMBERS * query * group, NUMBERS * group, np.float32)
    for g in range(group):
        logits = array(ints[_W.logits] + 4 * (query * group + g) * stored, stored, np.float32)
        peak = _LEAST
        for j in range(k):
            weights[j] = logits[chosen[j]]
            ones[j] = _ZERO if weights[j] == _LEAST else _ONE
            if weights[j] > peak or weights[j] != weights[j]:
                peak = weights[j]
        total = _weigh(weights, peak)
        numbers[NUMBERS * g] = peak + np.float32(math.log(total))
        for j in range(k):
            weights[j] /= total
        add_values(array(sums + 4 * g * dim, dim, np.float32), values, chosen, weights, k, dim, np.float32)
    add_values(array(sums + 4 * group * dim, dim, np.float32), values, chosen, ones, k, dim, np.float32)
    seen = _ZERO
    for j in range(k):
        seen += ones[j]
    array(ints[_W.counts] + 4 * query, 1, np.float32)[0] = seen


def weigh_chosen(fingerprint: str, cache: bool) -> Any:
    """Compile the entry; all of its numbers are float32."""

    def weigh(block):
        known = fingerprint  # noqa: F841  # part of the closure
        ints = carray(block, (len(_W),))
        local = ints[_W.local] + add_and_fetch(ints[_W.counters] + 8, 1) * ints[_W.local_bytes]
        tiles, k = -(-ints[_W.stored] // LANES), ints[_W.top_k]
        end = local + 4 * (ints[_W.group] + 2) * tiles * LANES
        lanes, end = array(end, LANES, np.float32), end + 4 * LANES
        weights, ones = array(end, k, np.float32), array(end + 4 * k, k, np.float32)
        chosen = array(end + 8 * k, k, np.int32)
        while True:
            query = add_and_fetch(ints[_W.counters], 1)
            if query >= ints[_W.queries]:
                break
            _choose(ints, query, local, tiles, lanes, chosen)
            _attend(ints, query, chosen, weights, ones)

    return cfunc(SIGNATURE, cache=cache, error_model="numpy")(named_apart(weigh, fingerprint[:16]))
