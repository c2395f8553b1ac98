"""Estimates of the attention mass that a decode step misses, and audits of them.

The *missed mass* of a head is its attention weight on stored tokens that the step does not attend to. Exact logits
weight the chosen tokens, the sketch's estimates all others. Evicted tokens are in no estimate.

The *estimated error* of a head is the distance between its output and the output of the chosen tokens alone, relative
to its output. It treats the missed tokens as one token of the mean value. With missed mass m, output o and the mean v
of a row's values, o is about (1 - m) * chosen + m * v, so

    estimated error = m / (1 - m) * |o - v| / |o|

It needs only tensors that the step has anyway. It ranks steps and heads by their error, and mostly overestimates it.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim of keys, Dv of values, N stored tokens, k tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.attention import attend
from ..core.decode import DecodeBuffers, attend_selected
from ..core.pages import movable, restored
from ..core.params import AttentionParams
from .store import KVStore

# Least weight assumed on the chosen tokens: dividing by less would only magnify noise.
LEAST_CHOSEN = 0.05

_Attended = tuple[Tensor, Tensor]  # an output, and its missed mass


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One head's output of one step, compared with exact attention.

    Attributes:
        position: position of the step's token in the sequence.
        layer: number of the layer in the model.
        row: row of the batch.
        head: query head.
        error: relative L2 distance from exact attention to all stored tokens.
        history_error: relative L2 distance from exact attention to all tokens of the sequence; None without a history.
        missed: the step's estimate of the missed mass, or None if the method makes none.
        estimated_error: the step's estimate of `error`, or None.
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
    """Whether the last step may have missed stored tokens."""
    split = store.split
    return split is not None and split.top_k is not None and store.stored > split.token_budget


def missed_mass(store: KVStore) -> Tensor | None:
    """Return the missed mass of the last step, [B, H] float32, or None if the method makes no estimate.

    No host sync. Zeros if the step attended to all stored tokens; NaN if a backend made no estimate.
    """
    buffers = store.decoding.buffers
    if buffers.missed is None:
        return None
    if selects(store):
        return uncalibrated(buffers.missed, buffers.residual_bias)
    return torch.zeros_like(buffers.missed)


def uncalibrated(missed: Tensor, bias: Tensor | None) -> Tensor:
    """Return the missed mass without the residual's calibration, [B, H] float32.

    The calibrated bias minimizes the error of the output; it is no part of the missed mass.

    Args:
        missed: [B, H] float32, the weight of the residual, bias included.
        bias: [B, H] float32, added to the residual's logit, or None.
    """
    return missed.clone() if bias is None else missed / (missed + (1 - missed) * bias.exp())


def last_missed(store: KVStore) -> Tensor | None:
    """Return the missed mass of the last step, [B, H] float32, or None if no step has estimated it."""
    return missed_mass(store) if store.closed and store.generated > 0 else None


def estimated_error(out: Tensor, missed: Tensor, value_sum: Tensor, lengths: Tensor) -> Tensor:
    """Return the estimated error of a step's output, [B, H] float32, as the module defines it. No host sync.

    Args:
        out: [B, H, Dv], the step's output.
        missed: [B, H] float32, its missed mass.
        value_sum: [B, Hkv, Dv], the sum of all stored values of a row.
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
    """Return the relative L2 error of outputs against exact ones [..., Dv], in float64; 0 for equal outputs."""
    distance: Tensor = torch.linalg.vector_norm(out.double() - exact.double(), dim=-1)
    size: Tensor = torch.linalg.vector_norm(exact.double(), dim=-1)
    return distance / size.clamp(min=torch.finfo(torch.float64).tiny)


def attend_stored(query: Tensor, store: KVStore, params: AttentionParams) -> Tensor:
    """Attend exactly to all stored tokens, as a step without a selection does.

    Args:
        query: [B, H, D], after rotary embedding.
        store: the layer's store, its prompt closed.
        params: the model's attention parameters.

    Returns:
        [B, H, Dv] in the query's dtype.
    """
    keys, values, lengths = _filled(store)
    return attend(query, keys, values, params, mask=_mask(lengths, keys))


