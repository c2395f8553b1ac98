"""Compact the kept keys and values of a prompt into new buffers and build their page index.

Letters: B batch, Hkv KV heads, D head dim, S tokens of the prompt, P page size.
"""

import torch
from torch import Tensor

from .pages import build_pages
from .topk import gather_tokens


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
def compact(
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    valid: Tensor | None,
    positions: Tensor | None,
    count: int,
    capacity: int,
    page_size: int | None,
    index_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gather the kept tokens of each row at the front of new buffers, and build their page index.

    Args:
        keys: [B, Hkv, S, D], keys of the prompt.
        values: [B, Hkv, S, Dv].
        slots: [B, Hkv, chosen] integers, the kept slots in their new order, or None for the first `count`.
        valid: [B, 1 or Hkv, S] bool, False at slots without a token, or None if every slot has one.
        positions: [B, 1 or Hkv, S or more] int32, each slot's position in the sequence, or None if they are equal.
        count: tokens that the longest row keeps.
        capacity: slots of the new buffers, at least `count`.
        page_size: P, or None to build no page index.
        index_dtype: dtype of the page bounds, or None for the dtype of the keys.

    Returns:
        keys: [B, Hkv, capacity, D], zero from `count` on.
        values: [B, Hkv, capacity, Dv], zero from `count` on.
        positions: [B, Hkv, capacity] int32, -1 behind a row's tokens.
        seq_lens: [B, Hkv] int32.
        bounds: [B, Hkv, tiles, D or 2D, 128], the page index, or None.
    """
    rows, stored = keys.shape[:2], keys.shape[2]
    new_positions = torch.full((*rows, capacity), -1, dtype=torch.int32, device=keys.device)
    if slots is None:
        found = torch.arange(stored, device=keys.device) if positions is None else positions
        new_positions[:, :, :count] = found[..., :count]
        lengths = new_positions.new_full(rows, count)
    else:
        if valid is not None:
            # Chosen padding moves behind the tokens.
            chosen = valid.expand(*rows, -1).gather(2, slots)
            order = (~chosen).byte().argsort(dim=-1, stable=True)[..., :count]
            slots, chosen = slots.gather(2, order), chosen.gather(2, order)
            slots = torch.where(chosen, slots, stored - 1)
        else:
            chosen = torch.ones_like(slots, dtype=torch.bool)
        source = slots if positions is None else positions.expand(*rows, -1).gather(2, slots)
        new_positions[:, :, :count] = torch.where(chosen, source, -1)
        lengths = chosen.sum(-1, dtype=torch.int32)
        keys, values = gather_tokens(slots, keys, values)
    # Slots without a token are zero, not garbage: a masked weight of zero times NaN would be NaN.
    new_keys, new_values = (tokens.new_empty(*rows, capacity, tokens.shape[3]) for tokens in (keys, values))
    for buffer, tokens in ((new_keys, keys), (new_values, values)):
        buffer[:, :, :count] = tokens
        buffer[:, :, count:] = 0
    index = None if page_size is None else build_pages(new_keys, count, page_size, index_dtype)
    return new_keys, new_values, new_positions, lengths, index
