"""Causal attention of a prompt's tokens, for what `scaled_dot_product_attention` cannot fuse: one launch a layer.

It supports soft-caps, learned sinks, sliding windows, padding and keys of earlier turns, in any combination. Each
program attends from one block of a head's queries: first to the tiles of keys that the sliding window cuts, then to
those that all its queries see, then to those that the causal order cuts.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, n queries, S keys.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import soft_capped
from .operands import Params

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_HEAD_DIM = 256


@triton.jit
def _attend_tile(
    q, key, value, valid, first, last, position, window, stride_key, stride_value, peak, mass, total, scaling, factor,
    softcap,
    D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add BN keys from `first` on to the running softmax; unless WHOLE, `last` and the causal order limit them."""
    within = tl.arange(0, BN)
    token = first + within
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    start = tl.cast(first, tl.int64)
    keys = key + start * stride_key + within[:, None] * stride_key + channel[None, :]
    values = value + start * stride_value + within[:, None] * stride_value + column[None, :]
    # Masks only where they are needed: they narrow the loads.
    if WHOLE and D == DP:
        k = tl.load(keys)
    elif WHOLE:
        k = tl.load(keys, mask=channel[None, :] < D, other=0.0)
    else:
        k = tl.load(keys, mask=(token[:, None] < last) & (channel[None, :] < D), other=0.0)
    if WHOLE and DV == DVP:
        v = tl.load(values)
    elif WHOLE:
        v = tl.load(values, mask=column[None, :] < DV, other=0.0)
    else:
        v = tl.load(values, mask=(token[:, None] < last) & (column[None, :] < DV), other=0.0)
    if EXACT:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        logit = soft_capped(logit * scaling, softcap)
    if not WHOLE:
        seen = token[None, :] <= position[:, None]
        if WINDOW:
            seen &= token[None, :] > position[:, None] - window
        logit = tl.where(seen, logit, float("-inf"))
    if valid is not None:
        real = tl.load(valid + token, mask=token < last, other=0) != 0
        logit = tl.where(real[None, :], logit, float("-inf"))
    higher = tl.maximum(peak, tl.max(logit, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    decay = tl.exp2((peak - anchor) * factor)
    weight = tl.exp2((logit - anchor[:, None]) * factor)
    mass = mass * decay + tl.sum(weight, 1)
    total = tl.dot(weight.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
    return higher, mass, total


@triton.jit(do_not_specialize=["length", "size", "window"])
def prefill_kernel(
    query,  # [B, H, n, D], by strides
    key,  # [B, Hkv, S, D], by strides
    value,  # [B, Hkv, S, DV], by strides
    sinks,  # [H], or None
    valid,  # [B, valid heads, S] uint8, or None
    starts,  # [B, valid heads] int64, the first valid key, or None
    out,  # [B, n, H, DV], written
    length,  # n
    size,  # S
    window,
    heads,
    valid_heads,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    scaling,
    factor,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,  # dot products of float32, which low precision on the interpreter needs too
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Attend from one block of one head's queries; grid (blocks of queries, B * H)."""
    # The last queries see the most keys: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    kv_head = head // G
    number = block * BM + tl.arange(0, BM)
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    q = tl.load(
        query + number.to(tl.int64)[:, None] * query_token + channel[None, :],
        mask=(number[:, None] < length) & (channel[None, :] < D),
        other=0.0,
    )
    if EXACT:
        q = q.to(tl.float32)
    lowest = size - length + block * BM  # position of the block's first query
    position = size - length + number
    last = tl.minimum(lowest + BM, size)
    begin = 0
    if valid is not None:
        row = batch * valid_heads + kv_head % valid_heads
        valid += row * size
        begin = tl.load(starts + row).to(tl.int32)
    first = begin
    if WINDOW:
        begin = tl.maximum(begin, lowest - window + 1)
        # From `first` on, every query's window has begun.
        first = begin + tl.cdiv(tl.maximum(lowest + BM - window - begin, 0), BN) * BN
    whole = first + tl.maximum(lowest + 1 - first, 0) // BN * BN
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, DVP], tl.float32)
    if WINDOW:
        for start in range(begin, first, BN):
            peak, mass, total = _attend_tile(
                q, key, value, valid, start, last, position, window, key_token, value_token, peak, mass, total,
                scaling, factor, softcap, D, DV, True, SOFTCAP, False, EXACT, DP, DVP, BN,
            )  # fmt: skip
    for start in range(first, whole, BN):
        peak, mass, total = _attend_tile(
            q, key, value, valid, start, last, position, window, key_token, value_token, peak, mass, total,
            scaling, factor, softcap, D, DV, False, SOFTCAP, True, EXACT, DP, DVP, BN,
        )  # fmt: skip
    for start in range(whole, last, BN):
        peak, mass, total = _attend_tile(
            q, key, value, valid, start, last, position, window, key_token, value_token, peak, mass, total,
            scaling, factor, softcap, D, DV, WINDOW, SOFTCAP, False, EXACT, DP, DVP, BN,
        )  # fmt: skip
    if sinks is not None:
        # A learned sink joins the denominator alone.
        sink = tl.load(sinks + head).to(tl.float32) * (LOG2E / factor)
        highest = tl.maximum(peak, sink)
        decay = tl.exp2((peak - highest) * factor)
        mass = mass * decay + tl.exp2((sink - highest) * factor)
        total = total * decay[:, None]
    total = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    written = ((batch * length + number) * heads + head) * DV
    tl.store(
        out + written[:, None] + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(number[:, None] < length) & (column[None, :] < DV),
    )


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why `prefill_attention` does not support these tensors, or None if it does."""
    if query.dtype not in DTYPES or key.dtype not in DTYPES or value.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}; the kernel takes float16, bfloat16 and float32"
    if max(key.shape[3], value.shape[3]) > LARGEST_HEAD_DIM:
        return f"head_dim is {max(key.shape[3], value.shape[3])}; the kernel takes up to {LARGEST_HEAD_DIM}"
    return None


def _tiles(length: int, head_dim: int, low_precision: bool) -> tuple[int, int, int, int]:
    """Return queries and keys of a product, warps, and stages.

    Compiled for sm_90 they spill nothing; with three stages, two tiles are in flight while one is computed.
    """
    if not low_precision:  # larger products of float32 do not fit the registers
        return 16, 32, 4, 2
    rows = min(128, max(16, triton.next_power_of_2(length)))
    if head_dim > 128:
        return min(rows, 64), 32, 8 if rows >= 64 else 4, 2
    # AMD's multiprocessors have 64 KiB of shared memory.
    return rows, 64, 8 if rows == 128 else 4, 2 if torch.version.hip else 3


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Params,
    *,
    window: int | None = None,
    valid: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend causally from n queries, the last of S tokens, to all of them.

    Args:
        query: [B, H, n, D]; any strides.
        key: [B, Hkv, S, D]; any strides.
        value: [B, Hkv, S, Dv]; any strides.
        params: the model's attention parameters; the scaling is positive.
        window: keys that a query sees, itself included, or None for all.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None. A query that sees no key returns zeros.
        out: [B, n, H, Dv] to write to, contiguous, or None for a new one in the query's dtype.

    Returns:
        [B, n, H, Dv].
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, size, value_dim = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    if out is None:
        out = torch.empty(batch, length, heads, value_dim, dtype=query.dtype, device=query.device)
    mask = starts = None
    if valid is not None:
        mask = valid.contiguous().view(torch.uint8)
        starts = mask.argmax(-1)
    low_precision = key.dtype == query.dtype and key.dtype != torch.float32
    row_block, key_block, warps, stages = _tiles(length, max(head_dim, value_dim), low_precision)
    softcap = params.softcap
    prefill_kernel[(triton.cdiv(length, row_block), batch * heads)](
        query, key, value, params.sinks, mask, starts, out,
        length, size, 0 if window is None else window, heads, 1 if valid is None else valid.shape[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        params.scaling, LOG2E.value * (1.0 if softcap is not None else params.scaling),
        1.0 if softcap is None else softcap,
        G=heads // kv_heads, D=head_dim, DV=value_dim, WINDOW=window is not None, SOFTCAP=softcap is not None,
        EXACT=INTERPRETED or not low_precision,
        DP=max(16, triton.next_power_of_2(head_dim)), DVP=max(16, triton.next_power_of_2(value_dim)),
        BM=row_block, BN=key_block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
