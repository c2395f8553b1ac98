"""What a decode step loses, as far as it can be known: estimated at every step, and true by attention to all there is.

The *missed mass* of a head is the share of its attention's weight that lies on stored tokens which the step did not
attend to: that of the chosen from their exact logits, that of the others from the sketch. What stage 1 has evicted is
in no estimate.

The *estimated error* of a head is the distance between its output and that of the chosen tokens alone, relative to its
output: how far what was missed moves the output when it is taken for a token of the mean value. With missed mass m,
output o and mean value v of a row's tokens, o is about (1 - m) * chosen + m * v, and so

    estimated error = m / (1 - m) * |o - v| / |o|

Nothing more than a step has at hand anyway. It says which steps and heads err more than others, and mostly overstates
by how much.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim of keys, Dv of values, N stored tokens, k tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.attention import attend
from ..core.indexes import index_of
from ..core.pages import movable, restored
from .reference import attend_selected
from .store import KVStore

# The chosen tokens are taken to have at least this share of the weight: dividing by less would only magnify noise.
LEAST_CHOSEN = 0.05

_Attended = tuple[Tensor, Tensor]  # an output, and what it missed


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One head's output of one step beside exact attention.

    Attributes:
        position: of the step's token in the sequence.
        layer: number of the layer in the model.
        row: of the batch.
        head: query head.
        error: relative L2 distance from exact attention to everything that is stored.
        history_error: likewise to all tokens of the sequence, where a method keeps a history.
        missed: the step's own estimate of the missed mass, or None where the method makes none.
        estimated_error: likewise of `error`.
    """

    position: int
    layer: int
    row: int
    head: int
    error: float
    history_error: float | None = None
    missed: float | None = None
    estimated_error: float | None = None


def selects(store: KVStore) -> bool:
    """Whether the last step may have left stored tokens out."""
    split = store.split
    return split is not None and split.top_k is not None and store.stored > split.token_budget


def missed_mass(store: KVStore, heads: int) -> Tensor | None:
    """Return what the last step of a store missed, [B, H] float32, or None where its method makes no estimate.

    No host sync. Zeros where the step attended to all that is stored; NaN where nobody noted what it missed.

    Args:
        store: the layer's store, its prompt closed.
        heads: H.
    """
    if store.split is None or not store.split.residual or store.keys is None:
        return None
    if selects(store) and store.missed is not None:
        return uncalibrated(store.missed, store.residual_bias)
    unknown = torch.nan if selects(store) else 0.0
    return torch.full((store.keys.shape[0], heads), unknown, dtype=torch.float32, device=store.keys.device)


def uncalibrated(missed: Tensor, bias: Tensor | None) -> Tensor:
    """Return the estimated weight of what a step did not attend to, given with what weight it counted that in.

    The bias is what makes the mean value serve best; it says nothing of how much was missed.

    Args:
        missed: [B, H] float32, the weight with the bias.
        bias: [B, H] float32, of the logit, or None.
    """
    return missed.clone() if bias is None else missed / (missed + (1 - missed) * bias.exp())


def last_missed(store: KVStore) -> Tensor | None:
    """Return what the last step of a store missed, [B, H] float32, or None where no step has estimated it."""
    return None if store.missed is None or not store.closed else missed_mass(store, store.missed.shape[1])


