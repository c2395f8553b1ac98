"""Second launch of a decode step: choose the tokens, attend to them, combine the parts.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, P page size, k tokens read.
"""

import triton
import triton.language as tl

from .combine import combined, with_others, write_part
from .dependent import wait_for_predecessor
from .math import soft_capped
from .rows import capacity_of, page_size_of, top_k_of
from .selection import TILE_PAGES, cut, mass_over, ordered_bits, page_weights, threshold, tokens_in, write_rest

ALL = tl.constexpr(0)  # every stored token
RECENT = tl.constexpr(1)  # the first `ends` and the last k - `ends`
RANKED = tl.constexpr(2)  # the k of largest weight, ranked here
GIVEN = tl.constexpr(3)  # the k that an earlier launch ranked


@triton.jit
def _finish(
    out, lengths, clock, row, state_row, is_first, stored, total, mass, peak, near, own, rest, value_sum, bias, missed,
    read, everything, head, column, G: tl.constexpr, DV: tl.constexpr, GP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Write a row's output and its new length; with a residual, with the tokens not read as one more."""
    if value_sum is not None:
        total, mass = with_others(
            total, mass, peak, near, own, rest, value_sum, bias, missed, row, state_row, stored, read, everything, head,
            column,
            G, DV, GP, CUT,
        )  # fmt: skip
    written = (row * G + head[:, None]) * DV + column[None, :]
    inside = (head[:, None] < G) & (column[None, :] < DV)
    tl.store(out + written, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lengths + state_row, stored)
    if is_first:
        tl.store(clock, tl.load(clock) + 1)


# What changes from prompt to prompt, or when buffers grow, is not compiled for.
@triton.jit(
    do_not_specialize=[
        *("capacity", "tiles", "splits", "parts", "step_queries"),
        *("token_budget", "k", "ends", "protected", "row_tokens"),
    ],
)
def select_attend_kernel(
    query,  # [B, H, D], channels side by side
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    lengths,  # [B, Hkv] int32, before this step's token; raised by one
    seen,  # [1] int32, likewise
    sinks,  # [H], or None
    scores,  # [B, H, tiles, 128 pages] float32
    peaks,  # [B, Hkv, splits, GP] float32
    sums,  # [B, Hkv, splits, GP] float32
    value_sum,  # [B, Hkv, DV] float64, this step's value included; None where tokens not chosen do not count
    bias,  # [B, H] float32, added to the logit of the tokens not chosen, or None
    rest,  # [B, Hkv, 4, GP] float32, estimates of `write_rest`; written where ranked here
    missed,  # [B, H] float32, written: the weight of the tokens not chosen
    chosen,  # [B, Hkv, k] int32, written where ranked here
    records,  # [B, Hkv, parts, floats] float32, of `write_part`; written
    arrivals,  # [B, Hkv] int32, zero before and after
    out,  # [B, H, DV]
    rows,  # [B] int32, rows of a slab, in which positions are [rows]; or None: see `rows.py`
    rules,  # [rows, 4] int32, or None
    query_batch,  # strides of the queries, by row and by head
    query_head,
    capacity,
    tiles,
    splits,
    parts,
    step_queries,  # consecutive rows that share their stored tokens: 1, or the queries of a verify step
    kv_heads,
    token_budget,
    k,
    ends,
    protected,
    scaling,
    softcap,  # or None
    row_tokens,  # tokens that a row of a slab has room for in its keys, values and index; or None
    MODE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    P: tl.constexpr,  # one token where there is a residual; the largest page size of a slab's rows
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,  # whether tokens rank by the largest weight of the group's heads, not by their average
    CUT: tl.constexpr,  # whether a row has more than one part
    GP: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    SP: tl.constexpr,
    UP: tl.constexpr,
    BT: tl.constexpr,
    PP: tl.constexpr,
    PB: tl.constexpr,
    DEPENDENT: tl.constexpr,  # whether this kernel may start before the one ahead has ended
):
    """Choose, attend and combine; the last to finish a row raises its length; grid (B * Hkv, parts)."""
    wait_for_predecessor(DEPENDENT)
    RESIDUAL: tl.constexpr = value_sum is not None
    number = tl.program_id(0)
    row = number.to(tl.int64)
    row_heads = kv_heads * step_queries
    kv_head = number % row_heads
    part = tl.program_id(1)
    wanted = k
    if rows is None:
        state_row = row
        first_key = (number // step_queries).to(tl.int64) * capacity
        first_value = first_key
        clock = seen
        is_first = number == 0
    else:
        buffer_row = tl.load(rows + number // row_heads).to(tl.int64)
        if buffer_row < 0:
            return
        state_row = buffer_row * kv_heads + kv_head
        capacity = capacity_of(rules, buffer_row)
        first_key = buffer_row * row_tokens + kv_head * capacity
        first_value = first_key + kv_heads * capacity
        clock = seen + buffer_row
        is_first = kv_head == 0
        wanted = top_k_of(rules, buffer_row)
    if (rules is None) | (P == 1):
        size: tl.constexpr = P
    else:
        size = page_size_of(rules, buffer_row)
    stored = tl.minimum(tl.load(lengths + state_row) + 1, capacity)
    # A row that stores no more than the budget attends to all of it.
    everything = stored <= token_budget
    if MODE == ALL:
        everything = stored > 0
    read = tl.where(everything, stored, tl.minimum(wanted, stored))
    share = tl.cdiv(tl.cdiv(read, parts), BT) * BT
    first = part * share
    last = tl.minimum(first + share, read)
    listed = chosen
    if (MODE == RANKED) | (MODE == GIVEN):
        listed += row * k

    if MODE == RANKED:
        chooses = stored > token_budget
        if not RESIDUAL:
            chooses &= first < last
        if chooses:
            page = tl.arange(0, UP)
            pages = (stored + size - 1) // size
            count = tokens_in(page, stored, size)
            weight = page_weights(
                scores, peaks, sums, sinks, row, kv_head, splits, page, pages, tiles, G, GP, SP, LARGEST
            )
            bits = ordered_bits(weight, count, page * size < protected)
            value, above = threshold(bits, count, stored, read, size, P == 1)
            taken, before, _ = cut(bits, count, value, read - above, size)
            for i in tl.static_range(P):
                mine = (i < taken) & (before + i >= first) & (before + i < last)
                tl.store(listed + before + i, page * size + i, mask=mine)
            if RESIDUAL:
                for g in range(part, G, parts):
                    estimate = scores + (row * G + g) * tiles * TILE_PAGES + page
                    estimate = tl.load(estimate, mask=page < tiles * TILE_PAGES, other=0.0)
                    estimate = tl.where(page < pages, estimate, float("-inf"))
                    highest, summed = mass_over(tl.where(taken == 0, estimate, float("-inf")))
                    write_rest(rest, row, 0, g, highest, summed, GP)
                    highest, summed = mass_over(tl.where(taken == 0, float("-inf"), estimate))
                    write_rest(rest, row, 1, g, highest, summed, GP)
        tl.debug_barrier()  # the list is read by other threads than wrote it

    head = tl.arange(0, GP)
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    q = tl.load(
        query + number // row_heads * query_batch + (kv_head * G + head[:, None]) * query_head + channel[None, :],
        mask=(head[:, None] < G) & (channel[None, :] < D),
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
        place = start + tl.arange(0, BT)
        there = place < last
        token = place
        if MODE == RECENT:
            token = tl.where(everything | (place < ends), place, place + stored - read)
        if (MODE == RANKED) | (MODE == GIVEN):
            token = tl.where(everything, place, tl.load(listed + place, mask=place < ranked, other=0))
        slot = first_key + token
        block = tl.load(
            keys + slot[:, None] * D + channel[None, :], mask=there[:, None] & (channel[None, :] < D), other=0.0
        )
        if EXACT:
            block = block.to(tl.float32)
        logit = tl.dot(q, tl.trans(block), input_precision="ieee") * scaling
        if softcap is not None:
            logit = soft_capped(logit, softcap)
        logit = tl.where(there[None, :], logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp(peak - anchor)
        weight = tl.exp(logit - anchor[:, None])
        mass = mass * decay + tl.sum(weight, 1)
        slot = first_value + token
        vector = tl.load(
            values + slot[:, None] * DV + column[None, :],
            mask=there[:, None] & (column[None, :] < DV),
            other=0.0,
        )
        if EXACT:
            vector = vector.to(tl.float32)
        if RESIDUAL:
            own += tl.sum(vector.to(tl.float32), 0)
        total = tl.dot(weight.to(vector.dtype), vector, total * decay[:, None], input_precision="ieee")
        peak = higher

    if CUT:
        record = 2 * GP + (G + 1) * DVP
        write_part(records + (row * parts + part) * record, peak, mass, total, own, RESIDUAL, G, GP, DVP)
        tl.debug_barrier()  # all of the part is written before it is announced
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1:
            # The last to arrive combines, in the order of the parts: the result does not depend on who that is.
            tl.debug_barrier()
            few = tl.arange(0, HP)
            sink = _sink_logits(sinks, kv_head, few, G)
            highest, weight_sum, value_weights, values_read = combined(
                records + row * parts * record, sink, parts, RESIDUAL, G, GP, HP, DVP, PP, PB
            )
            read_mass = highest + tl.log(weight_sum)
            weight_sum += tl.exp(sink - highest)
            tl.store(arrivals + row, 0)
            _finish(
                out, lengths, clock, row, state_row, is_first, stored, value_weights, weight_sum, highest, read_mass,
                values_read, rest, value_sum, bias, missed, read, everything, few, column, G, DV, GP, CUT,
            )  # fmt: skip
    else:
        near = peak + tl.log(mass)
        if sinks is not None:
            sink = _sink_logits(sinks, kv_head, head, G)
            higher = tl.maximum(peak, sink)
            total = total * tl.exp(peak - higher)[:, None]
            mass = mass * tl.exp(peak - higher) + tl.exp(sink - higher)
            peak = higher
        _finish(
            out, lengths, clock, row, state_row, is_first, stored, total, mass, peak, near, own, rest, value_sum, bias,
            missed, read, everything, head, column, G, DV, GP, CUT,
        )  # fmt: skip


@triton.jit
def _sink_logits(sinks, kv_head, head, G: tl.constexpr):
    """Return the learned sinks of a KV head's queries, or minus infinity where the model has none."""
    logit = tl.full(head.shape, float("-inf"), tl.float32)
    if sinks is not None:
        logit = tl.load(sinks + kv_head * G + head, mask=head < G, other=0.0).to(tl.float32)
    return logit
