"""The choice of tokens by several programs a row, for more pages than one program's registers hold.

Each program chooses, of its chunk of pages, as many tokens as the row reads: whatever the row chooses in the chunk is
among them. It leaves their pages as candidates, in order. Of every few programs the last to finish chooses among the
candidates of all, by the same rule, and so on up a tree, whose root writes the list. So the result does not depend on
how pages are dealt out, nor on who is last; and nobody waits.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, N stored tokens, P page size, k tokens read.
"""

import triton
import triton.language as tl

from .dependent import permit_successor, wait_for_predecessor
from .rows import capacity_of, page_size_of, top_k_of
from .selection import (
    NO_TOKENS,
    TILE_PAGES,
    cut,
    joined,
    mass_over,
    ordered_bits,
    page_weights,
    threshold,
    tokens_in,
    write_rest,
)


@triton.jit
def _write_candidates(bits_of, pages_of, at, bits, page, taken, order, SLOTS: tl.constexpr):
    """Write the pages of which tokens were taken, in order, and that there are no more."""
    tl.store(bits_of + at + order, bits, mask=taken > 0)
    tl.store(pages_of + at + order, page, mask=taken > 0)
    found = tl.sum((taken > 0).to(tl.int32), 0)
    slot = tl.arange(0, SLOTS)
    tl.store(bits_of + at + slot, NO_TOKENS, mask=slot >= found)


