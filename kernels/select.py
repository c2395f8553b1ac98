"""The choice of tokens in a launch of its own, for more pages than one program's registers hold.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, N stored tokens, P page size, k tokens read.
"""

import triton
import triton.language as tl

from .dependent import permit_successor, wait_for_predecessor
from .rows import capacity_of, page_size_of, top_k_of
from .selection import HIGHEST, TILE_PAGES, joined, mass_over, ordered_bits, page_weights, tokens_in, write_rest

BEYOND = tl.constexpr(0x7F800001)  # the bits of infinity, and one


@triton.jit
def _found(ordered, pages, stored, value, P, CHUNK: tl.constexpr):
    """Return how many tokens have at least this value."""
    found = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        bits = tl.load(ordered + page, mask=page < pages, other=-2)
        count = tokens_in(page, stored, P)
        found += tl.where(bits >= value, count, 0)
    return tl.sum(found, 0)


@triton.jit
def _smallest(ordered, pages, value, CHUNK: tl.constexpr):
    """Return the smallest value that is not below the given one."""
    smallest = tl.full([CHUNK], HIGHEST, tl.int32)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        bits = tl.load(ordered + page, mask=page < pages, other=-2)
        smallest = tl.where((bits >= value) & (bits < smallest), bits, smallest)
    return tl.min(smallest, 0)


@triton.jit(do_not_specialize=["capacity", "tiles", "splits", "kv_heads", "token_budget", "k", "protected"])
def select_kernel(
    lengths,  # [B, Hkv] int32, before this step's token
    sinks,  # [H], or None
    scores,  # [B, H, tiles, 128 pages] float32
    peaks,  # [B, Hkv, splits, GP] float32
    sums,  # [B, Hkv, splits, GP] float32
    ordered,  # [B, Hkv, tiles, 128 pages] int32, written
    chosen,  # [B, Hkv, k] int32, written
    rest,  # [B, Hkv, 4, GP] float32, written: estimates of `write_rest`
    rows,  # [B] int32, rows of a slab; or None: see `rows.py`
    rules,  # [rows, 4] int32, or None
    capacity,
    tiles,
    splits,
    kv_heads,
    token_budget,
    k,
    protected,
    G: tl.constexpr,
    P: tl.constexpr,  # the largest page size of a slab's rows
    RESIDUAL: tl.constexpr,  # pages are single tokens then
    LARGEST: tl.constexpr,  # whether tokens rank by the largest weight of the group's heads, not by their average
    GP: tl.constexpr,
    SP: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,  # whether this kernel may start before the one ahead has ended
):
    """Write the positions of each row's k tokens of largest weight; grid (B * Hkv,)."""
    wait_for_predecessor(DEPENDENT)
    permit_successor(DEPENDENT)
    number = tl.program_id(0)
    row = number.to(tl.int64)
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
    ordered += row * tiles * TILE_PAGES
    listed = chosen + row * k
    read = tl.minimum(wanted, stored)
    if stored > token_budget:
        pages = (stored + size - 1) // size
        for start in range(0, pages, CHUNK):
            page = start + tl.arange(0, CHUNK)
            weight = page_weights(
                scores, peaks, sums, sinks, row, number % kv_heads, splits, page, pages, tiles, G, GP, SP, LARGEST
            )
            tl.store(ordered + page, ordered_bits(weight, pages - page, page * size < protected), mask=page < pages)
        tl.debug_barrier()  # what follows reads what other threads wrote
        low = tl.full([], -1, tl.int32)
        high = tl.full([], BEYOND, tl.int32)
        reached = stored
        while (high - low > 1) & (reached >= read + size):
            middle = low + (high - low) // 2
            found = _found(ordered, pages, stored, middle, size, CHUNK)
            low = tl.where(found >= read, middle, low)
            high = tl.where(found >= read, high, middle)
            reached = tl.where(found >= read, found, reached)
        value = _smallest(ordered, pages, low, CHUNK)
        above = _found(ordered, pages, stored, value + 1, size, CHUNK)
        while above >= read:
            value = _smallest(ordered, pages, value + 1, CHUNK)
            above = _found(ordered, pages, stored, value + 1, size, CHUNK)
        tied_before = tl.full([], 0, tl.int32)
        taken_before = tl.full([], 0, tl.int32)
        for start in range(0, pages, CHUNK):
            page = start + tl.arange(0, CHUNK)
            bits = tl.load(ordered + page, mask=page < pages, other=-2)
            count = tokens_in(page, stored, size)
            tied = tl.where(bits == value, count, 0)
            before = tied_before + tl.cumsum(tied, 0) - tied
            taken = tl.where(bits > value, count, tl.minimum(tl.maximum(read - above - before, 0), tied))
            place = taken_before + tl.cumsum(taken, 0) - taken
            for i in tl.static_range(P):
                tl.store(listed + place + i, page * size + i, mask=i < taken)
            if RESIDUAL:
                tl.store(ordered + page, HIGHEST, mask=taken > 0)
            tied_before += tl.sum(tied, 0)
            taken_before += tl.sum(taken, 0)
        if RESIDUAL:
            tl.debug_barrier()
            for g in range(G):
                peak, mass = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
                own_peak, own_mass = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
                for start in range(0, pages, CHUNK):
                    page = start + tl.arange(0, CHUNK)
                    left = tl.load(ordered + page, mask=page < pages, other=HIGHEST) != HIGHEST
                    logit = scores + (row * G + g) * tiles * TILE_PAGES + page
                    logit = tl.load(logit, mask=page < pages, other=float("-inf"))
                    highest, summed = mass_over(tl.where(left, logit, float("-inf")))
                    peak, mass = joined(peak, mass, highest, summed)
                    highest, summed = mass_over(tl.where(left, float("-inf"), logit))
                    own_peak, own_mass = joined(own_peak, own_mass, highest, summed)
                write_rest(rest, row, 0, g, peak, mass, GP)
                write_rest(rest, row, 1, g, own_peak, own_mass, GP)
