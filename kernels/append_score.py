"""First launch of a decode step: append the token, pick the channels, score the pages.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, P page size, r channels.
"""

import triton
import triton.language as tl

from .append import write_token
from .dependent import permit_successor
from .math import as_bound, rounded, soft_capped, softmax_merged, softmax_summed, widened
from .rows import capacity_of, channels_of, page_size_of


@triton.jit
def _channel_sums(queries, channel, G: tl.constexpr, D: tl.constexpr):
    """Return, over the group's queries, sums of |q| and of q: head after head, so in one order whatever the layout."""
    magnitude = tl.zeros(channel.shape, tl.float32)
    total = tl.zeros(channel.shape, tl.float32)
    for g in range(G):
        q = tl.load(queries + g * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        magnitude += tl.abs(q)
        total += q
    # NaN would rank nowhere and leave a hole in the list of channels.
    return tl.where(magnitude == magnitude, magnitude, -1.0), total


@triton.jit
def _ranks(
    queries, channel, magnitude,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return each channel's rank by magnitude, ties to the lower channel: how many channels come before it."""
    magnitude = tl.where(channel < D, magnitude, -2.0)[None, :]
    rank = tl.zeros([DP], tl.int32)
    for start in range(0, DP, CHUNK):
        other = start + tl.arange(0, CHUNK)
        rival, _ = _channel_sums(queries, other, G, D)
        rival = tl.where(other < D, rival, -2.0)[:, None]
        before = (rival > magnitude) | ((rival == magnitude) & (other[:, None] < channel[None, :]))
        rank += tl.sum(before.to(tl.int32), 0)
    return rank


@triton.jit
def _operand(block, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Return lines of the index, or queries, in the dtype that products are made in."""
    return widened(block).to(tl.float32 if EXACT else dtype)


@triton.jit
def _new_page(
    new, keys, index, first_key, length, capacity, size, lines, channel,
    D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the bounds of the page that a row's new key [DP] falls into, and write them if the key fills it.

    `index` begins with the row's tiles, of so many `lines`; pages have `size` tokens, at most P. A full row has no room
    for the key: the bounds are those of its last page without it, or zeros after whole pages.
    """
    closed = length // size
    room = length < capacity
    top = tl.where(room, new.to(tl.float32), float("-inf"))
    bottom = tl.where(room, new.to(tl.float32), float("inf"))
    for i in tl.static_range(P - 1):
        earlier = closed * size + i
        there = earlier < length
        old = tl.load(keys + (first_key + earlier) * D + channel, mask=channel < D * there.to(tl.int32), other=0.0)
        old = old.to(tl.float32)
        # Written so that NaN stays: a maximum that drops it would hide it.
        top = tl.where(there & ((old > top) | (old != old)), old, top)
        bottom = tl.where(there & ((old < bottom) | (old != old)), old, bottom)
    occupied = room | (closed * size < length)
    top, bottom = tl.where(occupied, top, 0.0), tl.where(occupied, bottom, 0.0)
    # A page that the token fills is scored as it will be read from now on; an open one is exact.
    full = room & ((length + 1) % size == 0)
    top = tl.where(full, rounded(top, index.dtype.element_ty), top)
    bottom = tl.where(full, rounded(bottom, index.dtype.element_ty), bottom)
    place = closed // TILE * lines * TILE + closed % TILE
    entries = index + place + channel.to(tl.int64) * TILE
    writes = channel < D * full.to(tl.int32)
    tl.store(entries, as_bound(top, index.dtype.element_ty), mask=writes)
    if P > 1:
        # There are minima where a tile has more lines than maxima.
        writes = channel + D < lines * full.to(tl.int32)
        tl.store(entries + D * TILE, as_bound(bottom, index.dtype.element_ty), mask=writes)
    return top, bottom


@triton.jit(
    do_not_specialize=[
        "capacity",
        "tiles",
        "step_queries",
        "token_budget",
        "channels",
        "row_tokens",
        "row_slots",
        "row_lines",
    ]
)
def append_score_kernel(
    query,  # [B, H, D], heads one after another
    key,  # [B, Hkv, D], likewise
    value,  # [B, Hkv, DV], likewise
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    positions,  # [B, Hkv, capacity] int32
    index,  # [B, Hkv, tiles, D or 2 * D, 128], in the keys' dtype or 8 bits; None where nothing is scored
    lengths,  # [B, Hkv] int32, before this token
    seen,  # [1] int32, position of the token
    scores,  # [B, H, tiles * TILE] float32, written
    peaks,  # [B, Hkv, programs, GP] float32, written
    sums,  # [B, Hkv, programs, GP] float32, written
    ranked,  # [B, Hkv, programs, RP] int32, written
    ring,  # [B, H, RING, D], written: the query of token i at place i mod RING; or None
    rows,  # [B] int32, rows of a slab, in which positions are [rows]; or None: see `rows.py`
    rules,  # [rows, 4] int32, or None
    query_batch,  # strides of the first three, by row
    key_batch,
    value_batch,
    capacity,
    tiles,
    step_queries,  # consecutive rows that share their stored tokens: 1, or the queries of a verify step
    token_budget,
    channels,
    scaling,
    softcap,  # or None
    row_tokens,  # from one row of a slab to the next: tokens that its keys, values and index have room for,
    row_slots,  # slots of positions,
    row_lines,  # and lines of the index; or None
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    P: tl.constexpr,  # the largest page size of a slab's rows
    RING: tl.constexpr,
    TILE: tl.constexpr,  # pages of a tile of the index
    EXACT: tl.constexpr,  # dot products of float32, which low precision on the interpreter needs too
    GP: tl.constexpr,  # powers of two, at least 16: of G,
    DP: tl.constexpr,  # of D,
    DVP: tl.constexpr,  # of DV
    RP: tl.constexpr,  # and of the channels
    RC: tl.constexpr,  # channels that are multiplied at once
    DC: tl.constexpr,  # channels whose ranks are compared at once
    DEPENDENT: tl.constexpr,  # whether the next kernel may start before this one has ended
):
    """Append a token to each row and score its pages; grid (B * Hkv, programs).

    The last program of a row appends, and scores the page that the token falls into. The others score full pages.
    """
    permit_successor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1) - 1
    row_heads = KV_HEADS * step_queries  # not a constant, which would be compiled for each length of a draft
    batch, kv_head = tl.program_id(0) // row_heads, tl.program_id(0) % row_heads
    queries = query + batch.to(tl.int64) * query_batch + kv_head * G * D
    if rows is None:
        state_row = row
        stored_row = (tl.program_id(0) // step_queries).to(tl.int64)
        first_slot = stored_row * capacity
        first_key = first_slot
        first_value = first_slot
        clock = seen
    else:
        buffer_row = tl.load(rows + batch).to(tl.int64)
        if buffer_row < 0:
            return
        state_row = buffer_row * KV_HEADS + kv_head
        capacity = capacity_of(rules, buffer_row)
        channels = channels_of(rules, buffer_row)
        first_key = buffer_row * row_tokens + kv_head * capacity
        first_value = first_key + KV_HEADS * capacity
        first_slot = buffer_row * row_slots + kv_head * capacity
        clock = seen + buffer_row
    if (rules is None) | (P == 1):
        size: tl.constexpr = P
        lines: tl.constexpr = D if P == 1 else 2 * D
    else:
        size = page_size_of(rules, buffer_row)
        lines = tl.where(size == 1, D, 2 * D)
    if index is not None:
        if rows is None:
            bounds_of = index + stored_row * tiles * lines * TILE
        else:
            own_tiles = tl.cdiv(tl.cdiv(capacity, size), TILE)
            first_line = (buffer_row + 1) * row_lines - (KV_HEADS - kv_head) * own_tiles * lines
            bounds_of = index + first_line * TILE
    length = tl.load(lengths + state_row)
    closed = length // size
    channel = tl.arange(0, DP)
    own = channel < D
    top = tl.zeros([DP], tl.float32)
    bottom = tl.zeros([DP], tl.float32)
    HP: tl.constexpr = 8 if G <= 8 else GP  # heads of which scores are kept
    if split == splits:
        position = tl.load(clock) + tl.program_id(0) % step_queries
        new, _ = write_token(
            queries, key + batch.to(tl.int64) * key_batch + kv_head * D,
            value + batch.to(tl.int64) * value_batch + kv_head * DV, keys, values, positions, position, ring,
            state_row, first_key, first_value, first_slot, length, length < capacity, G, D, DV, DP, DVP, RING,
        )  # fmt: skip
        if index is not None:
            top, bottom = _new_page(new, keys, bounds_of, first_key, length, capacity, size, lines, channel, D, P, TILE)

    if index is not None:  # noqa: SIM102  # decided when compiling, the other at run time
        # A row that stores no more than the budget attends to all of it: nothing is to be ranked.
        if length >= token_budget:
            magnitude, total = _channel_sums(queries, channel, G, D)
            rank = _ranks(queries, channel, magnitude, G, D, DP, DC)
            # The index holds maxima, then minima: where the group's sum is not positive the minimum bounds a product.
            lower = total <= 0.0
            entry = tl.where(own, channel, 0)
            if P > 1:
                entry += tl.where(lower & (channel < lines - D), D, 0)

            head = tl.arange(0, HP)
            real = head[:, None] < G
            q = tl.load(queries + head[:, None] * D + channel[None, :], mask=real & own[None, :], other=0.0)
            q = q.to(tl.float32)
            chosen = rank[None, :] < channels
            kept = tl.sum(tl.where(chosen, tl.abs(q), 0.0), 1)
            # A head may be zero in the channels that its group chose.
            factor = tl.sqrt(tl.sum(tl.abs(q), 1) / tl.maximum(kept, 1e-30)) * scaling

            scored = scores + (row * G + head[:, None]) * tiles * TILE
            program = row * (splits + 1) + split
            if split == splits:
                # Zero times what was not chosen must not spoil the sum.
                logit = tl.sum(tl.where(chosen, q * tl.where(lower, bottom, top)[None, :], 0.0), 1) * factor
                if softcap is not None:
                    logit = soft_capped(logit, softcap)
                count = (
                    tl.minimum(length + 1, capacity) - closed * size
                )  # tokens of the page, none in a full row of pages
                tl.store(scored + closed, logit[:, None], mask=head[:, None] < G * (count > 0).to(tl.int32))
                mass = tl.where(logit == logit, 1.0, logit) * count.to(tl.float32)
                tl.store(peaks + program * GP + head, tl.where(count > 0, logit, float("-inf")))
                tl.store(sums + program * GP + head, tl.where(count > 0, mass, 0.0))
            else:
                listed = ranked + program * RP
                tl.store(listed + rank, entry, mask=rank < RP)
                tl.debug_barrier()  # the list is read by other threads than wrote it
                page = tl.arange(0, TILE)
                order = tl.arange(0, RC)
                padded = tl.arange(0, GP)[:, None]
                heads = queries + padded * D
                peak = tl.full([HP, 16], float("-inf"), tl.float32)
                mass = tl.zeros([HP, 16], tl.float32)
                if RP == RC:
                    line = tl.load(listed + order)
                    # The list goes on to a whole block: zero times a channel that was not chosen may be NaN.
                    there = order < channels
                    part = tl.load(heads + (line % D)[None, :], mask=(padded < G) & there[None, :], other=0.0)
                    part = _operand(part, query.dtype.element_ty, EXACT)
                for tile in range(split, (closed + TILE - 1) // TILE, splits):
                    # Whole lines, whatever lies behind the last page: a mask on columns would cost the wide loads.
                    bounds = bounds_of + tile * lines * TILE + page[None, :]
                    estimate = tl.zeros([GP, TILE], tl.float32)
                    if RP == RC:
                        # Addresses that are known before the loop: the loads of later tiles are under way.
                        block = tl.load(bounds + line[:, None] * TILE, mask=there[:, None], other=0.0)
                        block = _operand(block, query.dtype.element_ty, EXACT)
                        estimate = tl.dot(part, block, estimate, input_precision="ieee")
                    else:
                        for first in range(0, channels, RC):
                            some = tl.load(listed + first + order)
                            those = first + order < channels
                            block = tl.load(bounds + some[:, None] * TILE, mask=those[:, None], other=0.0)
                            piece = tl.load(heads + (some % D)[None, :], mask=(padded < G) & those[None, :], other=0.0)
                            block = _operand(block, query.dtype.element_ty, EXACT)
                            piece = _operand(piece, query.dtype.element_ty, EXACT)
                            estimate = tl.dot(piece, block, estimate, input_precision="ieee")
                    if HP < GP:  # products have more heads than a group
                        estimate = tl.sum(tl.reshape(estimate, [2, HP, TILE]), 0)
                    estimate *= factor[:, None]
                    if softcap is not None:
                        estimate = soft_capped(estimate, softcap)
                    number = tile * TILE + page
                    tl.store(scored + number[None, :], estimate, mask=real & (number[None, :] < closed))
                    estimate = tl.where(number[None, :] < closed, estimate, float("-inf"))
                    peak, mass = softmax_summed(peak, mass, estimate)
                peak, mass = softmax_merged(peak, mass)
                mass *= size
                tl.store(peaks + program * GP + head, peak)
                tl.store(sums + program * GP + head, mass)
