"""Attention of a prompt's tokens to everything that a store holds and, causally, to themselves.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n tokens of a forward, N stored tokens.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.dense import dense_attention
from ..core.masks import LazyMask, VisibleBlock, causal_block
from ..state.store import KVStore

# The model's own fast attention for causal queries at the end of the keys, (query, key, value, padding) to
# [B, n, H, Dv]; None where it cannot do the shape.
FastAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]


def attend_prompt(
    store: KVStore, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask | None, fast: FastAttention, **exact: Any
) -> Tensor:
    """Attend from the last n tokens of a prompt, which the store holds already.

    Args:
        store: a prompt, not closed.
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, n, D], the same tokens'.
        value: [B, Hkv, n, Dv].
        mask: the model's mask, or None where it has none: causal.
        fast: the model's own attention for plain causal prompts.
        **exact: scaling, softcap and sinks, as `dense_attention` takes them.

    Returns:
        [B, n, H, Dv].

    Raises:
        ValueError: there are no tokens, or padding and no mask that says where.
    """
    length = query.shape[2]
    stored = store.stored
    if stored == length:
        keys, values = key, value  # gradients flow through them, not through what is stored
    elif store.keys is not None and store.values is not None:
        keys, values = store.keys[:, :, :stored], store.values[:, :, :stored]
    else:
        raise ValueError("the store has no tokens")
    holes = store.valid() is not None
    causal = mask is None or mask.causal
    if store.aligned and causal:
        padding = mask.padding if mask is not None and mask.padded else None
        if padding is not None or not holes:
            out = fast(query, keys, values, None if padding is None else padding.to(key.device))
            if out is not None:
                return out
    offset = stored - length

    def visible(first: int, last: int) -> VisibleBlock:
        if mask is not None and store.aligned:
            return mask.block(first, last, stored)
        if causal and not holes:
            return causal_block(first, last, offset, query.device)
        if mask is None or store.positions is None:
            raise ValueError("a batch with padding needs its attention_mask in every prompt")
        return VisibleBlock(0, stored, mask.block_at(first, last, store.positions[:, :, :stored]))

    mask_heads = 1 if store.aligned or (causal and not holes) else keys.shape[1]
    return dense_attention(query, keys, values, visible, mask_heads=mask_heads, **exact)
