"""Stage 1's last step: copy what stays into the buffers that decoding works in, and index it on the way.

Letters: B batch, Hkv KV heads, D head dim, P page size.
"""

import triton
import triton.language as tl

from .math import as_bound

TILE_PAGES = tl.constexpr(128)


@triton.jit(do_not_specialize=["chosen", "stored", "count"])
def tokens_first_kernel(
    slots,  # [B, Hkv, chosen], ascending
    valid,  # [B, valid heads, stored] uint8
    ordered,  # [B, Hkv, count] int32, written: the slots of tokens; nothing behind them
    lengths,  # [B, Hkv] int32, written
    chosen,
    stored,
    count,
    kv_heads,
    valid_heads,
    CHUNK: tl.constexpr,
):
    """List the chosen slots that hold a token, and count them; grid (B * Hkv,)."""
    row = tl.program_id(0).to(tl.int64)
    valid += (row // kv_heads * valid_heads + row % kv_heads % valid_heads) * stored
    before = tl.full([], 0, tl.int32)
    for start in range(0, chosen, CHUNK):
        number = start + tl.arange(0, CHUNK)
        slot = tl.load(slots + row * chosen + number, mask=number < chosen, other=0).to(tl.int32)
        real = tl.load(valid + slot, mask=number < chosen, other=0) != 0
        rank = before + tl.cumsum(real.to(tl.int32), 0) - 1
        tl.store(ordered + row * count + rank, slot, mask=real & (rank < count))
        before += tl.sum(real.to(tl.int32), 0)
    tl.store(lengths + row, tl.minimum(before, count))


@triton.jit(do_not_specialize=["stored", "count", "capacity", "page_size", "tiles", "position_head"])
def compact_kernel(
    keys,  # [B, Hkv, stored, D], by strides
    values,  # [B, Hkv, stored, DV], by strides
    slots,  # [B, Hkv, count], ascending; with VALID tokens only
    positions,  # [B, position heads, at least stored] int32, by a stride of its heads
    lengths,  # [B, Hkv] int32
    new_keys,  # [B, Hkv, capacity, D], written
    new_values,  # [B, Hkv, capacity, DV], written
    new_positions,  # [B, Hkv, capacity] int32, written
    index,  # [B, Hkv, tiles, D or 2 * D, 128], in the keys' dtype or 8 bits, written
    stored,
    count,
    capacity,
    page_size,
    tiles,
    kv_heads,
    position_heads,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    position_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    VALID: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,
    SINGLE: tl.constexpr,  # pages of one token
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BP: tl.constexpr,
):
    """Copy the tokens of some pages, and write the bounds of those; grid (B * Hkv, blocks of pages)."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * BP + tl.arange(0, BP)
    batch = row // kv_heads
    head = row % kv_heads
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    channel = tl.arange(0, DP)[None, :]
    column = tl.arange(0, DVP)[None, :]
    length = count
    if VALID:
        length = tl.load(lengths + row)
    top = tl.full([BP, DP], float("-inf"), tl.float32)
    bottom = tl.full([BP, DP], float("inf"), tl.float32)
    # Pages beyond the buffer, of its last tile, have no slots.
    steps = tl.where(tl.program_id(1) * BP * page_size < capacity, page_size, 0)
    for i in range(steps):
        slot = page * page_size + i
        inside = slot < capacity
        source = slot
        if SLOTS:
            source = tl.load(slots + row * count + slot, mask=slot < length, other=0).to(tl.int32)
        # Behind a row's tokens, up to the longest row's, stands its last slot, whatever it holds.
        source = tl.where(slot < length, source, stored - 1)
        position = source
        if POSITIONS:
            line = (batch * position_heads + head % position_heads) * position_head
            position = tl.load(positions + line + source, mask=slot < length, other=-1)
        place = row * capacity + slot
        tl.store(new_positions + place, tl.where(slot < length, position, -1), mask=inside)
        # Slots beyond are zero, not garbage: a masked weight of zero times NaN would be NaN.
        filled = (slot < count)[:, None]
        token = source.to(tl.int64)[:, None]
        k = tl.load(keys + token * key_token + channel, mask=filled & (channel < D), other=0.0)
        tl.store(new_keys + place[:, None] * D + channel, k, mask=inside[:, None] & (channel < D))
        v = tl.load(values + token * value_token + column, mask=filled & (column < DV), other=0.0)
        tl.store(new_values + place[:, None] * DV + column, v, mask=inside[:, None] & (column < DV))
        if INDEX:
            k = k.to(tl.float32)
            # Written so that NaN stays.
            top = tl.where((k > top) | (k != k), k, top)
            bottom = tl.where((k < bottom) | (k != k), k, bottom)
    if INDEX:
        full = ((page + 1) * page_size <= count)[:, None]
        rows: tl.constexpr = D if SINGLE else 2 * D
        tile = (row * tiles + page // TILE_PAGES) * rows * TILE_PAGES + page % TILE_PAGES
        entry = index + tile[:, None] + channel * TILE_PAGES
        tl.store(entry, as_bound(tl.where(full, top, 0.0), index.dtype.element_ty), mask=channel < D)
        if not SINGLE:
            bottom = as_bound(tl.where(full, bottom, 0.0), index.dtype.element_ty)
            tl.store(entry + D * TILE_PAGES, bottom, mask=channel < D)
