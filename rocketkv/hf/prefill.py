"""Attention of a prompt's tokens to all stored tokens and, causally, to themselves.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n tokens of a forward, N stored tokens.
"""

from collections.abc import Callable

from torch import Tensor

from ..core.dense import VisibleBlock, causal_block, dense_attention
from ..core.params import AttentionParams
from ..state.store import KVStore
from .masks import LazyMask

# The model's own attention for causal queries at the end of the keys: maps (query, key, value, padding) to
# [B, n, H, Dv], or to None if it does not support the shapes.
FastAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]


def attend_prompt(
    store: KVStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask | None,
    fast: FastAttention,
    params: AttentionParams,
) -> Tensor:
    """Attend from the last n tokens of a prompt, which are already in the store.

    Args:
        store: the layer's store, with an open prompt.
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, n, D], keys of the same tokens.
        value: [B, Hkv, n, Dv].
        mask: the model's mask, or None for a causal one.
        fast: the model's own attention for plain causal prompts.
        params: the model's attention parameters.

    Returns:
        [B, n, H, Dv].

    Raises:
        ValueError: the store has no prompt, or there is padding and no mask.
    """
    prompt, length, stored = store.prompt, query.shape[2], store.stored
    keys, values = prompt.keys[:, :, :stored], prompt.values[:, :, :stored]
    if stored == length:
        keys, values = key, value  # gradients flow through them, not through stored copies
    holes = prompt.valid(stored) is not None
    causal = mask is None or mask.causal
    if prompt.aligned and causal:
        padding = mask.padding if mask is not None and mask.padded else None
        if padding is not None or not holes:
            out = fast(query, keys, values, None if padding is None else padding.to(key.device))
            if out is not None:
                return out
    offset = stored - length

    def visible(first: int, last: int) -> VisibleBlock:
        if mask is not None and prompt.aligned:
            return mask.block(first, last, stored)
        if causal and not holes:
            return causal_block(first, last, offset, query.device)
        if mask is None or prompt.positions is None:
            raise ValueError("a batch with padding needs its attention_mask in every prompt")
        return VisibleBlock(0, stored, mask.block_at(first, last, prompt.positions[:, :, :stored]))

    mask_heads = 1 if prompt.aligned or (causal and not holes) else keys.shape[1]
    return dense_attention(query, keys, values, params, visible, mask_heads=mask_heads)