def estimated_error(out: Tensor, missed: Tensor, value_sum: Tensor, lengths: Tensor) -> Tensor:
    """Return the estimated error of a step's output, [B, H] float32: see the module. No host sync.

    Args:
        out: [B, H, Dv], the step's output.
        missed: [B, H] float32, its missed mass.
        value_sum: [B, Hkv, Dv], the sum of the values of all of a row's tokens.
        lengths: [B, Hkv], tokens of each row.
    """
    batch, kv_heads, value_dim = value_sum.shape
    mean = (value_sum / lengths.clamp(min=1)[..., None]).float()
    grouped = out.detach().float().view(batch, kv_heads, -1, value_dim)
    distance = torch.linalg.vector_norm(grouped - mean[:, :, None], dim=-1)
    size = torch.linalg.vector_norm(grouped, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    found: Tensor = missed / (1 - missed).clamp(min=LEAST_CHOSEN) * (distance / size).view(batch, -1)
    return found


def relative_error(out: Tensor, exact: Tensor) -> Tensor:
    """Return the L2 distance of outputs from exact ones [..., Dv], relative to these, in float64; 0 for equal ones."""
    distance: Tensor = torch.linalg.vector_norm(out.double() - exact.double(), dim=-1)
    size: Tensor = torch.linalg.vector_norm(exact.double(), dim=-1)
    return distance / size.clamp(min=torch.finfo(torch.float64).tiny)


def attend_stored(
    query: Tensor, store: KVStore, *, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attend exactly to everything that a store holds: what a step without a selection gives.

    Args:
        query: [B, H, D], after rotary embedding.
        store: the layer's store, its prompt closed.
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [H], the model's learned sinks, or None.

    Returns:
        [B, H, Dv] in the query's dtype.
    """
    keys, values, lengths = _filled(store)
    return attend(query, keys, values, mask=_mask(lengths, keys), scaling=scaling, softcap=softcap, sinks=sinks)


def attend_all_where(
    passed: Tensor,
    query: Tensor,
    store: KVStore,
    out: Tensor,
    missed: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to everything stored in some rows and KV heads, in the place of what a step gave there.

    Args:
        passed: [B, Hkv] bool, the rows and KV heads.
        query: [B, H, D].
        store: the layer's store, the step's token in it.
        out: [B, H, Dv], what the step gave.
        missed: [B, H] float32, what it missed.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.

    Returns:
        Copies of `out` and `missed`, with those rows and heads replaced.
    """
    keys, values, lengths = _filled(store)

    def attend_all(part: _Rows, queries: Tensor, own: Tensor | None) -> _Attended:
        mask = _mask(None if lengths is None else part(lengths), keys)
        found = attend(queries, part(keys), part(values), mask=mask, scaling=scaling, softcap=softcap, sinks=own)
        return found, found.new_zeros(found.shape[:2], dtype=torch.float32)

    return _replaced(passed, query, out, missed, sinks, attend_all)


def attend_wider_where(
    passed: Tensor,
    bound: float,
    query: Tensor,
    store: KVStore,
    out: Tensor,
    missed: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Double k in some rows and KV heads until they miss no more than a bound, or attend to everything stored.

    Args:
        passed: [B, Hkv] bool, the rows and KV heads.
        bound: of the missed mass.
        query: [B, H, D].
        store: the layer's store, the step's token in it.
        out: [B, H, Dv], what the step gave.
        missed: [B, H] float32, what it missed.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.

    Returns:
        Copies of `out` and `missed`, with those rows and heads replaced.

    Raises:
        ValueError: the store's steps select nothing, or have no residual.
    """
    keys, values, lengths = _filled(store)
    split, index, value_sum, bias = store.split, index_of(store.split), store.value_sum, store.residual_bias
    if split is None or split.top_k is None or index is None or value_sum is None:
        raise ValueError("only a step that selects by scores and has a residual can attend to more")
    read, stored = split.top_k, store.stored
    while read < stored and bool(passed.any()):
        read = min(2 * read, stored)
        wider = replace(split, top_k=read, token_budget=max(read, split.token_budget))

        def attend_wider(part: _Rows, queries: Tensor, own: Tensor | None, wider: BudgetSplit = wider) -> _Attended:
            found, rest = attend_selected(
                queries,
                part(keys),
                part(values),
                index,
                {name: part(tensor) for name, tensor in store.index_parts().items()},
                part(value_sum),
                None if bias is None else part(bias, queries.shape[1]),
                split=wider,
                stored=stored,
                lengths=None if lengths is None else part(lengths),
                short=False,
                scaling=scaling,
                softcap=softcap,
                sinks=own,
            )
            if rest is None:
                raise ValueError("a step with a residual says what it missed")
            return found, uncalibrated(rest, None if bias is None else part(bias, queries.shape[1]))

        out, missed = _replaced(passed, query, out, missed, sinks, attend_wider)
        passed = passed & beyond(missed, bound, passed.shape[1])
    return out, missed


def beyond(missed: Tensor, bound: float, kv_heads: int) -> Tensor:
    """Return [B, Hkv] bool, where a query head of the group misses more than the bound; what is NaN does.

    Args:
        missed: [B, H] float32.
        bound: of the missed mass.
        kv_heads: Hkv.
    """
    return ~(missed.view(missed.shape[0], kv_heads, -1) <= bound).all(-1)


def audit_head(
    query: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> float:
    """Return the relative error of one head's output against exact attention to some tokens.

    Args:
        query: [D], perhaps on another device than these, as `out` and `sinks`.
        out: [Dv].
        keys: [N, D].
        values: [N, Dv].
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [1], the head's learned sink, or None.
    """
    # In float32: what is audited may have been rounded, what it is audited by is not.
    exact = attend(
        query[None, None].to(keys.device, torch.float32),
        keys[None, None].float(),
        values[None, None].float(),
        scaling=scaling,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(keys.device),
    )
    return float(relative_error(out.to(keys.device), exact[0, 0]))


def _filled(store: KVStore) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a store's keys [B, Hkv, N, D], values [B, Hkv, N, Dv], and lengths [B, Hkv] where rows differ."""
    if not store.closed or store.keys is None or store.values is None:
        raise ValueError("only a store whose prompt is closed takes decode steps")
    stored = store.stored
    return store.keys[:, :, :stored], store.values[:, :, :stored], None if store.uniform else store.lengths


def _mask(lengths: Tensor | None, keys: Tensor) -> Tensor | None:
    return None if lengths is None else torch.arange(keys.shape[2], device=keys.device) < lengths[..., None]


@dataclass(frozen=True)
class _Rows:
    """Some rows of one KV head; `rows` is None for all of them.

    A call returns their part of a tensor [B, Hkv, ...] as [R, 1, ...], or of one of query heads as [R, G, ...].
    """

    head: int
    rows: Tensor | None

    def __call__(self, tensor: Tensor, group: int = 1) -> Tensor:
        part = tensor[:, self.head * group : (self.head + 1) * group]
        return part if self.rows is None else restored(movable(part).index_select(0, self.rows), tensor.dtype)


def _replaced(
    passed: Tensor,
    query: Tensor,
    out: Tensor,
    missed: Tensor,
    sinks: Tensor | None,
    attention: Callable[[_Rows, Tensor, Tensor | None], _Attended],
) -> tuple[Tensor, Tensor]:
    """Return copies of outputs and missed masses in which some rows and KV heads have been attended to anew.

    Args:
        passed: [B, Hkv] bool, which.
        query: [B, H, D].
        out: [B, H, Dv].
        missed: [B, H] float32.
        sinks: [H], or None.
        attention: gives outputs [R, G, Dv] and missed masses [R, G] of rows of one KV head, from these, their queries
            [R, G, D] and the sinks [G].
    """
    out, missed = out.clone(), missed.clone()
    batch, kv_heads = passed.shape
    group = query.shape[1] // kv_heads
    for head, chosen in enumerate(passed.unbind(1)):
        rows = chosen.nonzero().flatten()
        if len(rows) == 0:
            continue
        part, own = _Rows(head, None if len(rows) == batch else rows), slice(head * group, (head + 1) * group)
        found, rest = attention(part, part(query, group), None if sinks is None else sinks[own])
        out[rows, own], missed[rows, own] = found, rest
    return out, missed
