"""Causal attention of the observation window, by blocks of keys: few queries, many keys.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv value dim, S tokens, W window queries.
"""

import torch
from torch import Tensor

from .params import AttentionParams
from .scratch import block_length


@torch.no_grad()  # a model's learned sinks are parameters
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, valid: Tensor | None = None
) -> Tensor:
    """Attend causally from the last W of S tokens to all of them, in float32.

    Softmax with a running maximum over blocks of keys: scratch memory does not grow with S. No host sync.

    Args:
        query: [B, H, W, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.

    Returns:
        [B, W, H, Dv] float32; zeros for a query that sees no token.
    """
    batch, heads, window, head_dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    rows = query.float().reshape(batch, kv_heads, -1, head_dim) * params.scaling
    query_slot = torch.arange(size - window, size, device=key.device).repeat(heads // kv_heads)[:, None]
    lowest = torch.finfo(torch.float32).min  # a finite maximum keeps the exponentials of unseen tokens at zero
    peak = rows.new_full((*rows.shape[:3], 1), lowest)
    if params.sinks is not None:
        peak[:] = params.sinks.float().repeat_interleave(window).view(kv_heads, -1, 1)
    mass = torch.zeros_like(peak) if params.sinks is None else torch.ones_like(peak)
    out = rows.new_zeros(*rows.shape[:3], value.shape[3])
    block = max(window, block_length(key.device, 4 * batch * heads * window))
    for start in range(0, size, block):
        stop = min(start + block, size)
        logits = rows @ key[:, :, start:stop].float().transpose(-1, -2)
        if params.softcap is not None:
            logits.div_(params.softcap).tanh_().mul_(params.softcap)
        if stop > size - window:
            logits.masked_fill_(torch.arange(start, stop, device=key.device) > query_slot, -torch.inf)
        if valid is not None:
            logits.masked_fill_(~valid[:, :, None, start:stop], -torch.inf)
        higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
        shrunk = (peak - higher).exp_()
        weights = logits.sub_(higher).exp_()
        mass = mass.mul_(shrunk).add_(weights.sum(-1, keepdim=True))
        values = value[:, :, start:stop].float()
        if valid is not None:
            values = values.masked_fill(~valid[:, :, start:stop, None], 0)  # values at padding are arbitrary
        out = out.mul_(shrunk).add_(weights @ values)
        peak = higher
    out = torch.where(mass == 0, 0, out / mass)
    return out.view(batch, heads, window, -1).transpose(1, 2)
