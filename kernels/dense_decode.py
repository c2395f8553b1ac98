"""Dense decode attention over a preallocated cache, split over the keys: the baseline that benchmarks compare with.

Two launches: each program attends from a group's query heads to a part of a row's tokens, then the parts are combined.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_HEAD_DIM = 256


@triton.jit
def _attend_block(
    q, keys, values, first, last, peak, mass, total, factor,
    D: tl.constexpr, DV: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Take the tokens from `first` on into the running softmax, base two; masked by `last` unless all BT are there."""
    token = first + tl.arange(0, BT)
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    key_places = keys + token[:, None] * D + channel[None, :]
    value_places = values + token[:, None] * DV + column[None, :]
    # Masks only where something is to be masked: they narrow the loads.
    if WHOLE and D == DP:
        block = tl.load(key_places)
    elif WHOLE:
        block = tl.load(key_places, mask=channel[None, :] < D, other=0.0)
    else:
        block = tl.load(key_places, mask=(token[:, None] < last) & (channel[None, :] < D), other=0.0)
    if WHOLE and DV == DVP:
        vector = tl.load(value_places)
    elif WHOLE:
        vector = tl.load(value_places, mask=column[None, :] < DV, other=0.0)
    else:
        vector = tl.load(value_places, mask=(token[:, None] < last) & (column[None, :] < DV), other=0.0)
    if EXACT:
        block = block.to(tl.float32)
        vector = vector.to(tl.float32)
    logit = tl.dot(q, tl.trans(block), input_precision="ieee") * factor
    if not WHOLE:
        logit = tl.where(token[None, :] < last, logit, float("-inf"))
    higher = tl.maximum(peak, tl.max(logit, 1))
    decay = tl.exp2(peak - higher)
    weight = tl.exp2(logit - higher[:, None])
    mass = mass * decay + tl.sum(weight, 1)
    total = tl.dot(weight.to(vector.dtype), vector, total * decay[:, None], input_precision="ieee")
    return higher, mass, total


