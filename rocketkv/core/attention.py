"""Exact attention of one decode or verify step, over all stored tokens or the selected ones.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, N stored tokens, k selected tokens, M
selections of a row: Hkv in a decode step, n Hkv in a verify step of n queries (`rocketkv.core.verify`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .params import AttentionParams
from .topk import full_precision, gather_tokens


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    params: AttentionParams,
    positions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend exactly from one query per head to selected tokens.

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step.
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        params: the model's attention parameters, with one learned sink per query.
        positions: [B, M, k] (an integer dtype), the tokens to attend to, or None for all N.
        mask: [B, M, k or N] bool, False at tokens to leave out, or None. A query without tokens returns zeros.

    Returns:
        [B, H, Dv], or [B, n H, Dv], in the query's dtype.
    """
    batch, heads, _ = query.shape
    if positions is not None:
        keys, values = gather_tokens(positions, keys, values)
    kv_heads = keys.shape[1]
    rows = query.view(batch, kv_heads, heads // kv_heads, -1)
    over_group = None if mask is None else _over_group(mask, rows)
    if params.softcap is None and params.sinks is None:
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=over_group, scale=params.scaling)
    else:
        per_row = None if params.sinks is None else params.sinks.view(1, kv_heads, -1)
        out = softmax_attention(rows, keys, values, params._replace(sinks=per_row), mask=over_group)
    if mask is not None:
        out = out.masked_fill(_over_group(~mask.any(-1, keepdim=True), rows), 0)
    return out.reshape(batch, heads, -1)


def _over_group(mask: Tensor, rows: Tensor) -> Tensor:
    """Repeat a mask [B, M, N] for the queries of each selection, which are rows [B, Hkv, R, D]: [B, Hkv, R, N]."""
    batch, kv_heads, count, _ = rows.shape
    group = kv_heads * count // mask.shape[1]
    return mask.view(batch, kv_heads, -1, 1, mask.shape[2]).expand(-1, -1, -1, group, -1).flatten(2, 3)


def softmax_attention(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    params: AttentionParams,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax attention in float32, also under autocast; unlike SDPA, with a soft-cap or learned sinks.

    Args:
        rows: [B, Hkv, R, D], queries; the heads of a group are rows over their KV head.
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        params: the model's attention parameters; here `sinks` broadcasts to [B, Hkv, R], the learned sink of each row.
        mask: broadcastable to [B, Hkv, R, N] bool, False at pairs to leave out, or None.
        dropout: probability of dropping a weight.

    Returns:
        [B, Hkv, R, Dv] in the rows' dtype.
    """
    with full_precision(rows.device):
        logits = torch.matmul(rows.float() * params.scaling, keys.float().transpose(-1, -2))
        if params.softcap is not None:
            logits = torch.tanh(logits / params.softcap) * params.softcap
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if params.sinks is not None:
            sink = params.sinks.float()[..., None]
            peak = torch.maximum(logits.amax(-1, keepdim=True), sink)
            weight = torch.exp(logits - peak)
            weight = weight / (weight.sum(-1, keepdim=True) + torch.exp(sink - peak))
        else:
            weight = logits.softmax(-1)
        if dropout:
            weight = F.dropout(weight, dropout)
        return torch.matmul(weight, values.float()).to(rows.dtype)
