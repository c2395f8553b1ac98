"""The decode step in PyTorch, for growing and static buffers: append, score, select, attend.

`rocketkv.core.verify` has the verify step, which shares `attend_stored`.

Source: paper (arXiv 2502.14051), section 3.4, "Hybrid Sparse Attention", and Algorithm 1. This is the readable
reference of stage 2: `dispatch` runs it, or a kernel on the same `DecodeBuffers`.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, N stored tokens, P page size, W query
ring, k selected tokens, t token budget.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import BudgetSplit
from .attention import attend
from .params import AttentionParams
from .residual import residual_attend, summable
from .token_index import TokenIndex
from .topk import full_precision, select


class DecodeBuffers(NamedTuple):
    """The tensors of one layer that a decode step reads and writes.

    Attributes:
        keys: [B, Hkv, capacity, D]; written.
        values: [B, Hkv, capacity, Dv]; written.
        positions: [B, Hkv, capacity] int32, each slot's position in the sequence, -1 without a token; written.
        seq_lens: [B, Hkv] int32, tokens stored in each row; incremented.
        index_tensors: tensors of the index in the order of its `names`; written. Empty without an index.
        value_sum: [B, Hkv, Dv] float64, exact sum of each row's values; updated. None without a residual.
        residual_bias: [B, H] float32, added to the residual's logit, or None if it is not calibrated.
        missed: [B, H] float32, the weight of the residual in the last step; written. None without a residual.
        query_ring: [B, H, W, D], the query of token i at place i mod W; written. None if nothing is re-evicted.
        clock: [1] int32, tokens of the sequence; incremented. None if only the host counts them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    seq_lens: Tensor
    index_tensors: tuple[Tensor, ...] = ()
    value_sum: Tensor | None = None
    residual_bias: Tensor | None = None
    missed: Tensor | None = None
    query_ring: Tensor | None = None
    clock: Tensor | None = None


class Fill(NamedTuple):
    """How full the buffers are before a step, as far as the host knows.

    Attributes:
        longest: tokens that the longest row stores; the capacity less one if only the device knows it (static buffers).
        shortest: tokens that the shortest row stores; 0 if only the device knows it.
        seen: tokens of the sequence; None if only the device's clock knows it.
    """

    longest: int
    shortest: int
    seen: int | None


def decode_step_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    fill: Fill,
) -> Tensor:
    """Append one token to every row and attend to the tokens that stage 2 selects, possibly the new one.

    A full row of static buffers does not change.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        buffers: the layer's buffers; written in place.
        index: the index that scores the stored tokens, or None.
        split: the tokens and bytes that the step may read.
        params: the model's attention parameters.
        fill: how full the buffers are.

    Returns:
        [B, H, Dv] in the query's dtype.
    """
    uniform = fill.seen is not None and fill.longest == fill.shortest
    append_token(query, key, value, buffers, index, fill)
    sizes = {"stored": fill.longest + 1, "shortest": fill.shortest + 1}
    out, missed = attend_stored(query, buffers, index, split, params, uniform=uniform, **sizes)
    if missed is not None and buffers.missed is not None:
        buffers.missed.copy_(missed.detach())
    return out


