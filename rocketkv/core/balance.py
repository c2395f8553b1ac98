"""The parts of a sketch that stay fixed after it is built: the mean key, and a factor for each channel.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, W observation window.
"""

import torch
from torch import Tensor

from .scratch import block_length


def mean_key(keys: Tensor, tokens: int, lengths: Tensor | None = None) -> Tensor:
    """Return the mean key of each row and KV head, [B, Hkv, D] float32; zeros where a row has no token.

    Args:
        keys: [B, Hkv, N, D], the buffer of stored keys.
        tokens: slots that the longest row fills.
        lengths: [B, Hkv], tokens of each row, or None if all rows have `tokens`.
    """
    if lengths is None:
        return keys[:, :, :tokens].sum(2, dtype=torch.float32) / max(tokens, 1)
    filled = torch.arange(tokens, device=keys.device) < lengths[..., None]
    total = torch.where(filled[..., None], keys[:, :, :tokens], 0).sum(2, dtype=torch.float32)
    return total / lengths[..., None].clamp(min=1)


def channel_balance(queries: Tensor, keys: Tensor, mean: Tensor, tokens: int, lengths: Tensor | None = None) -> Tensor:
    """Return the factors of the channels that give logits the least expected squared error.

    The rounding error of a rotated difference is the same in every channel, in proportion to the difference's length.
    With factors w, a logit's expected squared error is proportional to sum_c (w_c k_c)^2 * sum_c (q_c / w_c)^2, which
    is least for w_c = sqrt(q_c / k_c), where q_c and k_c are root mean squares. No host sync.

    Args:
        queries: [B, H, W, D], the queries of the observation window, which stand for those of later steps; zeros at
            padding.
        keys: [B, Hkv, N, D], the buffer of stored keys.
        mean: [B, Hkv, D] float32, of `mean_key`.
        tokens: slots that the longest row fills.
        lengths: [B, Hkv], tokens of each row, or None if all rows have `tokens`.

    Returns:
        [B, Hkv, D] bfloat16, 1 to 2^16; all 1 if queries or keys are not finite, if all queries are zero, or if all
        keys are equal.
    """
    batch, kv_heads, _, head_dim = keys.shape
    asked = queries.float().square().reshape(batch, kv_heads, -1, head_dim).sum(2)
    spreads = []
    block = block_length(keys.device, 4 * batch * kv_heads * head_dim)
    empty = None if lengths is None else torch.arange(tokens, device=keys.device) >= lengths[..., None]
    for start in range(0, max(tokens, 1), block):
        part = slice(start, min(start + block, tokens))
        difference = keys[:, :, part].float() - mean[:, :, None]
        if empty is not None:
            difference.masked_fill_(empty[:, :, part, None], 0)
        spreads.append(difference.square_().sum(2))
    # Channels whose queries are zero, or whose keys are equal, count as very small ones.
    both = torch.stack((asked, sum(spreads[1:], spreads[0])))
    asked, spread = both.clamp_(min=2**-32 * both.amax(-1, keepdim=True))
    balance = (asked / spread).sqrt_().sqrt_()
    least, largest = balance.aminmax(dim=-1, keepdim=True)
    # Not if one is zero, infinite or NaN.
    balance.masked_fill_((largest / least < torch.inf).logical_not_(), 1.0)
    # At least 1, so that queries do not overflow when they are divided. A power of two leaves the mantissas unchanged.
    _, exponent = torch.frexp(balance.amin(-1, keepdim=True))
    return torch.ldexp(balance, 1 - exponent).clamp(max=2.0**16).to(torch.bfloat16)
