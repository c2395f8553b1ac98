"""The verify step in PyTorch: n drafted tokens are appended, and each of their queries attends, in one pass.

Equal to n decode steps (`rocketkv.core.decode`), apart from the rounding of sums. Query i of a row that stored L tokens
before the step sees its first L + i + 1 tokens, has its own selection among them and, with a residual, its own sum of
values. The core's functions see the n queries of a KV head as n KV heads with the same keys and values: the heads of a
verify step are ordered by KV head, then by query, then by head of the group. A selection reads pages that are full for
its query from the index, and the bounds of the page that is open for its query from the keys. So the draft's later
tokens, which the index already includes, do not matter.

The number of operators does not depend on n, unless the queries need more than one block of scratch memory.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim of keys, Dv of values, N stored tokens, n tokens of
the draft, W query ring, t token budget.
"""

import torch
from torch import Tensor

from ..budget import BudgetSplit
from .decode import DecodeBuffers, Fill, attend_stored
from .params import AttentionParams
from .residual import summable
from .token_index import TokenIndex

# Approximate upper bound for the gathered keys and values, and the weights, of a block of queries.
BLOCK_BYTES = 64 * 2**20


def verify_step_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    fill: Fill,
) -> Tensor:
    """Append n tokens to every row and attend from each to the tokens that stage 2 selects for it.

    Args:
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, n, D], after rotary embedding.
        value: [B, Hkv, n, Dv].
        buffers: the layer's buffers, with room for n tokens in every row; written in place.
        index: the index that scores the stored tokens, or None.
        split: the tokens and bytes that each query may read.
        params: the model's attention parameters.
        fill: how full the buffers are; the host knows all of it.

    Returns:
        [B, n, H, Dv] in the query's dtype.
    """
    value_sum = append_tokens(query, key, value, buffers, index, fill)
    return attend_drafted(query, buffers, value_sum, index, split, params, fill)


