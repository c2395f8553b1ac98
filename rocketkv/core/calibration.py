"""Calibrate the value residual at a prompt's end: fit its weight per query head on the observation window.

Beyond the paper. The residual adds the mean value of the tokens that a step does not attend to, with the sum of their
estimated weights. The estimates are noisy, and the plain mean differs from the weighted mean. So in some heads a
smaller weight, or none, comes closer to exact attention. The fit treats each query of the window as a decode step and
multiplies the residual's weight by a factor f. The softmax total hardly depends on f; if it is taken as constant, the
output is linear in f, and the least-squares f has a closed form.

The fit is cross-validated: f is fitted on every other query and evaluated on the rest, and the reverse. If this
increases a head's error over that without a residual, the head's factor is `LEAST`.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens, W window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import BudgetSplit
from .decode import DecodeBuffers
from .params import AttentionParams
from .residual import overestimate
from .token_index import TokenIndex
from .topk import full_precision, select

# Upper bound for the float32 logits [B, H, queries, N] of a block of queries, and for each of their few copies. A block
# has at least one query.
BLOCK_BYTES = 4 * 2**20

# Pseudo-count of the ridge prior at f = 1, in observation windows. Stage 1 has ranked by these queries, so they need
# the residual less than later ones do (docs/beyond.md).
PRIOR = 0.25

# Squared relative errors that sum to less than this over all queries count as none; far above rounding errors.
NEGLIGIBLE = 1e-6

# Bounds of f. A larger f would make up for tokens that stage 1 evicted, which no step can estimate.
LEAST, MOST = 1e-4, 1.6


def fitted_bias(
    query: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex,
    params: AttentionParams,
    *,
    split: BudgetSplit,
    stored: int,
    seen: int,
) -> Tensor:
    """Return log f of each query head, the `bias` of `residual_attend`.

    Errors are measured against exact attention to all stored tokens. No host sync.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens (the observation window).
        buffers: the prompt's compacted tokens and their index.
        index: the sketch index of the keys.
        params: the model's attention parameters.
        split: the tokens that a step may read.
        stored: N, tokens of the longest row.
        seen: tokens of the sequence.

    Returns:
        [B, H] float32; log of `LEAST` in heads that fail the cross-validation, 0 in rows whose steps attend to all
        stored tokens.
    """
    keys, values, positions, lengths = buffers[:4]
    batch, heads, window, _ = query.shape
    kv_heads = keys.shape[1]
    terms = query.new_zeros(2, batch, kv_heads, heads // kv_heads, window, dtype=torch.float32)
    if split.top_k is not None and stored > split.token_budget:
        count = max(1, BLOCK_BYTES // (4 * batch * heads * stored))
        with full_precision(query.device):
            for start in range(0, window, count):
                part = query[:, :, start : start + count]
                last = torch.arange(start, start + part.shape[2], device=query.device) + (seen - window)
                # A query sees the tokens up to its own position.
                seen_by = (positions[:, :, None, :stored] <= last[:, None]) & (
                    torch.arange(stored, device=query.device) < lengths[..., None, None]
                )
                found = _terms(part, keys, values, seen_by, index, buffers.index_tensors, params, split, stored)
                # Padding has no query.
                real = (seen_by & (positions[:, :, None, :stored] == last[:, None])).any(-1)
                terms[..., start : start + count] = torch.where(real[:, :, None] & found.isfinite(), found, 0)
    halves = torch.stack((terms[..., 0::2].sum(-1), terms[..., 1::2].sum(-1)))
    tried = _factor(halves)
    cross, square = halves.flip(0).unbind(1)
    # Increase of the squared error over that without a residual, with the factor of the other half.
    added = (tried * (tried * square - 2 * cross)).sum(0)
    factor = torch.where(added > NEGLIGIBLE, LEAST, _factor(halves.sum(0, keepdim=True))[0])
    factor = torch.where((lengths > split.token_budget)[..., None], factor, 1.0)
    return factor.log().flatten(1)


def _factor(terms: Tensor) -> Tensor:
    """Return the least-squares factors [n, B, Hkv, G] from sums of `_terms`, [n, 2, B, Hkv, G]."""
    cross, square = terms.unbind(1)
    factor = (cross + PRIOR * square + NEGLIGIBLE) / ((1 + PRIOR) * square + NEGLIGIBLE)
    return factor.clamp(LEAST, MOST)


def _terms(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    index: TokenIndex,
    index_tensors: Sequence[Tensor],
    params: AttentionParams,
    split: BudgetSplit,
    stored: int,
) -> Tensor:
    """Return the terms of the least-squares fit, [2, B, Hkv, G, n], for queries [B, H, n, D].

    The error of a query's output, relative to the output's length, is `u + f v`; the terms are `-u v` and `v v`. `seen`
    [B, Hkv, n, N] bool is True at the tokens that a query sees.
    """
    batch, heads, count, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads, count)
    rows = query.reshape(*grouped, head_dim)
    estimates = index.score(rows.flatten(1, 3), index_tensors, keys, params, stored=stored, lengths=None)
    estimates = estimates.view(*grouped, stored)
    estimates = estimates.masked_fill(~seen[:, :, None], -torch.inf)
    # The selection treats each query as a separate row.
    places, _ = select(
        estimates.permute(0, 3, 1, 2, 4).reshape(batch * count, heads, stored),
        min(split.top_k or stored, stored),
        stored=stored,
        lengths=None,
        kv_heads=kv_heads,
        unit_size=1,
        sinks=params.sinks,
        protected=split.protected,
        by_largest=split.by_largest,
        ordered=False,
    )
    places = places.view(batch, count, kv_heads, -1).transpose(1, 2)
    chosen = torch.zeros_like(seen).scatter_(-1, places.long(), True) & seen
    estimated = estimates.masked_fill(~chosen[:, :, None], -torch.inf).logsumexp(-1)
    rest = estimates.masked_fill_((chosen | ~seen)[:, :, None], -torch.inf).logsumexp(-1)
    by_head = []
    for head in range(kv_heads):  # one head at a time bounds the float32 copies of keys and values
        own = slice(head, head + 1)
        sink = None if params.sinks is None else params.sinks.view(kv_heads, -1)[head].float()
        by_head.append(
            _head_terms(
                rows[:, head].float() * params.scaling,
                keys[:, head, :stored].float(),
                values[:, head, :stored].float(),
                seen[:, own],
                chosen[:, own],
                estimated[:, head],
                rest[:, head],
                params.softcap,
                sink,
            )
        )
    return torch.stack(by_head, 2)


def _head_terms(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    chosen: Tensor,
    estimated: Tensor,
    rest: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the terms of one KV head, [2, B, G, n]; see `_terms`.

    Args:
        rows: [B, G, n, D], queries times the scaling.
        keys: [B, N, D].
        values: [B, N, Dv].
        seen: [B, 1, n, N] bool.
        chosen: [B, 1, n, N] bool, the seen tokens that a step attends to.
        estimated: [B, G, n], log-sum-exp of these tokens' estimated logits.
        rest: [B, G, n], log-sum-exp of the estimated logits of the other seen tokens.
        softcap: soft-cap of the logits, or None.
        sinks: [G], learned sinks, or None.
    """
    # The group's queries are rows of one matrix, so that keys and values are not copied per head.
    logits = torch.bmm(rows.flatten(1, 2), keys.transpose(1, 2)).view(*rows.shape[:3], -1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    near = logits.masked_fill(~chosen, -torch.inf)
    all_mass, near_mass = logits.logsumexp(-1), near.logsumexp(-1)
    rest = rest - overestimate(near_mass, estimated)
    weights = logits.softmax(-1), near.softmax(-1)
    out, own = (torch.bmm(weight.flatten(1, 2), values).view(*rows.shape[:3], -1) for weight in weights)
    others = (seen & ~chosen).float()
    mean = torch.bmm(others[:, 0], values)[:, None] / others.sum(-1, keepdim=True).clamp(min=1)
    # Shares of the softmax total: chosen tokens, residual, learned sink. The sink has no value.
    sink = torch.full_like(rest, -torch.inf) if sinks is None else sinks[:, None].expand_as(rest)
    share = torch.stack((near_mass, rest, sink), -1).softmax(-1)
    out = out * torch.sigmoid(all_mass - sink)[..., None]
    fixed = share[..., :1] * own - (share[..., :1] + share[..., 2:]) * out
    linear = share[..., 1:2] * (mean - out)
    size = out.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack(((-fixed * linear).sum(-1) / size, linear.square().sum(-1) / size))
