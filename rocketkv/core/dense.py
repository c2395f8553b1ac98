"""Exact attention of many queries, by blocks of rows, for what a model's own kernel takes no mask for.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, n queries, S keys.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import softmax_attention
from .masks import VisibleBlock

# A block's mask, one byte for each query row and key, stays under this; so do, where a soft-cap or sinks need our own
# softmax, its logits and their copies, 16 bytes together for each query row and key.
BLOCK_BYTES = 16 * 2**20


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[int, int], VisibleBlock],
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    mask_heads: int = 1,
) -> Tensor:
    """Attend from n queries to S keys under a mask that is evaluated a block of rows at a time.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        visible: (start, stop) to what those queries see, with a mask that broadcasts to [B, Hkv, stop - start, keys].
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [H], one learned logit a head that joins the softmax's denominator, or None.
        dropout: probability of dropping a weight.
        mask_heads: 1, or Hkv where the masks differ between KV heads; it sizes the blocks.

    Returns:
        [B, n, H, Dv] in the query's dtype. A query that sees nothing gives zeros.
    """
    batch, heads, length, _ = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    own = softcap is not None or sinks is not None
    if own and kv_heads > 1:
        # One KV head at a time: its keys and values are turned to float32 once, and a block has more rows.
        def one(head: int) -> Tensor:
            def seen(start: int, stop: int) -> VisibleBlock:
                block = visible(start, stop)
                if block.mask is None or block.mask.shape[1] == 1:
                    return block
                return replace(block, mask=block.mask[:, head : head + 1])

            heads_of_group = slice(head * group, (head + 1) * group)
            return dense_attention(
                query[:, heads_of_group],
                key[:, head : head + 1].float(),
                value[:, head : head + 1].float(),
                seen,
                scaling=scaling,
                softcap=softcap,
                sinks=None if sinks is None else sinks[heads_of_group],
                dropout=dropout,
            )

        return torch.cat([one(head) for head in range(kv_heads)], dim=2)
    bytes_a_query = batch * size * (16 * heads if own else group * mask_heads)
    block = max(1, min(length, BLOCK_BYTES // bytes_a_query))
    out = query.new_empty(batch, length, heads, value.shape[-1])
    for start in range(0, length, block):
        stop = min(start + block, length)
        count = stop - start
        seen = visible(start, stop)
        # The heads of a group are rows over one KV head: [B, Hkv, G * count, D].
        rows = query[:, :, start:stop].reshape(batch, kv_heads, group * count, -1)
        keys, values = key[:, :, seen.start : seen.stop], value[:, :, seen.start : seen.stop]
        # Layers of one model may be on several devices, and share one mask.
        mask = None if seen.mask is None else seen.mask.to(query.device).repeat(1, 1, group, 1)
        blind = None if mask is None else ~mask.any(-1, keepdim=True)
        if mask is not None and blind is not None:
            mask |= blind  # a softmax over nothing is NaN, and so would be the gradients behind the zeros below
        if own:
            per_row = None if sinks is None else sinks.view(1, kv_heads, group).repeat_interleave(count, dim=-1)
            part = softmax_attention(
                rows, keys, values, scaling=scaling, mask=mask, softcap=softcap, sinks=per_row, dropout=dropout
            )
        else:
            part = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling)
        if blind is not None:
            part = part.masked_fill(blind, 0)
        out[:, start:stop] = part.view(batch, heads, count, -1).transpose(1, 2)
    return out
