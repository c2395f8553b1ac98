"""The one rule for every top-k, and tensor helpers of the selection.

`select_top` defines the rule: all scores above the n-th largest, then the lowest positions among its ties, in position
order. `select` applies the rule to the tokens of scored units (pages, or single tokens of a sketch).

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, U units, k selected tokens, M selections of
a row: Hkv in a decode step, n Hkv in a verify step of n queries (`rocketkv.core.verify`).
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

# Cached aranges stay small: 64 tensors of at most 64 KiB.
MOST_CACHED = 8192

# Up to this size a stable sort (two operations) is faster than finding the threshold (ten operations).
SORTED_SIZE = 256


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # it may be used in a later call that is not in inference mode
def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a cached 0-dimensional CPU tensor, which combines with tensors of any device; do not write into it.

    On a CPU, converting a Python number to a tensor costs about as much as a small operation.
    """
    return torch.tensor(value, dtype=dtype, device="cpu")


def multiples(count: int, step: int, device: torch.device) -> Tensor:
    """Return `arange(0, count * step, step)` [count] int64, cached on the CPU; do not write into it."""
    # On a GPU a cached tensor could belong to the memory pool of a captured graph.
    if device.type == "cpu" and count <= MOST_CACHED:
        return _multiples(count, step)
    return torch.arange(0, count * step, step, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _multiples(count: int, step: int) -> Tensor:
    return torch.arange(0, count * step, step, device="cpu")


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that disables autocast, so that scores stay in float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def gather_tokens(positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gather whole tokens of tensors [B, Hkv, N, D] at positions [B, M, k] (an integer dtype) to [B, M, k, D]."""
    kv_heads, size = tensors[0].shape[1:3]
    if positions.shape[1] != kv_heads:
        found = gather_tokens(positions.reshape(len(positions), kv_heads, -1), *tensors)
        return tuple([tensor.view(*positions.shape, tensor.shape[3]) for tensor in found])
    batch, rows = len(positions), None
    gathered = []
    for tensor in tensors:
        if tensor.shape[2] == size and tensor.is_contiguous():
            if rows is None:
                rows = positions + multiples(batch * kv_heads, size, positions.device).view(batch, kv_heads, 1)
            gathered.append(F.embedding(rows, tensor.view(-1, tensor.shape[3])))
        elif tensor.shape[2] == size and tensor.transpose(1, 2).is_contiguous():  # as models compute keys
            head = multiples(kv_heads, 1, positions.device).view(kv_heads, 1)
            row = multiples(batch, size, positions.device).view(batch, 1, 1)
            tokens = tensor.transpose(1, 2).view(-1, tensor.shape[3])
            gathered.append(F.embedding((positions + row) * kv_heads + head, tokens))
        else:
            index = positions.long()[..., None]
            gathered.append(tensor.gather(2, index.expand(-1, -1, -1, tensor.shape[3])))
    return tuple(gathered)


def select_top(scores: Tensor, n: int) -> Tensor:
    """Return the positions of the n largest scores, the one rule for every top-k of this library.

    All scores above the n-th largest, then the lowest positions among its ties, in position order. `torch.topk` breaks
    ties in an undefined way that changes with padding and device, and pooling and pages produce many ties.

    Args:
        scores: [..., S], any float dtype; NaN ranks with minus infinity.
        n: number of positions, 1 <= n <= S.

    Returns:
        [..., n] int64, ascending.

    Raises:
        ValueError: n is out of range.
    """
    size = scores.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the {size} scores, got {n}")
    if n == size:
        return torch.arange(size, device=scores.device).expand(*scores.shape[:-1], size)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if size <= SORTED_SIZE:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :n].sort(dim=-1).values
    threshold = scores.kthvalue(size - n + 1, dim=-1, keepdim=True).values
    above = (scores > threshold).cumsum(-1)
    tied = (scores == threshold).cumsum(-1)
    taken = above + torch.minimum(tied, n - above[..., -1:])
    # The i-th taken position is the first whose running count is i.
    number = torch.arange(1, n + 1, device=scores.device).expand(*scores.shape[:-1], n).contiguous()
    return torch.searchsorted(taken, number)


def select(
    logits: Tensor,
    k: int,
    *,
    stored: int,
    lengths: Tensor | None,
    kv_heads: int,
    unit_size: int,
    sinks: Tensor | None = None,
    protected: int = 0,
    by_largest: bool = False,
    ordered: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the k stored tokens of largest estimated weight for each KV head.

    The weights are a softmax over stored tokens, where each token of a page has the page's logit. Tokens are ranked by
    their average weight over the heads of a group, or by the largest.

    Args:
        logits: [B, H, U] float32, one per unit (a page of tokens, or a single token); [B, n H, U] in a verify step,
            and so are all other tensors with one entry per query head.
        k: tokens to choose, at most N.
        stored: N, tokens of the longest row.
        lengths: [B, M] int32, tokens to choose from, or None if these are always N.
        kv_heads: M.
        unit_size: tokens of a full unit.
        sinks: [H] or [B, H], learned sinks: one logit per query in the softmax's denominator; or None.
        protected: number of first tokens that are chosen before all others, in whole units.
        by_largest: whether the largest weight over the group's heads ranks a token, not the average.
        ordered: whether positions must ascend; attention does not need it.

    Returns:
        Positions [B, M, k], ascending int32 if `ordered`, else int64 in no order, as `gather` takes them; in a row of
        fewer than k tokens, positions without a token fill up. And the estimated weight of one token of each unit,
        [B, H, U] float32; its sum over the chosen tokens is the estimated attention mass.
    """
    batch, heads, units = logits.shape
    group = heads // kv_heads
    # Equal logits must give equal weights, bit for bit: a softmax over units, divided by the total over tokens.
    total: Tensor | int = unit_size
    if lengths is None:
        weight = logits.softmax(-1)
        missing = units * unit_size - stored  # tokens that the last unit lacks
        if missing:
            total = torch.rsub(weight.narrow(-1, units - 1, 1), unit_size, alpha=missing)
    else:
        empty = multiples(units, unit_size, logits.device) >= lengths[..., None]
        logits = logits.view(batch, kv_heads, group, units).masked_fill(empty.unsqueeze(2), -torch.inf).flatten(1, 2)
        weight = logits.softmax(-1)
        if unit_size > 1:
            last = lengths.long().div(unit_size, rounding_mode="floor").clamp_(max=units - 1)
            lacking = torch.stack((last, lengths.neg() % unit_size)).repeat_interleave(group, dim=2).unsqueeze(-1)
            total = unit_size - weight.gather(-1, lacking[0]) * lacking[1]
    if sinks is not None:
        total = total + torch.exp(sinks.float()[..., None] - logits.logsumexp(-1, keepdim=True))
    if isinstance(total, Tensor) or total != 1:
        weight = weight / total
    by_head = weight.view(batch, kv_heads, group, units)
    shared = by_head.amax(2) if by_largest else by_head.sum(2)  # the sum ranks as the average does
    if protected:
        shared[..., : -(-protected // unit_size)] = torch.inf
    positions = ranked(shared, k, stored, unit_size, lengths)
    return positions.sort(-1).values.int() if ordered else positions, weight


def ranked(weight: Tensor, k: int, stored: int, unit_size: int, lengths: Tensor | None = None) -> Tensor:
    """Apply the rule of `select_top` to tokens, given one weight per unit; positions are not ordered.

    Equal to `select_top` of the weights repeated for every token, without repeating them. A unit's rank is one integer:
    the bits of its weight, which sort as the weight does, above its place from the end. No two ranks are equal, so
    every top-k returns the same choice.

    Args:
        weight: [..., U] float32, at least 0; NaN ranks last. No unit without tokens may rank before one with tokens.
        k: tokens to choose, at most `stored`.
        stored: N, tokens of the longest row.
        unit_size: tokens of a full unit; a row's last unit has the remainder.
        lengths: [...] (an integer dtype), tokens of each row, or None if every row has N.

    Returns:
        Positions [..., k] int64; the tokens of a unit are adjacent. In a row of fewer than k tokens, positions without
        a token fill up.
    """
    units = weight.shape[-1]
    bits = weight.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    rank = torch.add(multiples(units, -1, weight.device), bits, alpha=1 << 32)
    # One more unit if the last one may be partial, so that the units have at least k tokens.
    short = units * unit_size - stored
    partial = unit_size > 1 and (short > 0 or lengths is not None)
    unit = rank.topk(min(units, -(-k // unit_size) + partial), dim=-1, sorted=unit_size > 1).indices
    if unit_size == 1:
        return unit
    token = torch.add(multiples(unit_size, 1, weight.device), unit.unsqueeze(-1), alpha=unit_size).flatten(-2)
    first = token.narrow(-1, 0, k)
    if not partial:
        return first
    # The tokens that the last unit lacks are adjacent: later tokens move up.
    if lengths is None:
        lacking = first.cummax(-1).values >= stored
        return torch.where(lacking, token.narrow(-1, short, k), first)
    end, number = lengths[..., None], multiples(k, 1, weight.device)
    lacking = first.cummax(-1).values >= end
    place = (lacking * (end.neg() % unit_size)).add_(number).clamp_(max=token.shape[-1] - 1)
    return torch.where(number < end, token.gather(-1, place), number)


def recent_positions(valid: Tensor, kept: int, sinks: int) -> Tensor:
    """Return the positions of each row's first `sinks` tokens and of its most recent `kept - sinks`.

    Args:
        valid: [..., S] bool, False where there is no token.
        kept: number of positions, 1 <= kept <= S.
        sinks: number of sink tokens among them.

    Returns:
        [..., kept] int64, ascending; in a row of fewer tokens, positions without a token fill up.
    """
    position = torch.arange(valid.shape[-1], dtype=torch.float32, device=valid.device)
    scores = torch.where(valid.cumsum(-1) <= sinks, torch.inf, position)
    return select_top(scores.masked_fill(~valid, -torch.inf), kept)
