"""Stage 1's scores: how much the last W queries attend to every earlier token, without a [W, S] matrix.

Three launches: each split of the keys leaves a peak and a sum of exponentials for every query row; they are merged; the
logits are computed once more, and their weights summed over the rows.

Peaks are subtracted from logits that are not scaled yet, where near a peak nothing is lost; then one factor scales and
turns to powers of two.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens, W window queries, M = G*W query rows.
"""

import triton
import triton.language as tl

from .math import soft_capped

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["size"])
def window_statistics_kernel(
    query,  # [B, Hkv, M, D]
    key,  # [B, Hkv, S, D], by strides
    valid,  # [B, valid heads, S] uint8
    peaks,  # [B, Hkv, SPLITS, M] float32, written
    sums,  # [B, Hkv, SPLITS, M] float32, written
    size,
    share,
    kv_heads,
    valid_heads,
    stride_batch,
    stride_head,
    stride_token,
    scaling,
    factor,
    softcap,
    M: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    VALID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,  # dot products of float32, which low precision on the interpreter needs too
    DP: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
):
    """Write each row's peak and sum over one split of the keys; grid (B * Hkv, SPLITS, blocks of rows)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    number = tl.program_id(2) * MB + tl.arange(0, MB)
    channel = tl.arange(0, DP)
    within = tl.arange(0, BN)
    q = tl.load(
        query + (row * M + number[:, None]) * D + channel[None, :],
        mask=(number[:, None] < M) & (channel[None, :] < D),
        other=0.0,
    )
    if EXACT:
        q = q.to(tl.float32)
    own = size - W + number % W  # position of the query's own token
    batch = row // kv_heads
    key += batch * stride_batch + row % kv_heads * stride_head
    if VALID:
        valid += (batch * valid_heads + row % kv_heads % valid_heads) * size
    peak = tl.full([MB], float("-inf"), tl.float32)
    mass = tl.zeros([MB], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, size), BN):
        token = start + within
        block = key + tl.cast(start, tl.int64) * stride_token
        k = tl.load(
            block + within[:, None] * stride_token + channel[None, :],
            mask=(token[:, None] < size) & (channel[None, :] < D),
            other=0.0,
        )
        if EXACT:
            k = k.to(tl.float32)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            logit = soft_capped(logit * scaling, softcap)
        seen = token[None, :] <= own[:, None]
        if VALID:
            seen &= (tl.load(valid + token, mask=token < size, other=0) != 0)[None, :]
        logit = tl.where(seen, logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 1))
        # No subtraction of infinities: the sum is infinite where a logit is, and NaN only where one is NaN.
        anchor = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        mass = mass * tl.exp2((peak - anchor) * factor) + tl.sum(tl.exp2((logit - anchor[:, None]) * factor), 1)
        peak = higher
    partial = (row * tl.num_programs(1) + split) * M + number
    tl.store(peaks + partial, peak, mask=number < M)
    tl.store(sums + partial, mass, mask=number < M)


@triton.jit(do_not_specialize=["size", "splits"])
def window_merge_kernel(
    peaks,  # [B, Hkv, SPLITS, M] float32
    sums,  # [B, Hkv, SPLITS, M] float32
    sinks,  # [H]
    valid,  # [B, valid heads, S] uint8
    anchors,  # [B, Hkv, M] float32, written
    weights,  # [B, Hkv, M] float32, written
    size,
    splits,
    kv_heads,
    valid_heads,
    factor,
    M: tl.constexpr,
    W: tl.constexpr,
    SINKS: tl.constexpr,
    VALID: tl.constexpr,
    SP: tl.constexpr,
    MB: tl.constexpr,
):
    """Merge the splits: what to subtract from a row's logits, and its weight; grid (B * Hkv, blocks of rows)."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * MB + tl.arange(0, MB)
    real = number < M
    part = tl.arange(0, SP)[:, None]
    highest = tl.full([MB], float("-inf"), tl.float32)
    sink = highest
    if SINKS:
        sink = tl.load(sinks + row % kv_heads * (M // W) + number // W, mask=real, other=0.0).to(tl.float32)
        sink = sink * (LOG2E / factor)
        highest = sink
    for first in range(0, splits, SP):
        partial = (row * splits + first + part) * M + number[None, :]
        there = (first + part < splits) & real[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(peaks + partial, mask=there, other=float("-inf")), 0))
    anchor = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    mass = tl.zeros([MB], tl.float32)
    if SINKS:
        mass += tl.exp2((sink - anchor) * factor)
    for first in range(0, splits, SP):
        partial = (row * splits + first + part) * M + number[None, :]
        there = (first + part < splits) & real[None, :]
        peak = tl.load(peaks + partial, mask=there, other=float("-inf"))
        share = tl.load(sums + partial, mask=there, other=0.0)
        mass += tl.sum(share * tl.exp2((peak - anchor[None, :]) * factor), 0)
    # A NaN among the logits spoils the row's weights; an infinite one only its own column.
    anchor = tl.where(mass == mass, tl.where(highest == float("-inf"), 0.0, highest), mass)
    weight = tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
    if VALID:
        valid += (row // kv_heads * valid_heads + row % kv_heads % valid_heads) * size
        weight = tl.where(tl.load(valid + size - W + number % W, mask=real, other=0) != 0, weight, 0.0)
    tl.store(anchors + row * M + number, anchor, mask=real)
    tl.store(weights + row * M + number, weight, mask=real)


@triton.jit(do_not_specialize=["size", "older"])
def window_sums_kernel(
    query,  # [B, Hkv, M, D]
    key,  # [B, Hkv, S, D], by strides
    valid,  # [B, valid heads, S] uint8
    anchors,  # [B, Hkv, M] float32
    weights,  # [B, Hkv, M] float32
    scores,  # [B, Hkv, S - W] float32, written
    size,
    older,  # S - W
    kv_heads,
    valid_heads,
    stride_batch,
    stride_head,
    stride_token,
    scaling,
    factor,
    softcap,
    M: tl.constexpr,
    D: tl.constexpr,
    VALID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    DP: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum the rows' weights over one block of keys; grid (B * Hkv, blocks of keys)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BN
    within = tl.arange(0, BN)
    token = start + within
    channel = tl.arange(0, DP)
    batch = row // kv_heads
    key += batch * stride_batch + row % kv_heads * stride_head + start.to(tl.int64) * stride_token
    k = tl.load(
        key + within[:, None] * stride_token + channel[None, :],
        mask=(token[:, None] < older) & (channel[None, :] < D),
        other=0.0,
    )
    if EXACT:
        k = k.to(tl.float32)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, M, MB):
        number = first + tl.arange(0, MB)
        real = number < M
        q = tl.load(
            query + (row * M + number[:, None]) * D + channel[None, :],
            mask=real[:, None] & (channel[None, :] < D),
            other=0.0,
        )
        if EXACT:
            q = q.to(tl.float32)
        # Keys by rows: the sum over the queries stays within a thread's own row.
        logit = tl.dot(k, tl.trans(q), input_precision="ieee")
        if SOFTCAP:
            logit = soft_capped(logit * scaling, softcap)
        anchor = tl.load(anchors + row * M + number, mask=real, other=0.0)
        weight = tl.load(weights + row * M + number, mask=real, other=0.0)
        total += tl.sum(weight[None, :] * tl.exp2((logit - anchor[None, :]) * factor), 1)
    if VALID:
        valid += (batch * valid_heads + row % kv_heads % valid_heads) * size
        total = tl.where(tl.load(valid + token, mask=token < older, other=0) != 0, total, 0.0)
    tl.store(scores + row * older + token, total, mask=token < older)
