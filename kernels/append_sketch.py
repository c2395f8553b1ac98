"""First launch of a decode step on a sketch: append the token and its sketch, score all tokens by their packed codes.

`rocketkv.core.sketch` defines the sketch. Its bits are the same here: they come of whole numbers that float32 holds,
in whatever order they are summed, and of divisions and square roots that are rounded to the nearest. So is the sum of
values, in float64: one program owns a row, so no atomics are needed, and a float32 sum, even of two halves, would drift
from one that is made anew.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, C code bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .append import write_token
from .decode_shape import SketchRule
from .dependent import permit_successor
from .digits import byte_of, digit_weights, digits_of, words_of, write_code
from .math import as_bfloat16, soft_capped, softmax_merged, softmax_summed
from .rows import capacity_of


def code_words(head_dim: int, width: int) -> int:
    """Return the words of four bytes that a token's digits of this width are padded to, at least 16 digits in all."""
    return max(int(triton.next_power_of_2(-(-head_dim * width // 32))), width // 2, 1)


def arranged(rotation: Tensor, rule: SketchRule) -> Tensor:
    """Return the rotation [D, D] so that a vector times it has its channels in the order of `digits_of`.

    Args:
        rotation: R times the length of its rows.
        rule: by which keys are sketched.

    Returns:
        [D padded to a power of two, digits of `code_words` words, plane after plane], zeros where no channel is.
    """
    head_dim = rotation.shape[0]
    rows = max(16, triton.next_power_of_2(head_dim))
    planes = []
    for width in rule.widths:
        size, digits, words = -(-head_dim * width // 8), 8 // width, code_words(head_dim, width)
        columns = functional.pad(rotation.t(), (0, size * digits - head_dim, 0, rows - head_dim))
        padded = functional.pad(columns.reshape(rows, digits, size), (0, 4 * words - size))
        # Bytes of a word: the lower ones of its halves, then the upper ones.
        planes.append(padded.reshape(rows, digits, words, 2, 2).permute(0, 4, 1, 2, 3).flatten(1))
    return torch.cat(planes, 1)


@triton.jit
def _whole(difference, largest, top):
    """Return a difference in whole numbers of at most `top`; zeros where its largest is zero or NaN."""
    usable = largest > 0
    x = tl.div_rn(tl.where(usable, difference, 0.0), tl.where(usable, largest, 1.0))
    nearest: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding and taking it away rounds to whole numbers, ties to even
    return x * top + nearest - nearest


@triton.jit
def _levels(turned, step, D: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, HALF: tl.constexpr):
    """Return the codes of rotated channels that are in the order of digits, zero where no channel is, and levels."""
    column = tl.arange(0, turned.shape[0])
    size: tl.constexpr = (D * WIDTH + 7) // 8
    byte = byte_of(column // (2 * WORDS * (8 // WIDTH)), column, WORDS)
    digit = column // (2 * WORDS) % (8 // WIDTH)
    real = (byte < size) & (digit * size + byte < D)
    level = tl.floor(tl.div_rn(turned, step))
    level = tl.minimum(tl.maximum(level, -HALF), HALF - 1.0)
    return tl.where(real, level + HALF, 0.0).to(tl.int32), level


@triton.jit
def _turned(vectors, rotation, total, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Return total + vectors [heads, rows] float32 times the rotation, whose entries `dtype` represents exactly."""
    if EXACT:
        return tl.dot(vectors, rotation.to(tl.float32), total, input_precision="ieee")
    high = vectors.to(dtype)
    low = (vectors - high.to(tl.float32)).to(dtype)
    total = tl.dot(low, rotation.to(dtype), total, input_precision="ieee")
    return tl.dot(high, rotation.to(dtype), total, input_precision="ieee")


@triton.jit
def _first_half(x):
    """Return the first half of a vector."""
    half: tl.constexpr = x.shape[0] // 2
    kept = tl.where(tl.arange(0, x.shape[0]) < half, x, 0.0)
    return tl.sum(tl.reshape(kept, [2, half]), 0)


@triton.jit
def _sketched(
    new, own_key, mean, balance, codes, scales, turn, row, slot, inside, top, rescale, step,
    D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, HIGHER: tl.constexpr, WORDS: tl.constexpr,
    WORDS_HIGHER: tl.constexpr, LINES: tl.constexpr, RC: tl.constexpr,
):  # fmt: skip
    """Write a new key's codes and scale; return its levels, in the order of digits, and its scale as stored."""
    columns: tl.constexpr = WORDS * (32 // WIDTH)
    columns_higher: tl.constexpr = WORDS_HIGHER * 32
    column = tl.arange(0, columns)
    column_higher = columns + tl.arange(0, columns_higher)
    channel = tl.arange(0, DP)
    centre = tl.load(mean + row * D + channel, mask=channel < D, other=0.0)
    factors = tl.load(balance + row * D + channel, mask=channel < D, other=1.0).to(tl.float32)
    difference = (new.to(tl.float32) - centre) * factors
    largest = tl.max(tl.abs(difference), 0)
    # A maximum may drop NaN; one channel that is not finite spoils all of the key.
    finite = tl.sum((tl.abs(difference) < float("inf")).to(tl.int32), 0) == DP
    largest = tl.where(finite, largest, float("nan"))
    whole = _whole(difference, largest, top)
    square = tl.sum(whole * whole, 0)
    products = tl.zeros([RC, columns], tl.float32)
    products_higher = tl.zeros([RC, columns_higher], tl.float32)
    for first in range(0, DP, RC):
        line = first + tl.arange(0, RC)
        piece = tl.load(own_key + line, mask=line < D, other=0.0).to(new.dtype).to(tl.float32)
        piece -= tl.load(mean + row * D + line, mask=line < D, other=0.0)
        piece *= tl.load(balance + row * D + line, mask=line < D, other=1.0).to(tl.float32)
        piece = _whole(piece, largest, top)[:, None]
        block = tl.load(turn + line[:, None] * LINES + column[None, :])
        products += piece * block.to(tl.float32)
        if HIGHER:
            block = tl.load(turn + line[:, None] * LINES + column_higher[None, :])
            products_higher += piece * block.to(tl.float32)
    turned = tl.sum(products, 0)
    # In steps from the middle; the largest difference is `top`, so only zeros have squares under 1.
    distance = tl.sqrt_rn(tl.maximum(square, 1.0)) * step
    half: tl.constexpr = 4.0 if HIGHER else (1 << WIDTH) / 2.0
    size: tl.constexpr = (D * WIDTH + 7) // 8
    written = codes + slot * (size + (D + 7) // 8 if HIGHER else size)
    code, level = _levels(turned, distance, D, WIDTH, WORDS, half)
    write_code(written, code, inside, D, WIDTH, 0, WORDS)
    if HIGHER:
        code, _ = _levels(tl.sum(products_higher, 0), distance, D, 1, WORDS_HIGHER, half)
        write_code(written + size, code, inside, D, 1, WIDTH, WORDS_HIGHER)
    product = tl.maximum(tl.sum(turned * (level + 0.5), 0), 0.5)
    scale = as_bfloat16(largest * tl.div_rn(square * rescale, product))
    tl.store(scales + slot, scale, mask=inside)
    return level, scale.to(tl.float32)


@triton.jit(do_not_specialize=["capacity", "tiles", "step_queries", "token_budget", "row_tokens", "row_slots"])
def append_sketch_kernel(
    query,  # [B, H, D], heads one after another
    key,  # [B, Hkv, D], likewise
    value,  # [B, Hkv, DV], likewise
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    positions,  # [B, Hkv, capacity] int32
    codes,  # [B, Hkv, capacity, C] uint8
    scales,  # [B, Hkv, capacity] bfloat16
    mean,  # [B, Hkv, D] float32
    balance,  # [B, Hkv, D] bfloat16
    value_sum,  # [B, Hkv, DV] float64, or None without a residual
    turn,  # [DP, columns], `arranged`
    lengths,  # [B, Hkv] int32, before this token
    seen,  # [1] int32, position of the token
    scores,  # [B, H, tiles * TILE] float32, written
    peaks,  # [B, Hkv, programs, GP] float32, written
    sums,  # [B, Hkv, programs, GP] float32, written
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
    scaling,
    softcap,  # or None
    top,
    rescale,
    step,
    row_tokens,  # from one row of a slab to the next: tokens that its keys and values have room for,
    row_slots,  # and slots of the others; or None
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,  # bits of a packed digit
    HIGHER: tl.constexpr,  # whether a code has another digit, of one bit, in bytes of its own
    RING: tl.constexpr,
    TILE: tl.constexpr,  # scores have room for whole tiles of so many tokens
    EXACT: tl.constexpr,  # rotate in float32, which low precision on the interpreter needs too
    SUBNORMAL: tl.constexpr,  # whether matrix products take subnormal numbers as they are
    GP: tl.constexpr,  # powers of two, at least 16: of G,
    DP: tl.constexpr,  # of D,
    DVP: tl.constexpr,  # of DV
    WORDS: tl.constexpr,  # of the first digits
    WORDS_HIGHER: tl.constexpr,  # of the other ones
    HEADS: tl.constexpr,  # of a group that are scored at a time
    RC: tl.constexpr,  # lines of the rotation that are multiplied at once
    BN: tl.constexpr,  # tokens that are scored at once
    DEPENDENT: tl.constexpr,  # whether the next kernel may start before this one has ended
):
    """Append a token to each row and score its tokens; grid (B * Hkv, programs).

    The last program of a row appends, and scores that token. The others score those that are stored.
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
        stored_row = state_row
        capacity = capacity_of(rules, buffer_row)
        first_key = buffer_row * row_tokens + kv_head * capacity
        first_value = first_key + KV_HEADS * capacity
        first_slot = buffer_row * row_slots + kv_head * capacity
        clock = seen + buffer_row
    length = tl.load(lengths + state_row)
    inside = length < capacity
    program = row * (splits + 1) + split
    scored = scores + row * G * tiles * TILE
    size: tl.constexpr = (D * WIDTH + 7) // 8
    bytes_of: tl.constexpr = size + (D + 7) // 8 if HIGHER else size
    columns: tl.constexpr = WORDS * (32 // WIDTH)
    columns_higher: tl.constexpr = WORDS_HIGHER * 32
    lines: tl.constexpr = columns + columns_higher if HIGHER else columns
    column = tl.arange(0, columns)
    factor = scaling / (rescale * top)  # of rotated queries for the logits
    if split == splits:
        slot = first_slot + length
        position = tl.load(clock) + tl.program_id(0) % step_queries
        own_key = key + batch.to(tl.int64) * key_batch + kv_head * D
        new, vector = write_token(
            queries, own_key, value + batch.to(tl.int64) * value_batch + kv_head * DV,
            keys, values, positions, position, ring, state_row, first_key, first_value, first_slot, length, inside,
            G, D, DV, DP, DVP, RING,
        )  # fmt: skip
        if value_sum is not None:
            place = tl.arange(0, DVP)
            writes = place < DV * inside.to(tl.int32)
            total = tl.load(value_sum + state_row * DV + place, mask=writes, other=0.0)
            summable: tl.constexpr = 1572864.0  # 1.5 * 2^20: in float64 it rounds to multiples of 2^-32
            summand = vector.to(tl.float32).to(tl.float64) + summable - summable
            tl.store(value_sum + state_row * DV + place, total + summand, mask=writes)
        level, scale = _sketched(
            new, own_key, mean, balance, codes, scales, turn, stored_row, slot, inside, top, rescale, step,
            D, DP, WIDTH, HIGHER, WORDS, WORDS_HIGHER, lines, RC,
        )  # fmt: skip
        # A row that stores no more than the budget attends to all of it: nothing is to be ranked.
        if length >= token_budget:
            head = tl.arange(0, GP)
            logits = tl.zeros([GP, RC], tl.float32)
            for first in range(0, DP, RC):
                line = first + tl.arange(0, RC)
                block = tl.load(turn + line[:, None] * lines + column[None, :]).to(tl.float32)
                back = tl.sum(block * (level + 0.5)[None, :], 1)  # exact: whole numbers and halves
                divisors = tl.load(balance + stored_row * D + line, mask=line < D, other=1.0).to(tl.float32)
                centre = tl.load(mean + stored_row * D + line, mask=line < D, other=0.0)
                asked = (head[:, None] < G) & (line[None, :] < D)
                part = tl.load(queries + head[:, None] * D + line[None, :], mask=asked, other=0.0).to(tl.float32)
                estimated = centre * scaling + back * (1.0 / divisors) * (scale * factor)
                logits += part * estimated[None, :]
            logit = tl.sum(logits, 1)
            if softcap is not None:
                logit = soft_capped(logit, softcap)
            tl.store(scored + head * tiles * TILE + length, logit, mask=head < G * inside.to(tl.int32))
            # No token in a full row.
            tl.store(peaks + program * GP + head, tl.where(inside, logit, float("-inf")))
            tl.store(sums + program * GP + head, tl.where(inside, tl.where(logit == logit, 1.0, logit), 0.0))
    else:
        stored = tl.minimum(length, capacity)
        last_head = tl.where(length >= token_budget, G, 0)
        for first_head in range(0, last_head, HEADS):
            # Each head twice: `digit_weights`.
            twice = first_head + tl.arange(0, 2 * HEADS) % HEADS
            doubled = queries + twice[:, None] * D
            weight = tl.zeros([2 * HEADS, columns], tl.float32)
            weight_higher = tl.zeros([2 * HEADS, columns_higher], tl.float32)
            shift = tl.zeros([2 * HEADS, RC], tl.float32)
            for first in range(0, DP, RC):
                line = first + tl.arange(0, RC)
                part = tl.load(doubled + line[None, :], mask=(twice[:, None] < G) & (line[None, :] < D), other=0.0)
                centre = tl.load(mean + stored_row * D + line, mask=line < D, other=0.0)
                shift += part.to(tl.float32) * centre[None, :]
                divisors = tl.load(balance + stored_row * D + line, mask=line < D, other=1.0).to(tl.float32)
                balanced = part.to(tl.float32) * (1.0 / divisors)[None, :]
                block = tl.load(turn + line[:, None] * lines + column[None, :])
                weight = _turned(balanced, block, weight, part.dtype, EXACT)
                if HIGHER:
                    block = tl.load(turn + line[:, None] * lines + columns + tl.arange(0, columns_higher)[None, :])
                    weight_higher = _turned(balanced, block, weight_higher, part.dtype, EXACT)
            # Codes count from zero, levels from the middle.
            middle: tl.constexpr = 3.5 if HIGHER else ((1 << WIDTH) - 1) / 2.0
            lowered = tl.sum(weight, 1) * (middle * factor)
            digit_weight, unit = digit_weights(weight, WIDTH, WORDS, SUBNORMAL)
            unit *= factor
            digit_weight_higher, unit_higher = digit_weights(weight_higher, 1, WORDS_HIGHER, SUBNORMAL)
            unit_higher *= factor * (1 << WIDTH)
            shift = _first_half(tl.sum(shift, 1) * scaling)
            lowered = _first_half(lowered)

            head = first_head + tl.arange(0, HEADS)
            peak = tl.full([HEADS, 16], float("-inf"), tl.float32)
            mass = tl.zeros([HEADS, 16], tl.float32)
            for tile in range(split, (stored + BN - 1) // BN, splits):
                token = tile * BN + tl.arange(0, BN)
                there = token < stored
                slots = first_slot + token
                digits = digits_of(words_of(codes, slots, there, size, 0, bytes_of, WORDS), WIDTH, SUBNORMAL)
                estimate = tl.dot(digit_weight, digits) * unit[:, None]
                if HIGHER:
                    digits = words_of(codes, slots, there, bytes_of - size, size, bytes_of, WORDS_HIGHER)
                    digits = digits_of(digits, 1, SUBNORMAL)
                    estimate += tl.dot(digit_weight_higher, digits) * unit_higher[:, None]
                estimate = tl.sum(tl.reshape(estimate, [2, HEADS, BN]), 0) - lowered[:, None]
                scale = tl.load(scales + slots, mask=there, other=0.0).to(tl.float32)
                estimate = shift[:, None] + scale[None, :] * estimate
                if softcap is not None:
                    estimate = soft_capped(estimate, softcap)
                places = scored + head[:, None] * tiles * TILE + token[None, :]
                tl.store(places, estimate, mask=(head[:, None] < G) & there[None, :])
                peak, mass = softmax_summed(peak, mass, tl.where(there[None, :], estimate, float("-inf")))
            peak, mass = softmax_merged(peak, mass)
            tl.store(peaks + program * GP + head, peak)
            tl.store(sums + program * GP + head, mass)