def attend_all_where(
    passed: Tensor,
    query: Tensor,
    store: KVStore,
    out: Tensor,
    missed: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Replace a step's output in some rows and KV heads by attention to all stored tokens.

    Args:
        passed: [B, Hkv] bool, True for the rows and KV heads to replace.
        query: [B, H, D].
        store: the layer's store, which includes the step's token.
        out: [B, H, Dv], the step's output.
        missed: [B, H] float32, its missed mass.
        params: the model's attention parameters.

    Returns:
        Copies of `out` and `missed`, with those rows and heads replaced.
    """
    keys, values, lengths = _filled(store)

    def attend_all(part: _Rows, queries: Tensor, own: AttentionParams) -> _Attended:
        mask = _mask(None if lengths is None else part(lengths), keys)
        found = attend(queries, part(keys), part(values), own, mask=mask)
        return found, found.new_zeros(found.shape[:2], dtype=torch.float32)

    return _replaced(passed, query, out, missed, params, attend_all)


def attend_wider_where(
    passed: Tensor,
    bound: float,
    query: Tensor,
    store: KVStore,
    out: Tensor,
    missed: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Double k in some rows and KV heads until the missed mass is within a bound, or all tokens are attended to.

    Args:
        passed: [B, Hkv] bool, True for the rows and KV heads to replace.
        bound: tolerated missed mass.
        query: [B, H, D].
        store: the layer's store, which includes the step's token.
        out: [B, H, Dv], the step's output.
        missed: [B, H] float32, its missed mass.
        params: the model's attention parameters.

    Returns:
        Copies of `out` and `missed`, with those rows and heads replaced.

    Raises:
        ValueError: the store's steps select nothing, or have no residual.
    """
    decoding, stored = store.decoding, store.stored
    split, index, buffers = decoding.split, decoding.index, decoding.buffers
    lengths, value_sum, bias = None if store.uniform else buffers.seq_lens, buffers.value_sum, buffers.residual_bias
    if split.top_k is None or index is None or value_sum is None:
        raise ValueError("only a step that selects by scores and has a residual can attend to more")
    read = split.top_k
    while read < stored and bool(passed.any()):
        read = min(2 * read, stored)
        wider = replace(split, top_k=read, token_budget=max(read, split.token_budget))

        def attend_wider(part: _Rows, queries: Tensor, own: AttentionParams, wider: BudgetSplit = wider) -> _Attended:
            group_bias = None if bias is None else part(bias, queries.shape[1])
            some = DecodeBuffers(
                part(buffers.keys),
                part(buffers.values),
                part(buffers.positions),
                part(buffers.seq_lens),
                tuple(part(tensor) for tensor in buffers.index_tensors),
                value_sum=part(value_sum),
                residual_bias=group_bias,
            )
            own_lengths = None if lengths is None else some.seq_lens
            found, rest = attend_selected(
                queries, some, index, wider, own, stored=stored, shortest=store.shortest, lengths=own_lengths
            )
            if rest is None:
                raise ValueError("a step with a residual estimates its missed mass")
            return found, uncalibrated(rest, group_bias)

        out, missed = _replaced(passed, query, out, missed, params, attend_wider)
        passed = passed & beyond(missed, bound, passed.shape[1])
    return out, missed


def beyond(missed: Tensor, bound: float, kv_heads: int) -> Tensor:
    """Return [B, Hkv] bool, True if the missed mass of a query head of the group is above the bound or NaN.

    Args:
        missed: [B, H] float32.
        bound: tolerated missed mass.
        kv_heads: Hkv.
    """
    return ~(missed.view(missed.shape[0], kv_heads, -1) <= bound).all(-1)


def audit_head(query: Tensor, out: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> float:
    """Return the relative error of one head's output against exact attention to some tokens.

    Args:
        query: [D]; it may be on another device than the keys, as `out` and the learned sinks may.
        out: [Dv].
        keys: [N, D].
        values: [N, Dv].
        params: the model's attention parameters; here `sinks` is [1], the head's learned sink.
    """
    # The reference is computed in float32, whatever the dtype of the audited output.
    exact = attend(
        query[None, None].to(keys.device, torch.float32),
        keys[None, None].float(),
        values[None, None].float(),
        params._replace(sinks=None if params.sinks is None else params.sinks.to(keys.device)),
    )
    return float(relative_error(out.to(keys.device), exact[0, 0]))


def _filled(store: KVStore) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a store's keys [B, Hkv, N, D], values [B, Hkv, N, Dv], and lengths [B, Hkv] if rows differ."""
    buffers, stored = store.decoding.buffers, store.stored
    lengths = None if store.uniform else buffers.seq_lens
    return buffers.keys[:, :, :stored], buffers.values[:, :, :stored], lengths


def _mask(lengths: Tensor | None, keys: Tensor) -> Tensor | None:
    return None if lengths is None else torch.arange(keys.shape[2], device=keys.device) < lengths[..., None]


@dataclass(frozen=True)
class _Rows:
    """Selects some rows of one KV head; `rows` None selects all.

    A call maps a tensor [B, Hkv, ...] to [R, 1, ...], or a tensor of query heads [B, H, ...] to [R, G, ...].
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
    params: AttentionParams,
    attention: Callable[[_Rows, Tensor, AttentionParams], _Attended],
) -> tuple[Tensor, Tensor]:
    """Return copies of outputs and missed masses, recomputed in some rows and KV heads.

    Args:
        passed: [B, Hkv] bool, True for the rows and KV heads to recompute.
        query: [B, H, D].
        out: [B, H, Dv].
        missed: [B, H] float32.
        params: the model's attention parameters.
        attention: returns outputs [R, G, Dv] and missed masses [R, G] from rows of one KV head, their queries
            [R, G, D] and the parameters of those heads.
    """
    out, missed = out.clone(), missed.clone()
    batch, kv_heads = passed.shape
    group = query.shape[1] // kv_heads
    for head, chosen in enumerate(passed.unbind(1)):
        rows = chosen.nonzero().flatten()
        if len(rows) == 0:
            continue
        part, own = _Rows(head, None if len(rows) == batch else rows), slice(head * group, (head + 1) * group)
        sinks = None if params.sinks is None else params.sinks[own]
        found, rest = attention(part, part(query, group), params._replace(sinks=sinks))
        out[rows, own], missed[rows, own] = found, rest
    return out, missed
