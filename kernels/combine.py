"""The end of a step's attention: combine the parts of a row, and add the tokens that were not read.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, DV head dim of values.
"""

import triton
import triton.language as tl


@triton.jit
def write_part(
    record, peak, mass, total, own, RESIDUAL: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DVP: tl.constexpr
):
    """Write a part's record: peaks and sums of GP heads each, then G sums of values, and the sum of its own values."""
    head = tl.arange(0, GP)
    column = tl.arange(0, DVP)
    tl.store(record + head, peak, mask=head < G)
    tl.store(record + GP + head, mass, mask=head < G)
    sums = record + 2 * GP
    tl.store(sums + head[:, None] * DVP + column[None, :], total, mask=head[:, None] < G)
    if RESIDUAL:
        tl.store(sums + G * DVP + column, own)


@triton.jit
def combined(
    records, sink, parts, RESIDUAL: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, HP: tl.constexpr, DVP: tl.constexpr, PP: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Return the largest logit [HP], mass, sum of values [HP, DVP] and own values [DVP] of a row, over all parts.

    Loads bypass the first cache, which may hold what was there before other programs wrote.
    """
    size: tl.constexpr = 2 * GP + (G + 1) * DVP  # floats of a record
    head = tl.arange(0, HP)
    column = tl.arange(0, DVP)
    part = tl.arange(0, PP)
    written = (part[:, None] < parts) & (head[None, :] < G)
    places = records + part[:, None] * size + head[None, :]
    peaks = tl.load(places, mask=written, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(places + GP, mask=written, other=0.0, cache_modifier=".cg")
    # Heads that pad the group: numbers that stay finite.
    highest = tl.where(head < G, tl.maximum(tl.max(peaks, 0), sink), 0.0)
    mass = tl.where(head < G, tl.sum(sums * tl.exp(peaks - highest[None, :]), 0), 1.0)
    total = tl.zeros([HP, DVP], tl.float32)
    own = tl.zeros([DVP], tl.float32)
    for start in range(0, parts, PB):
        some = start + tl.arange(0, PB)
        there = (some[:, None] < parts) & (head[None, :] < G)
        record = records + some[:, None] * size
        peak = tl.load(record + head[None, :], mask=there, other=float("-inf"), cache_modifier=".cg")
        decay = tl.exp(peak - highest[None, :])
        place = (record + 2 * GP + head[None, :] * DVP)[:, :, None] + column[None, None, :]
        piece = tl.load(place, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        total += tl.sum(piece * decay[:, :, None], 0)
        if RESIDUAL:
            place = record + 2 * GP + G * DVP + column[None, :]
            own += tl.sum(tl.load(place, mask=some[:, None] < parts, other=0.0, cache_modifier=".cg"), 0)
    return highest, mass, total, own


@triton.jit
def with_others(
    total, mass, peak, near, own, rest, value_sum, bias, missed, row, state_row, stored, read, everything, head, column,
    G: tl.constexpr, DV: tl.constexpr, GP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Return an attention's sum and mass with the tokens that are not read as one more, of their mean value.

    Their estimated mass is lowered as in `rocketkv.core.residual.overestimate`; `near` is the log of the exact mass of
    the tokens that are read. `row` counts the step's rows, `state_row` those of the buffers. Values are summed exactly,
    in float64: what is left after `own`, those that are read, is no rounding error.
    """
    # Nothing is left out of a row that is read whole.
    there = head < G * (1 - everything.to(tl.int32))
    place = rest + row * 4 * GP + head
    cached: tl.constexpr = ".cg" if CUT else ""  # from other parts, or from this program
    other_peak = tl.load(place, mask=there, other=float("-inf"), cache_modifier=cached)
    other = tl.load(place + GP, mask=there, other=0.0, cache_modifier=cached)
    estimated = tl.load(place + 2 * GP, mask=there, other=float("-inf"), cache_modifier=cached)
    estimated += tl.log(tl.load(place + 3 * GP, mask=there, other=1.0, cache_modifier=cached))
    excess = tl.maximum(estimated - near, 0.0)
    other_peak -= tl.where(excess < float("inf"), excess, 0.0) * 0.5  # an estimate may not be finite
    if bias is not None:
        other_peak += tl.load(bias + state_row * G + head, mask=there, other=0.0)
    every = tl.load(value_sum + state_row * DV + column, mask=column < DV, other=0.0)
    mean = ((every - own.to(tl.float64)) / tl.maximum(stored - read, 1).to(tl.float64)).to(tl.float32)
    mean = tl.where(everything, 0.0, mean)
    higher = tl.maximum(peak, other_peak)
    other *= tl.exp(other_peak - higher)
    decay = tl.exp(peak - higher)
    mass = mass * decay + other
    tl.store(missed + state_row * G + head, other / mass, mask=head < G)
    return total * decay[:, None] + other[:, None] * mean[None, :], mass
