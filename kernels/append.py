"""Write a row's new token, in either first launch of a decode step.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values.
"""

import triton
import triton.language as tl


@triton.jit
def write_token(
    queries,  # of the row: [G, D]
    own_key,  # [D]
    own_value,  # [DV]
    keys, values, positions, position, ring, row, first_key, first_value, first_slot, length, inside,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Write key, value, position and the row's queries, if the row has room; return the key and the value as stored."""
    channel = tl.arange(0, DP)
    own = channel < D
    key = tl.load(own_key + channel, mask=own, other=0.0).to(keys.dtype.element_ty)
    tl.store(keys + (first_key + length) * D + channel, key, mask=channel < D * inside.to(tl.int32))
    column = tl.arange(0, DVP)
    value = tl.load(own_value + column, mask=column < DV, other=0.0).to(values.dtype.element_ty)
    tl.store(values + (first_value + length) * DV + column, value, mask=column < DV * inside.to(tl.int32))
    tl.store(positions + first_slot + length, position, mask=inside)
    if ring is not None:
        place = position % RING
        for g in range(G):
            remembered = tl.load(queries + g * D + channel, mask=own, other=0.0)
            tl.store(ring + ((row * G + g) * RING + place) * D + channel, remembered, mask=own)
    return key, value
