"""Multiply stage 1's scores by the distances between values and the output, in two launches.

Letters: B batch, Hkv KV heads, S tokens, Dv value dim, W window queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a fixed size, so that a row's scores depend neither on the other rows nor on the device.
SPLIT_TOKENS = 1024


@triton.jit(do_not_specialize=["older"])
def weighted_values_kernel(
    scores,  # [B, Hkv, older] float32
    values,  # [B, Hkv, S, DV], by strides
    sums,  # [B * Hkv, splits, DV] float32, written
    masses,  # [B * Hkv, splits] float32, written
    older,
    kv_heads,
    value_batch,
    value_head,
    value_token,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum the scores of a split's tokens, and their values times their scores; grid (B * Hkv, splits)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    values += row // kv_heads * value_batch + row % kv_heads * value_head
    channel = tl.arange(0, DVP)
    total = tl.zeros([BN, DVP], tl.float32)
    mass = tl.zeros([BN], tl.float32)
    for first in range(0, SPLIT, BN):
        token = split * SPLIT + first + tl.arange(0, BN)
        score = tl.load(scores + row * older + token, mask=token < older, other=0.0)
        # Values at padding are arbitrary; NaN scores count.
        counts = (score != 0)[:, None] & (channel < DV)[None, :]
        value = tl.load(values + token[:, None].to(tl.int64) * value_token + channel[None, :], mask=counts, other=0.0)
        total += score[:, None] * value.to(tl.float32)
        mass += score
    place = row * tl.num_programs(1) + split
    tl.store(sums + place * DV + channel, tl.sum(total, 0), mask=channel < DV)
    tl.store(masses + place, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["older"])
def value_distances_kernel(
    scores,  # [B, Hkv, older] float32
    values,  # [B, Hkv, S, DV], by strides
    sums,  # [B * Hkv, splits, DV] float32
    masses,  # [B * Hkv, splits] float32
    changed,  # [B, Hkv, older] float32, written
    older,
    kv_heads,
    value_batch,
    value_head,
    value_token,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    """Multiply a split's scores by the distances of its values from the mean; grid (B * Hkv, splits)."""
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    values += row // kv_heads * value_batch + row % kv_heads * value_head
    channel = tl.arange(0, DVP)
    total = tl.zeros([BS, DVP], tl.float32)
    mass = tl.zeros([BS], tl.float32)
    for first in range(0, splits, BS):
        part = first + tl.arange(0, BS)
        place = row * splits + part
        real = (part < splits)[:, None] & (channel < DV)[None, :]
        total += tl.load(sums + place[:, None] * DV + channel[None, :], mask=real, other=0.0)
        mass += tl.load(masses + place, mask=part < splits, other=0.0)
    sum_of_scores = tl.sum(mass, 0)
    # A maximum may drop NaN.
    sum_of_scores = tl.where(sum_of_scores < 1.1754943508222875e-38, 1.1754943508222875e-38, sum_of_scores)
    mean = tl.sum(total, 0) / sum_of_scores
    for first in range(0, SPLIT, BN):
        token = split * SPLIT + first + tl.arange(0, BN)
        inside = token < older
        score = tl.load(scores + row * older + token, mask=inside, other=0.0)
        counts = (score != 0)[:, None] & (channel < DV)[None, :]
        value = tl.load(values + token[:, None].to(tl.int64) * value_token + channel[None, :], mask=counts, other=0.0)
        away = tl.where(counts, value.to(tl.float32) - mean[None, :], 0.0)
        distance = tl.sqrt(tl.sum(away * away, 1))
        tl.store(changed + row * older + token, score * distance, mask=inside)


def value_aware(scores: Tensor, value: Tensor) -> Tensor:
    """Multiply each token's score by the distance between its value and the output.

    Args:
        scores: [B, Hkv, S - W] float32.
        value: [B, Hkv, S, Dv], all values; any strides.

    Returns:
        [B, Hkv, S - W] float32; 0 where the score is 0.
    """
    scores = scores.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    batch, kv_heads, older = scores.shape
    rows, value_dim = batch * kv_heads, value.shape[3]
    changed = torch.empty_like(scores)
    if not older:
        return changed
    splits = triton.cdiv(older, SPLIT_TOKENS)
    sums = scores.new_empty(rows * splits * (value_dim + 1))
    masses = sums[rows * splits * value_dim :]
    padded = triton.next_power_of_2(value_dim)
    block = 64 if padded <= 128 else 32
    sizes = {"DV": value_dim, "DVP": padded, "SPLIT": SPLIT_TOKENS, "BN": block, "num_warps": 8}
    given = (older, kv_heads, *value.stride()[:3])
    weighted_values_kernel[(rows, splits)](scores, value, sums, masses, *given, **sizes)
    value_distances_kernel[(rows, splits)](scores, value, sums, masses, changed, *given, BS=16, **sizes)
    return changed