@triton.jit(
    do_not_specialize=[
        "capacity",
        "tiles",
        "splits",
        "chunks",
        "nodes_above",
        "kv_heads",
        "token_budget",
        "k",
        "protected",
    ]
)
def select_parts_kernel(
    lengths,  # [B, Hkv] int32, before this step's token
    sinks,  # [H], or None
    scores,  # [B, H, tiles, 128 pages] float32
    peaks,  # [B, Hkv, splits, GP] float32
    sums,  # [B, Hkv, splits, GP] float32
    candidates,  # [B, Hkv, 2, chunks, SLOTS] int32, written: ordered bits and pages
    logits,  # [B, H, chunks, SLOTS] float32, written: of the candidates; None without a residual
    others,  # [B, Hkv, chunks, 2, GP] float32, written: estimated masses of the pages that are no candidates; or None
    finished,  # [B, Hkv, nodes above chunks] int32, zero before and after
    chosen,  # [B, Hkv, k] int32, written
    rest,  # [B, Hkv, 4, GP] float32, written: estimates of `write_rest`
    rows,  # [B] int32, rows of a slab; or None: see `rows.py`
    rules,  # [rows, 4] int32, or None
    capacity,
    tiles,
    splits,
    chunks,
    nodes_above,
    kv_heads,
    token_budget,
    k,
    protected,
    G: tl.constexpr,
    P: tl.constexpr,  # one token where there is a residual; the largest page size of a slab's rows
    LARGEST: tl.constexpr,  # whether tokens rank by the largest weight of the group's heads, not by their average
    GP: tl.constexpr,
    SP: tl.constexpr,
    UP: tl.constexpr,  # pages of a chunk
    SLOTS: tl.constexpr,  # candidates of a node, at least as many as it can have; a power of two
    FAN: tl.constexpr,  # children of a node; a power of two
    DEPENDENT: tl.constexpr,  # whether this kernel may start before the one ahead has ended
):
    """Write the positions of each row's k tokens of largest weight; grid (B * Hkv, chunks)."""
    wait_for_predecessor(DEPENDENT)
    permit_successor(DEPENDENT)
    RESIDUAL: tl.constexpr = logits is not None
    number = tl.program_id(0)
    row = number.to(tl.int64)
    chunk = tl.program_id(1)
    state_row = row
    wanted = k
    if rows is not None:
        buffer_row = tl.load(rows + number // kv_heads).to(tl.int64)
        if buffer_row < 0:
            return
        state_row = buffer_row * kv_heads + number % kv_heads
        capacity = capacity_of(rules, buffer_row)
        wanted = top_k_of(rules, buffer_row)
    if (rules is None) | (P == 1):
        size: tl.constexpr = P
    else:
        size = page_size_of(rules, buffer_row)
    stored = tl.minimum(tl.load(lengths + state_row) + 1, capacity)
    pages = (stored + size - 1) // size
    if (stored > token_budget) & (chunk * UP < pages):  # otherwise all of the row is read, or the chunk has no pages
        read = tl.minimum(wanted, stored)
        entries = chunks * SLOTS
        bits_of = candidates + row * 2 * entries
        pages_of = bits_of + entries
        page = chunk * UP + tl.arange(0, UP)
        count = tokens_in(page, stored, size)
        weight = page_weights(
            scores, peaks, sums, sinks, row, number % kv_heads, splits, page, pages, tiles, G, GP, SP, LARGEST
        )
        bits = ordered_bits(weight, count, page * size < protected)
        held = tl.minimum(stored - chunk * UP * size, UP * size)
        most = tl.minimum(read, held)
        value, above = threshold(bits, count, held, most, size, P == 1)
        taken, _, order = cut(bits, count, value, most - above, size)
        _write_candidates(bits_of, pages_of, chunk * SLOTS, bits, page, taken, order, SLOTS)
        if RESIDUAL:
            for g in range(G):
                logit = scores + (row * G + g) * tiles * TILE_PAGES + page
                logit = tl.load(logit, mask=page < tiles * TILE_PAGES, other=0.0)
                logit = tl.where(page < pages, logit, float("-inf"))
                tl.store(logits + (row * G + g) * entries + chunk * SLOTS + order, logit, mask=taken > 0)
                peak, mass = mass_over(tl.where(taken > 0, float("-inf"), logit))
                left = others + (row * chunks + chunk) * 2 * GP + g
                tl.store(left, peak)
                tl.store(left + GP, mass)

        node = chunk
        nodes = (pages + UP - 1) // UP
        apart = tl.full([], 1, tl.int32)  # chunks from one node's first to the next one's
        announced = finished + row * nodes_above
        while nodes > 0:
            above_node = node // FAN
            nodes_next = (nodes + FAN - 1) // FAN
            children = tl.minimum(nodes - above_node * FAN, FAN)
            tl.debug_barrier()  # all candidates are written before they are announced
            is_last = tl.atomic_add(announced + above_node, 1, sem="acq_rel") == children - 1
            if is_last:
                tl.debug_barrier()
                tl.store(announced + above_node, 0)
                first = above_node * FAN * apart
                _choose(
                    bits_of, pages_of, logits, others, chosen, rest, row, first, apart, children, nodes_next, stored,
                    read, k, chunks, size, G, P, GP, SLOTS, FAN,
                )  # fmt: skip
            announced += nodes_next
            node = above_node
            nodes = tl.where(is_last & (nodes_next > 1), nodes_next, 0)
            apart *= FAN


@triton.jit
def _choose(
    bits_of, pages_of, logits, others, chosen, rest, row, first, apart, children, nodes, stored, read, k, chunks,
    size, G: tl.constexpr, P: tl.constexpr, GP: tl.constexpr, SLOTS: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Choose among the candidates of some nodes, the first of which begins with chunk `first`.

    Write the row's list where `nodes`, those of this level, are one; else the candidates that stay, in the place of the
    first node's.
    """
    entry = tl.arange(0, FAN * SLOTS)
    child = entry // SLOTS
    place = (first + child * apart) * SLOTS + entry % SLOTS
    bits = tl.load(bits_of + place, mask=child < children, other=NO_TOKENS, cache_modifier=".cg")
    is_page = bits > NO_TOKENS  # behind a node's candidates no page was written
    page = tl.load(pages_of + place, mask=is_page, other=0, cache_modifier=".cg")
    count = tl.where(is_page, tokens_in(page, stored, size), 0)
    held = tl.sum(count, 0)
    wanted = tl.minimum(read, held)
    value, above = threshold(bits, count, held, wanted, size, P == 1)
    taken, before, order = cut(bits, count, value, wanted - above, size)
    if nodes == 1:
        listed = chosen + row * k + before
        for i in tl.static_range(P):
            tl.store(listed + i, page * size + i, mask=i < taken)
    else:
        tl.debug_barrier()  # what is written over has been read
        _write_candidates(bits_of, pages_of, first * SLOTS, bits, page, taken, order, SLOTS)
    if logits is not None:
        part = tl.arange(0, FAN)
        for g in range(G):
            estimates = logits + (row * G + g) * chunks * SLOTS
            logit = tl.load(estimates + place, mask=is_page, other=float("-inf"), cache_modifier=".cg")
            left = others + (row * chunks + first + part * apart) * 2 * GP + g
            peaks = tl.load(left, mask=part < children, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(left + GP, mask=part < children, other=0.0, cache_modifier=".cg")
            peak = tl.max(peaks, 0)
            anchor = tl.where(peak == float("-inf"), 0.0, peak)
            mass = tl.sum(masses * tl.exp(peaks - anchor), 0)
            lost_peak, lost_mass = mass_over(tl.where(taken == 0, logit, float("-inf")))
            peak, mass = joined(peak, mass, lost_peak, lost_mass)
            if nodes == 1:
                write_rest(rest, row, 0, g, peak, mass, GP)
                peak, mass = mass_over(tl.where(taken > 0, logit, float("-inf")))
                write_rest(rest, row, 1, g, peak, mass, GP)
            else:
                tl.debug_barrier()
                tl.store(estimates + first * SLOTS + order, logit, mask=taken > 0)
                own = others + (row * chunks + first) * 2 * GP + g
                tl.store(own, peak)
                tl.store(own + GP, mass)
