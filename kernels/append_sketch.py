"""First launch of a decode step on a sketch: append the token and its sketch, score all tokens by their packed codes.

`rocketkv.core.sketch` defines the sketch. Its bits are the same here: they come of whole numbers that float32 holds,
in whatever order they are summed, and of divisions and square roots that are rounded to the nearest. So is the sum of
values, in float64: one program owns a row, so no atomics are needed, and a float32 sum, even of two halves, would drift
from one that is made anew.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, C code bytes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .append import write_token
from .math import as_bfloat16, soft_capped

NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it and taking it away rounds to whole numbers, ties to even
SUMMABLE = tl.constexpr(1572864.0)  # 1.5 * 2^20: in float64 the same, to multiples of 2^-32
LOW = tl.constexpr(2048.0)  # what the low half of a number is multiplied by to be a float16


@dataclass(frozen=True)
class SketchRule:
    """How keys are sketched.

    Attributes:
        bits: of a channel, 1 to 4.
        grid: the largest whole number to which differences are rounded.
        norm: length of a row of the rotation, whose entries are whole numbers.
        step: distance of levels, over the length of a rounded difference.
    """

    bits: int
    grid: int
    norm: float
    step: float

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the digits that a code is packed as, from the lowest."""
        return (2, 1) if self.bits == 3 else (self.bits,)


