"""Second launch of a decode step: choose the tokens, attend to them, combine the parts.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, P page size, k tokens read.
"""

import triton
import triton.language as tl

from .math import soft_capped

ALL = tl.constexpr(0)  # every stored token
RECENT = tl.constexpr(1)  # the first `ENDS` and the last k - `ENDS`
RANKED = tl.constexpr(2)  # the k of largest weight, ranked here
GIVEN = tl.constexpr(3)  # the k that an earlier launch ranked

HIGHEST = tl.constexpr(2147483647)
INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def page_weights(
    scores, peaks, sums, sinks, row, page, pages, page_capacity, kv_heads,
    G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, SINKS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Return the weight of one token of each page, a softmax over stored tokens: the heads' average, or the largest."""
    weight = tl.zeros(page.shape, tl.float32)
    part = tl.arange(0, SP)
    for g in range(G):
        partial = (row * SPLITS + part) * GP + g
        peak = tl.load(peaks + partial, mask=part < SPLITS, other=float("-inf"))
        mass = tl.load(sums + partial, mask=part < SPLITS, other=0.0)
        highest = tl.max(peak, 0)
        total = tl.sum(mass * tl.exp(peak - highest), 0)
        if SINKS:
            total += tl.exp(tl.load(sinks + (row % kv_heads) * G + g).to(tl.float32) - highest)
        logit = tl.load(scores + (row * G + g) * page_capacity + page, mask=page < pages, other=float("-inf"))
        own = tl.exp(logit - highest) / total
        if LARGEST:
            weight = tl.where((own > weight) | (own != own), own, weight)  # NaN stays
        else:
            weight += own
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
    return tl.where(count > 0, bits, -2)


@triton.jit
def threshold(bits, count, stored, k, P: tl.constexpr):
    """Return the value at which the k-th token falls in descending order, and how many tokens lie above it."""
    low = tl.full([], -1, tl.int32)
    high = tl.max(bits, 0) + 1
    reached = stored
    # Bisection over the bits; what is left within a page's tokens of k is one or two values.
    while (high - low > 1) & (reached >= k + P):
        middle = low + (high - low) // 2
        found = tl.sum(tl.where(bits >= middle, count, 0), 0)
        enough = found >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, found, reached)
    value = tl.min(tl.where(bits >= low, bits, HIGHEST), 0)
    above = tl.sum(tl.where(bits > value, count, 0), 0)
    while above >= k:
        value = tl.min(tl.where(bits > value, bits, HIGHEST), 0)
        above = tl.sum(tl.where(bits > value, count, 0), 0)
    return value, above


@triton.jit
def write_rest(rest, row, part: tl.constexpr, g, peak, mass, GP: tl.constexpr):
    """Write a head's estimated mass of the tokens that were not chosen (part 0) or were (1): largest logit, and sum."""
    tl.store(rest + (row * 4 + 2 * part) * GP + g, peak)
    tl.store(rest + (row * 4 + 2 * part + 1) * GP + g, mass)