@triton.jit
def dense_partial_kernel(
    query,  # [B, H, D]
    keys,  # [B, Hkv, capacity, D]
    values,  # [B, Hkv, capacity, DV]
    partial_out,  # [B, Hkv, SPLITS, GP, DVP] float32, written
    partial_peaks,  # [B, Hkv, SPLITS, GP] float32, written
    partial_sums,  # [B, Hkv, SPLITS, GP] float32, written
    length,
    share,  # tokens of one split, a multiple of BT
    capacity,
    factor,  # of the logits, base two
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,  # dot products of float32, which low precision on the interpreter needs too
    GP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
):
    """Attend to one part of a row's tokens; grid (B * Hkv, SPLITS), each split with at least one token."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = tl.arange(0, GP)
    channel = tl.arange(0, DP)
    column = tl.arange(0, DVP)
    real = (head[:, None] < G) & (channel[None, :] < D)
    q = tl.load(query + (row * G + head[:, None]) * D + channel[None, :], mask=real, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    keys += row * capacity * D
    values += row * capacity * DV
    peak = tl.full([GP], float("-inf"), tl.float32)
    mass = tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, DVP], tl.float32)
    first = split * share
    last = tl.minimum(first + share, length)
    whole = first + (last - first) // BT * BT
    for start in range(first, whole, BT):
        peak, mass, total = _attend_block(
            q, keys, values, start, last, peak, mass, total, factor, D, DV, True, EXACT, DP, DVP, BT
        )
    if whole < last:
        peak, mass, total = _attend_block(
            q, keys, values, whole, last, peak, mass, total, factor, D, DV, False, EXACT, DP, DVP, BT
        )
    place = (row * SPLITS + split) * GP + head
    tl.store(partial_peaks + place, peak)
    tl.store(partial_sums + place, mass)
    tl.store(partial_out + place[:, None] * DVP + column[None, :], total)


@triton.jit
def dense_combine_kernel(
    partial_out,  # [B, Hkv, SPLITS, GP, DVP] float32
    partial_peaks,  # [B, Hkv, SPLITS, GP] float32
    partial_sums,  # [B, Hkv, SPLITS, GP] float32
    out,  # [B, H, DV], written
    G: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    GP: tl.constexpr,
    DVP: tl.constexpr,
    SP: tl.constexpr,
    CHUNK: tl.constexpr,  # splits whose outputs are held at once
):
    """Combine the parts of one query head; grid (B * H,)."""
    query_head = tl.program_id(0).to(tl.int64)
    row = query_head // G
    head = query_head % G
    split = tl.arange(0, SP)
    peak = tl.load(partial_peaks + (row * SPLITS + split) * GP + head, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(peak, 0)
    mass = tl.load(partial_sums + (row * SPLITS + split) * GP + head, mask=split < SPLITS, other=0.0)
    mass = tl.sum(mass * tl.exp2(peak - highest), 0)
    column = tl.arange(0, DVP)
    total = tl.zeros([DVP], tl.float32)
    for start in range(0, SPLITS, CHUNK):
        part = start + tl.arange(0, CHUNK)
        place = (row * SPLITS + part) * GP + head
        there = part < SPLITS
        decay = tl.exp2(tl.load(partial_peaks + place, mask=there, other=float("-inf")) - highest)
        piece = tl.load(partial_out + place[:, None] * DVP + column[None, :], mask=there[:, None], other=0.0)
        total += tl.sum(piece * decay[:, None], 0)
    tl.store(out + query_head * DV + column, (total / mass).to(out.dtype.element_ty), mask=column < DV)


@dataclass(frozen=True)
class Tiling:
    """The blocks, warps and stages of the attention.

    Attributes:
        block: tokens of one product.
        waves: programs, in multiples of those that fill the device.
        warps: warps of a program.
        stages: blocks in flight.
    """

    block: int = 64
    waves: int = 2
    warps: int = 4
    stages: int = 3


TILINGS = (
    Tiling(),
    Tiling(waves=4),
    Tiling(block=128, warps=8),
    Tiling(block=128, warps=4, waves=1),
    Tiling(block=32, stages=4),
    Tiling(block=64, warps=8, waves=4, stages=2),
)
"""Tilings to try: the fastest depends on the device and on the shape."""


class DenseWorkspace:
    """The buffers of one shape and tiling.

    Args:
        batch: B.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv.
        length: N, tokens that a step attends to.
        device: where.
        tiling: its blocks, warps and stages.
        programs: programs that fill the device, by default its multiprocessors.

    Raises:
        ValueError: a head is too large, or there is nothing to attend to.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        length: int,
        device: torch.device,
        tiling: Tiling | None = None,
        programs: int | None = None,
    ) -> None:
        if max(head_dim, value_dim) > LARGEST_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {LARGEST_HEAD_DIM}, got {max(head_dim, value_dim)}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if programs is None:
            on_gpu = device.type == "cuda"
            programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        self.tiling = tiling or Tiling()
        self.group = heads // kv_heads
        self.length = length
        block, rows = self.tiling.block, batch * kv_heads
        blocks = triton.cdiv(length, block)
        wanted = max(1, min(blocks, triton.cdiv(self.tiling.waves * programs, rows)))
        self.share = triton.cdiv(blocks, wanted) * block
        self.splits = triton.cdiv(length, self.share)  # none of them empty
        self.group_block = max(16, triton.next_power_of_2(self.group))
        self.head_block = max(16, triton.next_power_of_2(head_dim))
        self.value_block = max(16, triton.next_power_of_2(value_dim))

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.float32, device=device)

        self.partial_out = empty(rows, self.splits, self.group_block, self.value_block)
        self.partial_peaks = empty(rows, self.splits, self.group_block)
        self.partial_sums = empty(rows, self.splits, self.group_block)


def dense_decode(
    query: Tensor, keys: Tensor, values: Tensor, *, workspace: DenseWorkspace, scaling: float, out: Tensor | None = None
) -> Tensor:
    """Attend exactly from one query a head to the first N tokens of every row.

    Given `out`, nothing is allocated: the launches can be captured in a CUDA graph.

    Args:
        query: [B, H, D].
        keys: [B, Hkv, capacity, D], contiguous.
        values: [B, Hkv, capacity, Dv], contiguous.
        workspace: made for these shapes; knows N.
        scaling: factor of the logits.
        out: [B, H, Dv] to write to, or None for a new one.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: keys or values are not contiguous.
    """
    batch, heads, head_dim = query.shape
    kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    space, tiling = workspace, workspace.tiling
    query = query.contiguous()
    if out is None:
        out = query.new_empty(batch, heads, value_dim)
    exact = INTERPRETED or keys.dtype == torch.float32 or query.dtype != keys.dtype
    dense_partial_kernel[(batch * kv_heads, space.splits)](
        query, keys, values, space.partial_out, space.partial_peaks, space.partial_sums,
        space.length, space.share, capacity, scaling * LOG2E.value,
        G=space.group, D=head_dim, DV=value_dim, SPLITS=space.splits, EXACT=exact,
        GP=space.group_block, DP=space.head_block, DVP=space.value_block, BT=tiling.block,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    split_block = triton.next_power_of_2(space.splits)
    dense_combine_kernel[(batch * heads,)](
        space.partial_out, space.partial_peaks, space.partial_sums, out,
        G=space.group, DV=value_dim, SPLITS=space.splits,
        GP=space.group_block, DVP=space.value_block, SP=split_block, CHUNK=min(split_block, 16), num_warps=4,
    )  # fmt: skip
    return out
