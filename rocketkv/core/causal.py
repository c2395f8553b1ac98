"""Causal attention of the last n tokens of a sequence: one fused call, one a padded row, or blocks of rows.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv value dim, n queries, S keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F

from .attention import softmax_attention
from .dense import LOGIT_BYTES, MASK_BYTES, VisibleBlock, dense_attention, row_block_bytes
from .params import AttentionParams

# Rows of a block on a CPU: fewer read the keys more often, more compute products that the mask hides.
CPU_ROWS = 128


def fused(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, window: int | None = None) -> bool:
    """Return whether one call of `scaled_dot_product_attention` is this causal attention, without a mask in memory.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        window: keys that a query sees, itself included, or None for all.
    """
    if not query.is_cuda or window is not None or params.softcap is not None or params.sinks is not None:
        return False
    # The operator below takes no other head dims, and that of AMD may align queries with the first keys.
    if query.shape[2] != key.shape[2] and (torch.version.hip or query.shape[3] % 8):
        return False
    grouped = query.shape[1] != key.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    valid: Tensor | None = None,
    starts: Sequence[int] | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend causally from n queries, the last of S tokens, to all of them.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.
        starts: each row's first token if all padding lies before it, else None. A row then equals the row alone.
        window: keys that a query sees, itself included, or None for all.
        dropout: probability of dropping a weight.

    Returns:
        [B, n, H, Dv] in the query's dtype. A query that sees no key returns zeros. Outputs of padding have no meaning.
    """
    length, size = query.shape[2], key.shape[2]
    if window is not None and window >= size:
        window = None
    # Each row's first token and first query.
    firsts = None if starts is None else [(start, max(0, start - (size - length))) for start in starts]
    if valid is not None and firsts is None:
        firsts = _compacted_firsts(valid, length) if window is None else None
        if firsts is None:
            return _among_padding(query, key, value, params, valid, window, dropout)
        order = valid.byte().argsort(dim=-1, stable=True)[..., None]  # padding first, then the tokens in their order
        key, value = (part.gather(2, order.expand_as(part)) for part in (key, value))
    if firsts is None or not any(start for start, _ in firsts):
        return _attend(query, key, value, params, window, dropout)
    out = query.new_zeros(query.shape[0], length, query.shape[1], value.shape[-1])
    for i, (start, first) in enumerate(firsts):
        row = slice(i, i + 1)
        if first < length:
            tokens = query[row, :, first:], key[row, :, start:], value[row, :, start:]
            out[row, first:] = _attend(*tokens, params, window, dropout)
    return out


def _compacted_firsts(valid: Tensor, length: int) -> list[tuple[int, int]] | None:
    """Return the first token and the first query of rows whose tokens are moved to the end, in their order.

    None if that moves queries, or if KV heads store different numbers of tokens.
    """
    queries = valid[:, :, valid.shape[2] - length :]
    moved = (queries[:, :, :-1] & ~queries[:, :, 1:]).any()
    counts = valid.sum(-1)
    if moved or (counts != counts[:, :1]).any():
        return None
    missing = torch.stack((valid.shape[2] - counts[:, 0], length - queries[:, 0].sum(-1)), 1)
    return [(start, first) for start, first in missing.tolist()]


def _among_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    valid: Tensor,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Attend where padding lies between tokens; returns [B, n, H, Dv]."""
    offset = key.shape[2] - query.shape[2]

    def visible(start: int, stop: int) -> VisibleBlock:
        first = 0 if window is None else max(0, offset + start - window + 1)
        position = torch.arange(start, stop, device=query.device)[:, None] + offset
        token = torch.arange(first, offset + stop, device=query.device)
        seen = token <= position
        if window is not None:
            seen &= token > position - window
        return VisibleBlock(first, offset + stop, seen & valid[:, :, None, first : offset + stop])

    return dense_attention(query, key, value, params, visible, dropout=dropout, mask_heads=valid.shape[1])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, window: int | None, dropout: float
) -> Tensor:
    """Attend without padding; returns [B, n, H, Dv]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if fused(query, key, value, params, window=window):
        return _flash(query, key, value, params.scaling, dropout).transpose(1, 2)
    if (params.softcap is None and params.sinks is None) or kv_heads == 1:
        return _by_blocks(query, key, value, params, window, dropout)
    # One KV head at a time: its keys and values are converted to float32 once, and a block has more rows.
    group, parts = heads // kv_heads, []
    for head in range(kv_heads):
        own, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        sinks = None if params.sinks is None else params.sinks[own]
        tokens = query[:, own], key[:, one].float(), value[:, one].float()
        parts.append(_by_blocks(*tokens, params._replace(sinks=sinks), window, dropout))
    return torch.cat(parts, dim=2)


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Run flash attention on a GPU, with the last query at the last key; returns [B, H, n, Dv]."""
    if query.shape[2] == key.shape[2]:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    # SDPA itself aligns the first query with the first key. `torch.nn.attention.bias.causal_lower_right` makes it call
    # this operator, but is a tensor that allocates 8 bytes on the host for each query and key.
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scaling)[0]
    return out


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, window: int | None, dropout: float
) -> Tensor:
    """Attend by blocks of rows, each over the keys that its rows see; all blocks share one mask."""
    batch, heads, length, _ = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    unfused = params.softcap is not None or params.sinks is not None
    block = CPU_ROWS if query.device.type == "cpu" else length
    if window is not None:
        block = min(block, max(CPU_ROWS, window))
    most = size if window is None else min(size, window - 1 + block)
    bytes_a_row = most * (LOGIT_BYTES * batch * heads if unfused else MASK_BYTES * group)
    block = max(1, min(block, length, row_block_bytes(query.device) // bytes_a_row))
    # A block's last query sees its last key: the mask of the last rows and keys is that of any block.
    width = size if window is None else min(size, window - 1 + block)
    mask = torch.ones(block, width, dtype=torch.bool, device=query.device).tril_(width - block)
    if window is not None:
        mask.triu_(width - block - window + 1)
    mask = mask.repeat(group, 1)  # the heads of a group are rows over one KV head
    out = query.new_empty(batch, length, heads, value.shape[-1])
    for stop in range(length, 0, -block):
        start = max(0, stop - block)
        count, last = stop - start, size - length + stop
        first = max(0, last - width)
        rows = query[:, :, start:stop].reshape(batch, kv_heads, group * count, -1)
        keys, values = key[:, :, first:last], value[:, :, first:last]
        seen = mask[:, width - (last - first) :]
        if count < block:
            seen = seen.view(group, block, -1)[:, block - count :].flatten(0, 1)
        if unfused:
            sinks = params.sinks
            per_row = None if sinks is None else sinks.view(1, kv_heads, group).repeat_interleave(count, dim=-1)
            part = softmax_attention(rows, keys, values, params._replace(sinks=per_row), mask=seen, dropout=dropout)
        else:
            part = F.scaled_dot_product_attention(rows, keys, values, seen, dropout, scale=params.scaling)
        out[:, start:stop] = part.view(batch, heads, count, -1).transpose(1, 2)
    return out
