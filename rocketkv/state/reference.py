"""A decode step in PyTorch, the reference: what each method attends to, and how, on any device.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, N stored tokens, t token budget, k
tokens read.
"""

from typing import Any

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.attention import attend, select
from ..core.eviction import full_precision
from ..core.indexes import Index, Parts, index_of
from ..core.residual import residual_attend
from .store import KVStore


def reference_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Append one token and attend to what the store's split reads; arguments and result as in `backend.decode_step`.

    Raises:
        ValueError: the store's prompt is not closed.
    """
    store.note_query(query)
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
    short = lengths is not None and store.shortest <= split.token_budget
    if split.sinks is not None:
        positions = recent(store.lengths, split.top_k, split.sinks)
        return attend_chosen(
            query, store.keys, store.values, positions, store.lengths if short else None, split.token_budget, **exact
        )
    index = index_of(split)
    if index is None:
        raise ValueError("selection by attention needs an index; this store was closed without one")
    out, missed = attend_selected(
        query,
        store.keys,
        store.values,
        index,
        store.index_parts(),
        store.value_sum,
        store.residual_bias,
        split=split,
        stored=stored,
        lengths=lengths,
        short=short,
        **exact,
    )
    if missed is not None:
        store.note_missed(missed)
    return out


def attend_selected(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Index,
    parts: Parts,
    value_sum: Tensor | None,
    bias: Tensor | None,
    *,
    split: BudgetSplit,
    stored: int,
    lengths: Tensor | None,
    short: bool,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Score what is stored, select, attend, and count in what was not selected where the split wants that.

    Args:
        query: [B, H, D].
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        index: what stage 2 ranks by.
        parts: its tensors.
        value_sum: [B, Hkv, Dv] float64, the sum of each row's values, where there is a residual.
        bias: [B, H] float32, of the residual's logit, or None.
        split: what the step may read.
        stored: N, tokens of the longest row.
        lengths: [B, Hkv] int32, tokens of each row, or None where every row has N.
        short: whether there may be rows of at most t tokens, which attend to all of them.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.

    Returns:
        Out, [B, H, Dv] in the query's dtype, and with a residual the estimated weight of what was not selected, [B, H].
    """
    token_budget, attended = split.token_budget, lengths if short else None
    exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    with full_precision(query.device):
        logits = index.score(query, parts, keys, stored=stored, lengths=lengths, scaling=scaling, softcap=softcap)
        positions, _ = select(
            logits,
            min(split.top_k or stored, stored),
            stored=stored,
            lengths=lengths,
            kv_heads=keys.shape[1],
            unit_size=split.page_size,
            sinks=sinks,
            protected=split.protected,
            by_largest=split.by_largest,
            ordered=False,
        )
    if value_sum is None:
        return attend_chosen(query, keys, values, positions, attended, token_budget, **exact), None
    if split.page_size > 1:
        logits = logits.repeat_interleave(split.page_size, dim=-1)[..., :stored]
    if attended is not None:
        positions, mask = all_where_short(positions, attended, token_budget)
        positions = torch.where(mask, positions, stored)  # beyond every row's length: they do not count
    with full_precision(query.device):
        return residual_attend(query, keys, values, positions, logits, value_sum, bias=bias, lengths=lengths, **exact)


def attend_chosen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    lengths: Tensor | None,
    token_budget: int,
    **exact: Any,
) -> Tensor:
    """Attend to chosen tokens [B, Hkv, k]; given lengths, rows of at most t tokens attend to all of them."""
    mask = None
    if lengths is not None:
        positions, mask = all_where_short(positions, lengths, token_budget)
    return attend(query, keys, values, positions, mask=mask, **exact)


def recent(lengths: Tensor, k: int, sinks: int) -> Tensor:
    """Return the slots [B, Hkv, k] of each row's first `sinks` tokens and its most recent `k - sinks`.

    Args:
        lengths: [B, Hkv] int32, tokens of each row; one of fewer than k yields slots up to k all the same.
        k: how many slots.
        sinks: how many of them are the first tokens.
    """
    slot = torch.arange(k, device=lengths.device)
    return torch.where(slot < sinks, slot, slot + (lengths.long()[..., None] - k).clamp(min=0))


def all_where_short(positions: Tensor, lengths: Tensor, token_budget: int) -> tuple[Tensor, Tensor]:
    """Let rows of at most t tokens attend to all of them, and the others to their selection.

    Args:
        positions: [B, Hkv, k], the selection, k <= t.
        lengths: [B, Hkv] int32.
        token_budget: t.

    Returns:
        Positions [B, Hkv, t] and which of them count, [B, Hkv, t] bool.
    """
    slot = torch.arange(token_budget, device=lengths.device)
    short = (lengths <= token_budget)[..., None]
    chosen = torch.nn.functional.pad(positions, (0, token_budget - positions.shape[-1]))
    number = torch.where(short, lengths[..., None], positions.shape[-1])
    return torch.where(short, slot, chosen), slot < number