def code_block(head_dim: int, width: int) -> int:
    """Return the columns that the bytes of digits of this width are padded to, at least 16 digits in all."""
    return max(int(triton.next_power_of_2(-(-head_dim * width // 8))), 2 * width)


def arranged(rotation: Tensor, rule: SketchRule) -> Tensor:
    """Return the rotation [D, D] so that a vector times it has its channels in the order of the packed digits.

    Args:
        rotation: R times the length of its rows.
        rule: how keys are sketched.

    Returns:
        [D padded to a power of two, digits of `code_block` bytes, plane after plane], zeros where no channel is.
    """
    head_dim = rotation.shape[0]
    rows = max(16, triton.next_power_of_2(head_dim))
    planes = []
    for width in rule.widths:
        size, digits = -(-head_dim * width // 8), 8 // width
        columns = functional.pad(rotation.t(), (0, size * digits - head_dim, 0, rows - head_dim))
        padding = (0, code_block(head_dim, width) - size)
        planes.append(functional.pad(columns.reshape(rows, digits, size), padding).flatten(1))
    return torch.cat(planes, 1)


@triton.jit
def _whole(difference, largest, top):
    """Return a difference in whole numbers of at most `top`; zeros where its largest is zero or NaN."""
    usable = largest > 0
    x = tl.div_rn(tl.where(usable, difference, 0.0), tl.where(usable, largest, 1.0))
    return x * top + NEAREST - NEAREST


@triton.jit
def _levels(turned, step, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """Return the codes of rotated channels that are in the order of digits, zero where no channel is, and levels."""
    column = tl.arange(0, turned.shape[0])
    size: tl.constexpr = (D * WIDTH + 7) // 8
    real = (column % BLOCK < size) & (column // BLOCK * size + column % BLOCK < D)
    level = tl.floor(tl.div_rn(turned, step))
    level = tl.minimum(tl.maximum(level, -HALF), HALF - 1.0)
    return tl.where(real, level + HALF, 0.0).to(tl.int32), level


@triton.jit
def _packed(code, WIDTH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the bytes [BLOCK] of codes in the order of digits, which are `WIDTH` bits of them from `SHIFT` on."""
    digit = tl.reshape((code >> SHIFT) & ((1 << WIDTH) - 1), [8 // WIDTH, BLOCK])
    return tl.sum(digit << (tl.arange(0, 8 // WIDTH) * WIDTH)[:, None], 0)


@triton.jit
def _digits(packed, WIDTH: tl.constexpr):
    """Return twice the digits of bytes [BLOCK, tokens] less their middle, [digits * BLOCK, tokens] float16, exactly."""
    count: tl.constexpr = 8 // WIDTH
    shift = (tl.arange(0, count) * WIDTH)[:, None, None].to(tl.uint16)
    digit = ((packed.to(tl.uint16) << 1)[None, :, :] >> shift) & (2 * ((1 << WIDTH) - 1))
    # A float16 between 1024 and 2048 has whole numbers as its lowest bits.
    number = (digit | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + (1 << WIDTH) - 1)
    return tl.reshape(number, [count * packed.shape[0], packed.shape[1]])


@triton.jit
def _halves(weight):
    """Return weights [heads, columns] as two float16 and a power of two a head: unit * (high + low / LOW).

    As exact as float32 but for the last bit or two, and made for products with small whole numbers.
    """
    largest = tl.max(tl.abs(weight), 1)
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23)
    unit = bits.to(tl.float32, bitcast=True)
    scaled = weight * ((254 << 23) - bits).to(tl.float32, bitcast=True)[:, None]
    high = scaled.to(tl.float16)
    low = ((scaled - high.to(tl.float32)) * LOW).to(tl.float16)
    return high, low, unit


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
def append_sketch_kernel(
    query,  # [B, H, D], channels side by side
    key,  # [B, Hkv, D], likewise
    value,  # [B, Hkv, DV], likewise
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    positions,  # [B, Hkv, capacity] int32
    codes,  # [B, Hkv, capacity, C] uint8
    scales,  # [B, Hkv, capacity] bfloat16
    mean,  # [B, Hkv, D] float32
    balance,  # [B, Hkv, D] bfloat16
    value_sum,  # [B, Hkv, DV] float64
    turn,  # [DP, columns], `arranged`
    lengths,  # [B, Hkv] int32, before this token
    seen,  # [1] int32, position of the token
    scores,  # [B, H, page_capacity] float32, written
    peaks,  # [B, Hkv, SPLITS, GP] float32, written
    sums,  # [B, Hkv, SPLITS, GP] float32, written
    ring,  # [B, H, RING, D], written: the query of token i at place i mod RING
    query_batch,  # strides of the first three, by row and by head
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    capacity,
    page_capacity,
    kv_heads,
    token_budget,
    scaling,
    softcap,
    factor,  # of rotated queries for the logits
    top,
    rescale,
    step,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,  # bits of a packed digit
    HIGHER: tl.constexpr,  # whether a code has another digit, of one bit, in bytes of its own
    SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,  # rotate in float32, which low precision on the interpreter needs too
    RESIDUAL: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,  # C, of the first digits, padded
    BLOCK_HIGHER: tl.constexpr,  # of the other ones
    HEADS: tl.constexpr,  # of a group that are scored at a time
    RC: tl.constexpr,
    BN: tl.constexpr,
    RING: tl.constexpr,  # 0 where queries are not remembered
):
    """Append a token to each row and score its tokens, that one included; grid (B * Hkv, SPLITS)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, kv_head = row // kv_heads, row % kv_heads
    queries = query + batch * query_batch + kv_head * G * query_head
    length = tl.load(lengths + row)
    inside = length < capacity
    stored = tl.minimum(length + 1, capacity)
    tiles = (stored + BN - 1) // BN
    size: tl.constexpr = (D * WIDTH + 7) // 8
    size_higher: tl.constexpr = (D + 7) // 8 if HIGHER else 0
    bytes_of: tl.constexpr = size + size_higher
    columns: tl.constexpr = BLOCK * (8 // WIDTH)
    columns_higher: tl.constexpr = 8 * BLOCK_HIGHER
    lines: tl.constexpr = columns + columns_higher if HIGHER else columns
    column = tl.arange(0, columns)
    column_higher = columns + tl.arange(0, columns_higher)
    byte = tl.arange(0, BLOCK)
    byte_higher = tl.arange(0, BLOCK_HIGHER)
    # Whoever scores the last tile appends: it reads what it wrote itself.
    if split == (tiles - 1) % SPLITS:
        slot = row * capacity + length
        own_key = key + batch * key_batch + kv_head * key_head
        new, vector = write_token(
            queries, query_head, own_key, value + batch * value_batch + kv_head * value_head,
            keys, values, positions, seen, ring, row, slot, inside, G, D, DV, DP, DVP, RING,
        )  # fmt: skip
        if RESIDUAL:
            place = tl.arange(0, DVP)
            writes = place < DV * inside.to(tl.int32)
            total = tl.load(value_sum + row * DV + place, mask=writes, other=0.0)
            summand = vector.to(tl.float32).to(tl.float64) + SUMMABLE - SUMMABLE
            tl.store(value_sum + row * DV + place, total + summand, mask=writes)

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
            piece = tl.load(own_key + line, mask=line < D, other=0.0).to(keys.dtype.element_ty).to(tl.float32)
            piece -= tl.load(mean + row * D + line, mask=line < D, other=0.0)
            piece *= tl.load(balance + row * D + line, mask=line < D, other=1.0).to(tl.float32)
            piece = _whole(piece, largest, top)[:, None]
            block = tl.load(turn + line[:, None] * lines + column[None, :])
            products += piece * block.to(tl.float32)
            if HIGHER:
                block = tl.load(turn + line[:, None] * lines + column_higher[None, :])
                products_higher += piece * block.to(tl.float32)
        turned = tl.sum(products, 0)
        # In steps from the middle; the largest difference is `top`, so only zeros have squares under 1.
        distance = tl.sqrt_rn(tl.maximum(square, 1.0)) * step
        half: tl.constexpr = 4.0 if HIGHER else (1 << WIDTH) / 2.0
        code, level = _levels(turned, distance, D, WIDTH, BLOCK, half)
        written = codes + slot * bytes_of
        packed = _packed(code, WIDTH, 0, BLOCK)
        tl.store(written + byte, packed.to(tl.uint8), mask=byte < size * inside.to(tl.int32))
        if HIGHER:
            code, _ = _levels(tl.sum(products_higher, 0), distance, D, 1, BLOCK_HIGHER, half)
            packed = _packed(code, 1, WIDTH, BLOCK_HIGHER)
            there = byte_higher < size_higher * inside.to(tl.int32)
            tl.store(written + size + byte_higher, packed.to(tl.uint8), mask=there)
        product = tl.maximum(tl.sum(turned * (level + 0.5), 0), 0.5)
        scale = largest * tl.div_rn(square * rescale, product)
        tl.store(scales + slot, as_bfloat16(scale), mask=inside)
    tl.debug_barrier()  # the new codes are read by other threads than wrote them

    # A row that stores no more than the budget attends to all of it: nothing is to be ranked.
    last_head = tl.where(length >= token_budget, G, 0)
    for first_head in range(0, last_head, HEADS):
        head = first_head + tl.arange(0, HEADS)
        heads = queries + head[:, None] * query_head
        real = head[:, None] < G
        weight = tl.zeros([HEADS, columns], tl.float32)
        weight_higher = tl.zeros([HEADS, columns_higher], tl.float32)
        shift = tl.zeros([HEADS], tl.float32)
        for first in range(0, DP, RC):
            line = first + tl.arange(0, RC)
            part = tl.load(heads + line[None, :], mask=real & (line[None, :] < D), other=0.0)
            centre = tl.load(mean + row * D + line, mask=line < D, other=0.0)
            shift += tl.sum(part.to(tl.float32) * centre[None, :], 1)
            divisors = tl.load(balance + row * D + line, mask=line < D, other=1.0).to(tl.float32)
            balanced = tl.div_rn(part.to(tl.float32), tl.broadcast_to(divisors[None, :], [HEADS, RC]))
            block = tl.load(turn + line[:, None] * lines + column[None, :])
            weight = _turned(balanced, block, weight, part.dtype, EXACT)
            if HIGHER:
                block = tl.load(turn + line[:, None] * lines + column_higher[None, :])
                weight_higher = _turned(balanced, block, weight_higher, part.dtype, EXACT)
        shift *= scaling
        high, low, unit = _halves(weight)
        high_higher, low_higher, unit_higher = _halves(weight_higher)
        unit *= factor / 2.0  # digits are twice themselves
        unit_higher *= factor / 2.0 * (1 << WIDTH)

        peak = tl.full([HEADS], float("-inf"), tl.float32)
        mass = tl.zeros([HEADS], tl.float32)
        for tile in range(split, tiles, SPLITS):
            token = tile * BN + tl.arange(0, BN)
            there = token < stored
            slots = row * capacity + token
            sketched = codes + slots[None, :] * bytes_of
            packed = tl.load(sketched + byte[:, None], mask=there[None, :] & (byte[:, None] < size), other=0)
            digits = _digits(packed, WIDTH)
            estimate = tl.dot(low, digits) * (1.0 / LOW)
            estimate = tl.dot(high, digits, estimate) * unit[:, None]
            if HIGHER:
                shared = there[None, :] & (byte_higher[:, None] < size_higher)
                packed = tl.load(sketched + size + byte_higher[:, None], mask=shared, other=0)
                digits = _digits(packed, 1)
                other = tl.dot(low_higher, digits) * (1.0 / LOW)
                estimate += tl.dot(high_higher, digits, other) * unit_higher[:, None]
            scale = tl.load(scales + slots, mask=there, other=0.0).to(tl.float32)
            estimate = shift[:, None] + scale[None, :] * estimate
            if SOFTCAP:
                estimate = soft_capped(estimate, softcap)
            scored = scores + (row * G + head[:, None]) * page_capacity + token[None, :]
            tl.store(scored, estimate, mask=real & there[None, :])
            estimate = tl.where(there[None, :], estimate, float("-inf"))
            higher = tl.maximum(peak, tl.max(estimate, 1))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp(peak - anchor) + tl.sum(tl.exp(estimate - anchor[:, None]), 1)
            peak = higher
        partial = (row * SPLITS + split) * GP + head
        tl.store(peaks + partial, peak)
        tl.store(sums + partial, mass)