def attend_drafted(
    query: Tensor,
    buffers: DecodeBuffers,
    value_sum: Tensor | None,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
    fill: Fill,
) -> Tensor:
    """Attend from each token of a draft that has been appended; see `verify_step_torch`.

    Args:
        query: [B, H, n, D].
        buffers: the layer's buffers, which include the draft; its missed mass is written.
        value_sum: returned by `append_tokens`.
        index: the index that scores the stored tokens, or None.
        split: the tokens and bytes that each query may read.
        params: the model's attention parameters.
        fill: how full the buffers were before the draft.

    Returns:
        [B, n, H, Dv] in the query's dtype.
    """
    count, block = query.shape[2], _block_queries(query, buffers, split, fill)
    parts = []
    for first in range(0, count, block):
        last = min(first + block, count)
        own, own_params = of_queries(first, last, count, buffers, value_sum, params)
        rows = by_kv_head(query[:, :, first:last], buffers)
        sizes = {"stored": fill.longest + last, "shortest": fill.shortest + first + 1}
        out, missed = attend_stored(rows, own, index, split, own_params, uniform=False, **sizes)
        parts.append(by_query(out, buffers, last - first))
        if missed is not None and buffers.missed is not None and last == count:
            buffers.missed.copy_(by_query(missed.detach()[..., None], buffers, last - first)[:, -1, :, 0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _block_queries(query: Tensor, buffers: DecodeBuffers, split: BudgetSplit, fill: Fill) -> int:
    """Return the number of queries in a block."""
    batch, kv_heads, _, head_dim = buffers.keys.shape
    read = min(split.token_budget, fill.longest) * kv_heads * (head_dim + buffers.values.shape[3])
    return max(1, BLOCK_BYTES // (4 * batch * (read + 4 * query.shape[1] * fill.longest)))


def by_kv_head(query: Tensor, buffers: DecodeBuffers) -> Tensor:
    """Return queries [B, H, n, D] as [B, n H, D], ordered by KV head, then by query, then by head of the group."""
    batch, _, count, head_dim = query.shape
    grouped = query.reshape(batch, buffers.keys.shape[1], -1, count, head_dim)
    return grouped.transpose(2, 3).reshape(batch, -1, head_dim)


def by_query(out: Tensor, buffers: DecodeBuffers, count: int) -> Tensor:
    """Return outputs [B, n H, Dv], in the order of `attend_stored`, of n queries as [B, n, H, Dv]."""
    grouped = out.view(len(out), buffers.keys.shape[1], count, -1, out.shape[2])
    return grouped.transpose(1, 2).flatten(2, 3)


def of_queries(
    first: int, last: int, count: int, buffers: DecodeBuffers, value_sum: Tensor | None, params: AttentionParams
) -> tuple[DecodeBuffers, AttentionParams]:
    """Return buffers and parameters for `attend_stored`, with one entry for each query from `first` to `last` of n.

    Args:
        first: the first query.
        last: the query behind the last one.
        count: n, queries of the draft.
        buffers: the layer's buffers, which include the draft.
        value_sum: [B, Hkv, n, Dv], the sum of the values that each query sees; None without a residual.
        params: the model's attention parameters.
    """
    batch, kv_heads = buffers.seq_lens.shape
    back = torch.arange(first + 1 - count, last + 1 - count, dtype=torch.int32, device=buffers.keys.device)
    bias, sinks = buffers.residual_bias, params.sinks
    if bias is not None:
        bias = bias.view(batch, kv_heads, 1, -1).expand(-1, -1, last - first, -1).reshape(batch, -1)
    if sinks is not None:
        sinks = sinks.view(kv_heads, 1, -1).expand(-1, last - first, -1).reshape(-1)
    own = buffers._replace(
        seq_lens=(buffers.seq_lens[..., None] + back).flatten(1),
        value_sum=None if value_sum is None else value_sum[:, :, first:last].flatten(1, 2),
        residual_bias=bias,
    )
    return own, params._replace(sinks=sinks)


def append_tokens(
    query: Tensor, key: Tensor, value: Tensor, buffers: DecodeBuffers, index: TokenIndex | None, fill: Fill
) -> Tensor | None:
    """Append n tokens to every row, and increase the token counts.

    Args:
        query: [B, H, n, D], for the query ring.
        key: [B, Hkv, n, D].
        value: [B, Hkv, n, Dv].
        buffers: the layer's buffers; written in place.
        index: the index that scores the stored tokens, or None.
        fill: how full the buffers are.

    Returns:
        [B, Hkv, n, Dv] float64, the sum of the values that each query sees; None without a residual.

    Raises:
        ValueError: a row has no room, or only the device knows the token counts.
    """
    keys, values, positions, seq_lens = buffers[:4]
    key, value = key.detach(), value.detach()
    slot, seen, count = fill.longest, fill.seen, key.shape[2]
    if seen is None or slot + count > keys.shape[2]:
        raise ValueError(
            f"a verify step of {count} tokens needs as many free slots and a token count on the host, got "
            f"{keys.shape[2] - slot} free slots and seen={seen}: use verify_step of rocketkv.verify, which makes room"
        )
    if buffers.query_ring is not None:
        ring = buffers.query_ring
        kept = min(count, ring.shape[2])
        place = torch.arange(seen + count - kept, seen + count, device=ring.device) % ring.shape[2]
        ring.index_copy_(2, place, query.detach()[:, :, count - kept :].to(ring.dtype))
    new = torch.arange(seen, seen + count, dtype=positions.dtype, device=positions.device)
    uniform_slot = slot if slot == fill.shortest else None
    if uniform_slot is not None:
        keys.narrow(2, slot, count).copy_(key)
        values.narrow(2, slot, count).copy_(value)
        positions.narrow(2, slot, count).copy_(new)
        seq_lens.fill_(slot + count)
    else:
        place = seq_lens.long()[..., None] + torch.arange(count, device=keys.device)
        for buffer, tokens in ((keys, key), (values, value)):
            buffer.scatter_(2, place[..., None].expand(-1, -1, -1, buffer.shape[3]), tokens.to(buffer.dtype))
        positions.scatter_(2, place, new.expand_as(place))
        seq_lens.add_(count)
    if buffers.clock is not None:
        buffers.clock.fill_(seen + count)
    if index is not None:
        index.append(buffers.index_tensors, keys, seq_lens, uniform_slot, count)
    if buffers.value_sum is None:
        return None
    sums = buffers.value_sum[:, :, None] + summable(value).cumsum(2)
    buffers.value_sum.copy_(sums[:, :, -1])
    return sums
