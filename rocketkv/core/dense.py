"""Exact attention of many queries in blocks of rows, under a mask that is evaluated a block at a time.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, n queries, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import softmax_attention
from .params import AttentionParams

# Upper bound on a CPU for a block's mask and its float copy, `MASK_BYTES` per query row and key; and, with a soft-cap
# or learned sinks, for its logits and their copies in `softmax_attention`, `LOGIT_BYTES` per query row and key.
BLOCK_BYTES = 16 * 2**20
MASK_BYTES, LOGIT_BYTES = 5, 16


def row_block_bytes(device: torch.device) -> int:
    """Return the bytes of a block: about a CPU's cache, or a fixed part of a GPU's memory, where launches cost more."""
    if device.type != "cuda":
        return BLOCK_BYTES
    return max(BLOCK_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)


@dataclass(frozen=True)
class VisibleBlock:
    """The keys that a block of queries may see: from `start` to `stop`, where `mask` is True (None: all of them)."""

    start: int
    stop: int
    mask: Tensor | None


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    visible: Callable[[int, int], VisibleBlock],
    *,
    dropout: float = 0.0,
    mask_heads: int = 1,
) -> Tensor:
    """Attend from n queries to S keys under a mask that is evaluated a block of rows at a time.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        visible: maps (start, stop) to the keys that those queries see; its mask broadcasts to
            [B, Hkv, stop - start, keys].
        dropout: probability of dropping a weight.
        mask_heads: 1, or Hkv if the masks differ between KV heads; it determines the block size.

    Returns:
        [B, n, H, Dv] in the query's dtype. A query that sees no key returns zeros.
    """
    batch, heads, length, _ = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    unfused = params.softcap is not None or params.sinks is not None
    if unfused and kv_heads > 1:
        # One KV head at a time: its keys and values are converted to float32 once, and a block has more rows.
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
                params._replace(sinks=None if params.sinks is None else params.sinks[heads_of_group]),
                seen,
                dropout=dropout,
            )

        return torch.cat([one(head) for head in range(kv_heads)], dim=2)
    bytes_a_query = batch * size * (LOGIT_BYTES * heads if unfused else MASK_BYTES * group * mask_heads)
    block = max(1, min(length, row_block_bytes(query.device) // bytes_a_query))
    out = query.new_empty(batch, length, heads, value.shape[-1])
    for start in range(0, length, block):
        stop = min(start + block, length)
        count = stop - start
        seen = visible(start, stop)
        # The heads of a group are rows over one KV head: [B, Hkv, G * count, D].
        rows = query[:, :, start:stop].reshape(batch, kv_heads, group * count, -1)
        keys, values = key[:, :, seen.start : seen.stop], value[:, :, seen.start : seen.stop]
        # Layers on several devices share one mask.
        mask = None if seen.mask is None else seen.mask.to(query.device).repeat(1, 1, group, 1)
        blind = None if mask is None else ~mask.any(-1, keepdim=True)
        if mask is not None and blind is not None:
            mask |= blind  # a softmax over no key is NaN, and its gradient stays NaN behind the zeros below
        if unfused:
            sinks = params.sinks
            per_row = None if sinks is None else sinks.view(1, kv_heads, group).repeat_interleave(count, dim=-1)
            part = softmax_attention(rows, keys, values, params._replace(sinks=per_row), mask=mask, dropout=dropout)
        else:
            part = F.scaled_dot_product_attention(
                rows, keys, values, attn_mask=mask, dropout_p=dropout, scale=params.scaling
            )
        if blind is not None:
            part = part.masked_fill(blind, 0)
        out[:, start:stop] = part.view(batch, heads, count, -1).transpose(1, 2)
    return out