def append_token(
    query: Tensor | None, key: Tensor, value: Tensor, buffers: DecodeBuffers, index: TokenIndex | None, fill: Fill
) -> None:
    """Append one token to every row that has room, and increment the token counts.

    Args:
        query: [B, H, D] for the query ring, or None to leave the ring unchanged.
        key: [B, Hkv, D].
        value: [B, Hkv, Dv].
        buffers: the layer's buffers; written in place.
        index: the index that scores the stored tokens, or None.
        fill: how full the buffers are.
    """
    keys, values, positions, seq_lens = buffers[:4]
    key, value = key.detach(), value.detach()
    slot, seen = fill.longest, fill.seen
    if buffers.query_ring is not None and query is not None:
        ring = buffers.query_ring
        if seen is None:
            ring.index_copy_(2, _clock(buffers).long() % ring.shape[2], query.detach()[:, :, None].to(ring.dtype))
        else:
            ring.select(2, seen % ring.shape[2]).copy_(query.detach())
    uniform_slot = slot if seen is not None and slot == fill.shortest else None
    if uniform_slot is not None and seen is not None:
        keys.select(2, slot).copy_(key)
        values.select(2, slot).copy_(value)
        positions.select(2, slot).fill_(seen)
        seq_lens.fill_(slot + 1)
        if buffers.value_sum is not None:
            buffers.value_sum.add_(summable(value))
    else:
        _append_ragged(key, value, buffers, _clock(buffers) if seen is None else seen)
    if seen is None:
        _clock(buffers).add_(1)
    elif buffers.clock is not None:
        buffers.clock.fill_(seen + 1)
    if index is not None:
        index.append(buffers.index_tensors, keys, seq_lens, uniform_slot)


def _append_ragged(key: Tensor, value: Tensor, buffers: DecodeBuffers, position: Tensor | int) -> None:
    """Append a token of sequence position `position` behind each row's last one; a full row does not change."""
    keys, values, positions, seq_lens = buffers[:4]
    capacity = keys.shape[2]
    room = (seq_lens < capacity)[..., None]
    slot = seq_lens.long().clamp(max=capacity - 1)[..., None]
    for buffer, new in ((keys, key), (values, value)):
        place = slot[..., None].expand(-1, -1, 1, buffer.shape[3])
        kept = buffer.gather(2, place)
        buffer.scatter_(2, place, torch.where(room[..., None], new.to(buffer.dtype)[:, :, None], kept))
    positions.scatter_(2, slot, torch.where(room, position, positions.gather(2, slot)))
    if buffers.value_sum is not None:
        buffers.value_sum.add_(torch.where(room, summable(value), 0))
    seq_lens.add_(1).clamp_(max=capacity)


def _clock(buffers: DecodeBuffers) -> Tensor:
    if buffers.clock is None:
        raise ValueError("a step whose token count only the device knows needs a clock")
    return buffers.clock