@triton.jit
def mass_over(estimates):
    """Return the largest of some logits, and the sum of exponentials over it."""
    highest = tl.max(estimates, 0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum(tl.exp(estimates - anchor), 0)


@triton.jit
def _with_others(
    total, mass, peak, near, own, rest, value_sum, bias, missed, row, stored, read, everything, head, column,
    G: tl.constexpr, DV: tl.constexpr, GP: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return an attention's sum and mass with the tokens that are not read as one more, of their mean value.

    Their estimated mass is lowered as in `rocketkv.core.residual.overestimate`; `near` is the log of the exact mass of
    the tokens that are read. Values are summed exactly, in float64: what is left after `own`, those that are read, is
    no rounding error.
    """
    # Nothing is left out of a row that is read whole.
    there = head < G * (1 - everything.to(tl.int32))
    place = rest + row * 4 * GP + head
    cached: tl.constexpr = ".cg" if PARTS > 1 else ""  # from this program, or from other parts
    other_peak = tl.load(place, mask=there, other=float("-inf"), cache_modifier=cached)
    other = tl.load(place + GP, mask=there, other=0.0, cache_modifier=cached)
    estimated = tl.load(place + 2 * GP, mask=there, other=float("-inf"), cache_modifier=cached)
    estimated += tl.log(tl.load(place + 3 * GP, mask=there, other=1.0, cache_modifier=cached))
    excess = tl.maximum(estimated - near, 0.0)
    other_peak -= tl.where(excess < float("inf"), excess, 0.0) * 0.5  # an estimate may not be finite
    if BIAS:
        other_peak += tl.load(bias + row * G + head, mask=there, other=0.0)
    every = tl.load(value_sum + row * DV + column, mask=column < DV, other=0.0)
    mean = ((every - own.to(tl.float64)) / tl.maximum(stored - read, 1).to(tl.float64)).to(tl.float32)
    mean = tl.where(everything, 0.0, mean)
    higher = tl.maximum(peak, other_peak)
    other *= tl.exp(other_peak - higher)
    decay = tl.exp(peak - higher)
    mass = mass * decay + other
    tl.store(missed + row * G + head, other / mass, mask=head < G)
    return total * decay[:, None] + other[:, None] * mean[None, :], mass


@triton.jit
def select_attend_kernel(
    query,  # [B, H, D], channels side by side
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    lengths,  # [B, Hkv] int32, before this step's token; raised by one
    seen,  # [1] int32, likewise
    sinks,  # [H]
    scores,  # [B, H, page capacity] float32
    peaks,  # [B, Hkv, SPLITS, GP] float32
    sums,  # [B, Hkv, SPLITS, GP] float32
    value_sum,  # [B, Hkv, DV] float64, this step's value included
    bias,  # [B, H] float32, added to the logit of the tokens not chosen
    rest,  # [B, Hkv, 4, GP] float32, estimates of `write_rest`; written where ranked here
    missed,  # [B, H] float32, written: the weight of the tokens not chosen
    chosen,  # [B, Hkv, k] int32, written where ranked here
    partial_out,  # [B, Hkv, PARTS, GP, DVP] float32, written
    partial_peaks,  # [B, Hkv, PARTS, GP] float32, written
    partial_sums,  # [B, Hkv, PARTS, GP] float32, written
    partial_values,  # [B, Hkv, PARTS, DVP] float32, written
    arrivals,  # [B, Hkv] int32, zero before and after
    out,  # [B, H, DV]
    query_batch,  # strides of the queries, by row and by head
    query_head,
    capacity,
    page_capacity,
    kv_heads,
    token_budget,
    k,
    ends,
    protected,
    scaling,
    softcap,
    MODE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDUAL: tl.constexpr,  # whether the tokens not chosen count as one; pages are single tokens then
    BIAS: tl.constexpr,  # whether the logit of the tokens not chosen has a bias
    LARGEST: tl.constexpr,  # whether tokens rank by the largest weight of the group's heads, not by their average
    GP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    SP: tl.constexpr,
    UP: tl.constexpr,
    BT: tl.constexpr,
):
    """Choose, attend and combine; the last to finish a row raises its length; grid (B * Hkv, PARTS)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    stored = tl.minimum(tl.load(lengths + row) + 1, capacity)
    # A row that stores no more than the budget attends to all of it.
    everything = stored <= token_budget
    if MODE == ALL:
        everything = stored > 0
    read = tl.where(everything, stored, tl.minimum(k, stored))
    share = tl.cdiv(tl.cdiv(read, PARTS), BT) * BT
    first = part * share
    last = tl.minimum(first + share, read)
    listed = chosen + row * k

    if MODE == RANKED:
        chooses = stored > token_budget
        if not RESIDUAL:
            chooses &= first < last
        if chooses:
            page = tl.arange(0, UP)
            pages = (stored + P - 1) // P
            count = tl.minimum(tl.maximum(stored - page * P, 0), P)
            weight = page_weights(
                scores, peaks, sums, sinks, row, page, pages, page_capacity, kv_heads, G, GP, SPLITS, SP, SINKS, LARGEST
            )
            bits = ordered_bits(weight, count, page * P < protected)
            value, above = threshold(bits, count, stored, read, P)
            # Above the threshold every token of a page; at it the lowest positions, until there are k.
            tied = tl.where(bits == value, count, 0)
            before = tl.cumsum(tied, 0) - tied
            taken = tl.where(bits > value, count, tl.minimum(tl.maximum(read - above - before, 0), tied))
            number = tl.cumsum(taken, 0) - taken
            for i in tl.static_range(P):
                mine = (i < taken) & (number + i >= first) & (number + i < last)
                tl.store(listed + number + i, page * P + i, mask=mine)
            if RESIDUAL:
                for g in range(part, G, PARTS):
                    estimate = scores + (row * G + g) * page_capacity + page
                    estimate = tl.load(estimate, mask=page < pages, other=float("-inf"))
                    highest, summed = mass_over(tl.where(taken == 0, estimate, float("-inf")))
                    write_rest(rest, row, 0, g, highest, summed, GP)
                    highest, summed = mass_over(tl.where(taken == 0, float("-inf"), estimate))
                    write_rest(rest, row, 1, g, highest, summed, GP)
        tl.debug_barrier()  # the list is read by other threads than wrote it

    head = tl.arange(0, GP)
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    real = head[:, None] < G
    q = tl.load(
        query + row // kv_heads * query_batch + (row % kv_heads * G + head[:, None]) * query_head + channel[None, :],
        mask=real & (channel[None, :] < D),
        other=0.0,
    )
    if EXACT:
        q = q.to(tl.float32)
    ranked = tl.where(everything, 0, last)  # a row within the budget has no list
    peak = tl.full([GP], float("-inf"), tl.float32)
    mass = tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, DVP], tl.float32)
    own = tl.zeros([DVP], tl.float32)
    for start in range(first, last, BT):
        number = start + tl.arange(0, BT)
        there = number < last
        token = number
        if MODE == RECENT:
            token = tl.where(everything | (number < ends), number, number + stored - read)
        if (MODE == RANKED) | (MODE == GIVEN):
            token = tl.where(everything, number, tl.load(listed + number, mask=number < ranked, other=0))
        slot = row * capacity + token
        block = tl.load(
            keys + slot[:, None] * D + channel[None, :], mask=there[:, None] & (channel[None, :] < D), other=0.0
        )
        if EXACT:
            block = block.to(tl.float32)
        logit = tl.dot(q, tl.trans(block), input_precision="ieee") * scaling
        if SOFTCAP:
            logit = soft_capped(logit, softcap)
        logit = tl.where(there[None, :], logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp(peak - anchor)
        weight = tl.exp(logit - anchor[:, None])
        mass = mass * decay + tl.sum(weight, 1)
        vector = tl.load(
            values + slot[:, None] * DV + column[None, :], mask=there[:, None] & (column[None, :] < DV), other=0.0
        )
        if EXACT:
            vector = vector.to(tl.float32)
        if RESIDUAL:
            own += tl.sum(vector.to(tl.float32), 0)
        total = tl.dot(weight.to(vector.dtype), vector, total * decay[:, None], input_precision="ieee")
        peak = higher

    sink = tl.full([GP], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + (row % kv_heads) * G + head, mask=head < G, other=0.0).to(tl.float32)
    written = (row * G + head[:, None]) * DV + column[None, :]
    inside = real & (column[None, :] < DV)
    if PARTS == 1:
        near = peak + tl.log(mass)
        if SINKS:
            higher = tl.maximum(peak, sink)
            total = total * tl.exp(peak - higher)[:, None]
            mass = mass * tl.exp(peak - higher) + tl.exp(sink - higher)
            peak = higher
        if RESIDUAL:
            total, mass = _with_others(
                total, mass, peak, near, own, rest, value_sum, bias, missed, row, stored, read, everything, head,
                column, G, DV, GP, PARTS, BIAS,
            )  # fmt: skip
        tl.store(out + written, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside)
        tl.store(lengths + row, stored)
        if row == 0:
            tl.store(seen, tl.load(seen) + 1)
    else:
        place = (row * PARTS + part) * GP + head
        tl.store(partial_peaks + place, peak)
        tl.store(partial_sums + place, mass)
        tl.store(partial_out + place[:, None] * DVP + column[None, :], total)
        if RESIDUAL:
            tl.store(partial_values + (row * PARTS + part) * DVP + column, own)
        tl.debug_barrier()  # all of the part is written before it is announced
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1:
            # The last to arrive combines, in the order of the parts: the result does not depend on who that is.
            tl.debug_barrier()
            highest = sink
            for i in range(PARTS):
                highest = tl.maximum(
                    highest, tl.load(partial_peaks + (row * PARTS + i) * GP + head, cache_modifier=".cg")
                )
            mass = tl.zeros([GP], tl.float32)
            total = tl.zeros([GP, DVP], tl.float32)
            for i in range(PARTS):
                place = (row * PARTS + i) * GP + head
                decay = tl.exp(tl.load(partial_peaks + place, cache_modifier=".cg") - highest)
                mass += tl.load(partial_sums + place, cache_modifier=".cg") * decay
                piece = tl.load(partial_out + place[:, None] * DVP + column[None, :], cache_modifier=".cg")
                total += piece * decay[:, None]
            near = highest + tl.log(mass)
            mass += tl.exp(sink - highest)
            if RESIDUAL:
                own = tl.zeros([DVP], tl.float32)
                for i in range(PARTS):
                    own += tl.load(partial_values + (row * PARTS + i) * DVP + column, cache_modifier=".cg")
                total, mass = _with_others(
                    total, mass, highest, near, own, rest, value_sum, bias, missed, row, stored, read, everything, head,
                    column, G, DV, GP, PARTS, BIAS,
                )  # fmt: skip
            tl.store(out + written, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside)
            tl.store(arrivals + row, 0)
            tl.store(lengths + row, stored)
            if row == 0:
                tl.store(seen, tl.load(seen) + 1)
