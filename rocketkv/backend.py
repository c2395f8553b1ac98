"""The whole decode step behind one function, and the one place that decides which implementation runs it.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, t token budget, k tokens read.
"""

from typing import Any

import torch
from torch import Tensor

from .attention import attend, score, select
from .eviction import full_precision
from .store import KVStore


def backend_name(device: torch.device) -> str:
    """Return the implementation that runs decode steps on a device: `torch`, the reference, on every one so far."""
    return "torch"


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append one token to the store and attend to what stage 2 selects; the token itself competes like any other.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], likewise.
        value: [B, Hkv, Dv].
        store: the layer's store, its prompt closed.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: the store's prompt is not closed.
    """
    store.append(key, value)
    if store.keys is None or store.values is None or store.lengths is None or store.split is None:
        raise ValueError("a decode step needs a store whose prompt is closed")
    split, stored = store.split, store.stored
    exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    lengths = None if store.uniform else store.lengths
    if split.top_k is None or stored <= split.token_budget:
        keys, values = store.keys[:, :, :stored], store.values[:, :, :stored]
        mask = None if lengths is None else torch.arange(stored, device=keys.device) < lengths[..., None]
        return attend(query, keys, values, mask=mask, **exact)
    if split.sinks is not None:
        positions = recent(store.lengths, split.top_k, split.sinks)
    else:
        with full_precision(query.device):
            positions = _select(query, store, scaling=scaling, softcap=softcap, sinks=sinks)
    mask = None
    if lengths is not None and store.shortest <= split.token_budget:
        # A row that stores at most t tokens attends to all of them.
        positions, mask = _all_where_short(positions, lengths, min(split.token_budget, stored), split.token_budget)
    return attend(query, store.keys, store.values, positions, mask=mask, **exact)


def _select(query: Tensor, store: KVStore, *, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Return the positions [B, Hkv, k] that the index ranks highest."""
    split = store.split
    if store.index is None or store.keys is None or split is None or split.channels is None or split.top_k is None:
        raise ValueError("selection by attention needs an index; this store was closed without one")
    lengths = None if store.uniform else store.lengths
    logits = score(
        query,
        store.index,
        store.keys,
        stored=store.stored,
        lengths=lengths,
        page_size=split.page_size,
        channels=split.channels,
        scaling=scaling,
        softcap=softcap,
    )
    positions, _ = select(
        logits,
        min(split.top_k, store.stored),
        stored=store.stored,
        lengths=lengths,
        kv_heads=store.keys.shape[1],
        unit_size=split.page_size,
        sinks=sinks,
    )
    return positions


def recent(lengths: Tensor, k: int, sinks: int) -> Tensor:
    """Return the slots [B, Hkv, k] of each row's first `sinks` tokens and its most recent `k - sinks`.

    Args:
        lengths: [B, Hkv] int32, tokens of each row; one of fewer than k yields slots up to k all the same.
        k: how many slots.
        sinks: how many of them are the first tokens.
    """
    slot = torch.arange(k, device=lengths.device)
    return torch.where(slot < sinks, slot, slot + (lengths.long()[..., None] - k).clamp(min=0))


def _all_where_short(positions: Tensor, lengths: Tensor, count: int, token_budget: int) -> tuple[Tensor, Tensor]:
    """Let rows of at most t tokens attend to all of them, and the others to their selection.

    Args:
        positions: [B, Hkv, k], the selection.
        lengths: [B, Hkv] int32.
        count: tokens of the longest row that attends to all, k <= count.
        token_budget: t.

    Returns:
        Positions [B, Hkv, count] and which of them count, [B, Hkv, count] bool.
    """
    slot = torch.arange(count, device=lengths.device)
    short = (lengths <= token_budget)[..., None]
    chosen = torch.nn.functional.pad(positions, (0, count - positions.shape[-1]))
    number = torch.where(short, lengths[..., None], positions.shape[-1])
    return torch.where(short, slot, chosen), slot < number