def attend_stored(
    query: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    *,
    stored: int,
    shortest: int,
    uniform: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend to all stored tokens if they are within the budget, or else to those that stage 2 selects.

    Of a verify step of n queries (`rocketkv.core.verify`), `buffers` has one entry for each query where a decode step
    has one: `seq_lens` [B, n Hkv], `value_sum` [B, n Hkv, Dv], `residual_bias` [B, n H].

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step.
        buffers: the layer's buffers, which include the queries' tokens.
        index: the index that scores the stored tokens, or None.
        split: the tokens that the step may read.
        params: the model's attention parameters, with one learned sink per query.
        stored: N, tokens that the query with the most tokens sees.
        shortest: at most the tokens that any query sees.
        uniform: whether every query sees N tokens.

    Returns:
        [B, H, Dv] in the query's dtype; and the missed mass [B, H] float32 if the step selects and has a residual, else
        None.
    """
    lengths = None if uniform else buffers.seq_lens
    if split.top_k is None or stored <= split.token_budget:
        keys, values = buffers.keys[:, :, :stored], buffers.values[:, :, :stored]
        mask = None if lengths is None else torch.arange(stored, device=keys.device) < lengths[..., None]
        return attend(query, keys, values, params, mask=mask), None
    sizes = {"stored": stored, "shortest": shortest}
    return attend_selected(query, buffers, index, split, params, lengths=lengths, **sizes)


def selected_slots(
    query: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    *,
    stored: int,
    shortest: int,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Select the slots to attend to: the k of largest estimated weight, or without an index the first and latest ones.

    A query that sees at most t tokens selects all of them.

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step; see `attend_stored`.
        buffers: the layer's buffers, which include the queries' tokens.
        index: the index that scores the stored tokens, or None.
        split: the tokens that the step may read.
        params: the model's attention parameters, with one learned sink per query.
        stored: N, tokens that the query with the most tokens sees.
        shortest: at most the tokens that any query sees.
        lengths: `buffers.seq_lens`, or None if every query sees N tokens.

    Returns:
        Slots [B, Hkv, k or t]; a mask of that shape, False at slots that do not count, or None if all count; and the
        estimated logits [B, H, units] float32, or None without an index.
    """
    read, logits, mask = min(split.top_k or stored, stored), None, None
    if index is None:
        slots = recent_slots(buffers.seq_lens, read, split.sinks or 0)
    else:
        with full_precision(query.device):
            logits = index.score(query, buffers.index_tensors, buffers.keys, params, stored=stored, lengths=lengths)
            slots, _ = select(
                logits,
                read,
                stored=stored,
                lengths=lengths,
                kv_heads=buffers.seq_lens.shape[1],
                unit_size=split.page_size,
                sinks=params.sinks,
                protected=split.protected,
                by_largest=split.by_largest,
                ordered=False,
            )
    if lengths is not None and shortest <= split.token_budget:
        slots, mask = all_where_short(slots, buffers.seq_lens, split.token_budget)
    return slots, mask, logits


def attend_selected(
    query: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    *,
    stored: int,
    shortest: int,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the slots of `selected_slots`, and add the residual if the split has one.

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step; see `attend_stored`.
        buffers: the layer's buffers, which include the queries' tokens.
        index: the index that scores the stored tokens, or None.
        split: the tokens that the step may read.
        params: the model's attention parameters, with one learned sink per query.
        stored: N, tokens that the query with the most tokens sees.
        shortest: at most the tokens that any query sees.
        lengths: `buffers.seq_lens`, or None if every query sees N tokens.

    Returns:
        [B, H, Dv] in the query's dtype; and the missed mass [B, H] float32 with a residual, else None.
    """
    keys, values, value_sum = buffers.keys, buffers.values, buffers.value_sum
    sizes = {"stored": stored, "shortest": shortest}
    positions, mask, logits = selected_slots(query, buffers, index, split, params, lengths=lengths, **sizes)
    if value_sum is None or logits is None:
        return attend(query, keys, values, params, positions, mask=mask), None
    if mask is not None:
        positions = torch.where(mask, positions, stored)  # `residual_attend` ignores positions beyond a row's length
    if split.page_size > 1:
        logits = logits.repeat_interleave(split.page_size, dim=-1)[..., :stored]
    with full_precision(query.device):
        return residual_attend(
            query,
            keys,
            values,
            positions,
            logits,
            value_sum,
            params,
            bias=buffers.residual_bias,
            lengths=lengths,
            filled=mask is None and shortest >= min(split.top_k or stored, stored),
        )


def recent_slots(lengths: Tensor, k: int, sinks: int) -> Tensor:
    """Return the slots [B, Hkv, k] of each row's first `sinks` tokens and its most recent `k - sinks`.

    Args:
        lengths: [B, Hkv] int32, tokens of each row; for a row of fewer than k, slots without a token fill up.
        k: number of slots.
        sinks: number of sink tokens among them.
    """
    slot = torch.arange(k, device=lengths.device)
    return torch.where(slot < sinks, slot, slot + (lengths.long()[..., None] - k).clamp(min=0))


def all_where_short(positions: Tensor, lengths: Tensor, token_budget: int) -> tuple[Tensor, Tensor]:
    """Select all tokens in rows of at most t tokens, and keep the selection in all others.

    Args:
        positions: [B, Hkv, k], the selection, k <= t.
        lengths: [B, Hkv] int32.
        token_budget: t.

    Returns:
        Positions [B, Hkv, t], and a mask [B, Hkv, t] bool, True at positions that count.
    """
    slot = torch.arange(token_budget, device=lengths.device)
    short = (lengths <= token_budget)[..., None]
    selected = torch.nn.functional.pad(positions, (0, token_budget - positions.shape[-1]))
    number = torch.where(short, lengths[..., None], positions.shape[-1])
    return torch.where(short, slot, selected), slot < number
