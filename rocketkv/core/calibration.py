"""Calibrate the value residual at a prompt's end: fit its weight per query head on the observation window.

Beyond the paper. The residual adds the mean value of the tokens that a step does not attend to, with the sum of their
estimated weights. The estimates are noisy, and the plain mean differs from the weighted mean. So in some heads a
smaller weight, or none, comes closer to exact attention. The fit treats each query of the window as a decode step and
multiplies the residual's weight by a factor f. The softmax total hardly depends on f; if it is taken as constant, the
output is linear in f, and the least-squares f has a closed form. Errors are measured against exact attention to the
whole prompt. So the residual also stands in for evicted tokens, as far as their mean value is close to that of the
stored tokens that a step leaves out.

The fit is cross-validated: f is fitted on every other query and evaluated on the rest, and the reverse. If this
increases a head's error over that without a residual, the head's factor is `LEAST`.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens, W window.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import BudgetSplit
from .decode import DecodeBuffers
from .params import AttentionParams
from .residual import overestimate
from .scratch import block_bytes
from .token_index import TokenIndex
from .topk import full_precision, scalar, select

# Pseudo-count of the ridge prior at f = 1, in observation windows. Less fits the outputs of later steps no better; more
# is worse with few evicted tokens (studies/records/beyond.md).
PRIOR = 0.1

# Squared relative errors that sum to less than this over all queries count as none; far above float32's rounding.
NEGLIGIBLE = 1e-6

# Bounds of f. With small budgets, factors above 1 make up for evicted tokens; beyond 3 the gain is small.
LEAST, MOST = 1e-4, 3.0


class Weighed(NamedTuple):
    """The result of `weigh_chosen`, all float32; masses are log-sum-exps of logits.

    Attributes:
        chosen: [p, n, G], mass of the chosen tokens.
        chosen_estimate: [p, n, G], estimated mass of these tokens.
        rest_estimate: [p, n, G], estimated mass of the rest.
        chosen_out: [p, n, G, Dv], output of attention to the chosen tokens.
        rest_sum: [p, n, Dv], the sum of the values of the rest.
        rest_count: [p, n], number of tokens of the rest.
    """

    chosen: Tensor
    chosen_estimate: Tensor
    rest_estimate: Tensor
    chosen_out: Tensor
    rest_sum: Tensor
    rest_count: Tensor


def weigh_chosen(
    estimates: Tensor,
    logits: Tensor,
    values: Tensor,
    k: int,
    *,
    sinks: Tensor | None = None,
    protected: int = 0,
    by_largest: bool = False,
) -> Weighed:
    """Choose tokens as n steps would, and attend to them.

    Args:
        estimates: [p, n, G, N] float32, estimated logits of p rows and KV heads, minus infinity at unseen tokens.
        logits: [p, n, G, N] float32, the exact ones; overwritten.
        values: [p, N, Dv] float32.
        k: tokens to choose, at most N.
        sinks: [p, n, G] float32, learned sinks, or None.
        protected: number of first tokens that are chosen before all others.
        by_largest: whether the largest weight over the group's heads ranks a token, not the average.
    """
    pairs, count, group, stored = estimates.shape
    # The selection treats each query as a separate row of a batch, with one KV head.
    places, _ = select(
        estimates.flatten(0, 1),
        k,
        stored=stored,
        lengths=None,
        kv_heads=1,
        unit_size=1,
        sinks=None if sinks is None else sinks.flatten(0, 1),
        protected=protected,
        by_largest=by_largest,
        ordered=False,
    )
    places = places.view(pairs, count, k)
    by_head = places[:, :, None].expand(-1, -1, group, -1)
    chosen_estimate = estimates.gather(3, by_head).logsumexp(-1)
    rest_estimate = estimates.scatter(3, by_head, -torch.inf).logsumexp(-1)
    rest = (logits[:, :, 0] != -torch.inf).scatter_(2, places, False)
    logits.masked_fill_(rest[:, :, None], -torch.inf)
    return Weighed(
        chosen=logits.logsumexp(-1),
        chosen_estimate=chosen_estimate,
        rest_estimate=rest_estimate,
        chosen_out=torch.bmm(logits.softmax(-1).flatten(1, 2), values).view(pairs, count, group, -1),
        rest_sum=torch.bmm(rest.float(), values),
        rest_count=rest.sum(-1),
    )


def fitted_bias(
    query: Tensor,
    exact: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex,
    params: AttentionParams,
    *,
    split: BudgetSplit,
    stored: int,
    seen: int,
    valid: Tensor | None = None,
    weigh: Callable[..., Weighed] = weigh_chosen,
) -> Tensor:
    """Return log f of each query head, the `bias` of `residual_attend`.

    No host sync.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens (the observation window).
        exact: [B, W, H, Dv], the outputs of their causal attention to all tokens that the prompt had before stage 1.
        buffers: the prompt's compacted tokens and their index.
        index: the sketch index of the keys.
        params: the model's attention parameters.
        split: the tokens that a step may read.
        stored: N, tokens of the longest row.
        seen: tokens of the sequence.
        valid: [B, W] bool, False at queries of padding, which do not count; or None without padding.
        weigh: this module's `weigh_chosen`, or a backend's.

    Returns:
        [B, H] float32; log of `LEAST` in heads that fail the cross-validation, 0 in rows whose steps attend to all
        stored tokens.
    """
    batch, heads = query.shape[:2]
    if split.top_k is None or stored <= split.token_budget:
        return query.new_zeros(batch, heads, dtype=torch.float32)
    with full_precision(query.device):
        terms = _terms(query, exact, buffers, index, params, split, stored, seen, weigh)
    terms = terms.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).view(2, batch, -1, *terms.shape[2:])
    if valid is not None:
        terms.masked_fill_(~valid[:, None, :, None], 0)
    even, odd = terms[..., 0::2, :].sum(-2), terms[..., 1::2, :].sum(-2)
    cross, square = torch.stack((even, odd, even + odd), 1)
    # Outputs in 16 bits have rounding errors: the squares of theirs over the window count as none, too.
    negligible = max(NEGLIGIBLE, query.shape[2] * torch.finfo(exact.dtype).eps ** 2 / 24)
    fits = torch.add(cross, square, alpha=PRIOR).add_(negligible)
    fits.div_(torch.add(scalar(negligible), square, alpha=1 + PRIOR)).clamp_(LEAST, MOST)
    # Increase of the squared error over that without a residual, with the factor of the other half.
    tried = fits[:2].flip(0)
    added = torch.sub(tried * square[:2], cross[:2], alpha=2).mul_(tried).sum(0)
    factor = fits[2].masked_fill_(added > negligible, LEAST)
    factor.masked_fill_((buffers.seq_lens <= split.token_budget)[..., None], 1.0)
    return factor.log().flatten(1)  # a tensor of its own, without the storage of `fits`


def _first_late(positions: Tensor, first_query: int) -> int:
    """Return a slot before which every query sees every token; 0 on a GPU, which the host would have to wait for."""
    if positions.device.type != "cpu":
        return 0
    seen = (positions <= first_query).all(0)
    return int(seen.logical_not().byte().argmax()) if not seen.all() else positions.shape[1]


def _terms(
    query: Tensor,
    exact: Tensor,
    buffers: DecodeBuffers,
    index: TokenIndex,
    params: AttentionParams,
    split: BudgetSplit,
    stored: int,
    seen: int,
    weigh: Callable[..., Weighed],
) -> Tensor:
    """Return the terms of the least-squares fit, [2, B * Hkv, W, G]; not finite for queries that see no token.

    The error of a query's output, relative to the output's length, is `f v - u`; the terms are `u v` and `v v`.
    """
    batch, _, window, head_dim = query.shape
    keys, values, positions = (tensor.flatten(0, 1)[:, :stored] for tensor in buffers[:3])
    rows = keys.shape[0]
    queries = query.reshape(rows, -1, window, head_dim).transpose(1, 2)
    queries = queries.to(torch.float32, memory_format=torch.contiguous_format)
    scaled, group = queries * params.scaling, queries.shape[2]
    positions = positions.masked_fill(positions < 0, seen)  # free slots come after every query
    late = _first_late(positions, seen - window)
    last = torch.arange(seen - window, seen, device=keys.device)[:, None]
    sinks = params.sinks
    if sinks is not None:
        sinks = sinks.float().view(1, -1, 1, group).expand(batch, -1, window, -1).flatten(0, 1)
    # A block has some rows with all of their queries, or else some queries of one row.
    size = block_bytes(keys.device)
    row_count = max(1, size // (4 * stored * max(group * window, head_dim, values.shape[2])))
    query_count = max(1, min(window, size // (4 * stored * group)))
    blocks, index_tensors = [], [tensor.flatten(0, 1)[:, None] for tensor in buffers.index_tensors]
    for first in range(0, rows, row_count):
        own = slice(first, first + row_count)
        tensors = [tensor[own] for tensor in index_tensors]
        own_keys, own_values = keys[own].float(), values[own].float()
        parts = []
        for start in range(0, window, query_count):
            part = slice(start, start + query_count)
            unseen = positions[own, None, late:] > last[part]
            own_params = params._replace(sinks=None if sinks is None else sinks[own, part])
            asked = queries[own, part].flatten(1, 2)
            estimates = index.score(asked, tensors, own_keys[:, None], params, stored=stored, lengths=None)
            own_queries = scaled[own, part]
            parts.append(_weighed(own_queries, own_keys, own_values, unseen, estimates, own_params, split, weigh))
        blocks.append(_joined(parts, 1))
    out = exact.view(batch, window, -1, group, exact.shape[-1]).transpose(1, 2).flatten(0, 1).float()
    return _error_terms(_joined(blocks, 0), out, sinks)


def _joined(parts: list[Weighed], dim: int) -> Weighed:
    """Concatenate the tensors of some results."""
    return parts[0] if len(parts) == 1 else Weighed(*(torch.cat(tensors, dim) for tensors in zip(*parts, strict=True)))


def _weighed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    unseen: Tensor,
    estimates: Tensor,
    params: AttentionParams,
    split: BudgetSplit,
    weigh: Callable[..., Weighed],
) -> Weighed:
    """Choose tokens as n steps of p rows and KV heads would, and attend to them.

    Args:
        query: [p, n, G, D] float32, times the scaling.
        keys: [p, N, D] float32.
        values: [p, N, Dv] float32.
        unseen: [p, n, m] bool, of the last m slots: True at free ones and at tokens after the query. All queries see
            the tokens in the other slots.
        estimates: [p, n * G, N] float32, estimates of the logits; overwritten.
        params: the model's attention parameters, with sinks [p, n, G].
        split: the tokens that a step may read.
        weigh: `weigh_chosen`, or a backend's.
    """
    pairs, count, group, _ = query.shape
    stored, late = keys.shape[1], keys.shape[1] - unseen.shape[2]
    estimates = estimates.view(pairs, count, group, stored)
    logits = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view_as(estimates)
    if params.softcap is not None:
        logits = logits.div_(params.softcap).tanh_().mul_(params.softcap)
    for scores in (estimates, logits):
        scores[..., late:].masked_fill_(unseen[:, :, None], -torch.inf)
    return weigh(
        estimates,
        logits,
        values,
        min(split.top_k or stored, stored),
        sinks=params.sinks,
        protected=split.protected,
        by_largest=split.by_largest,
    )


def _error_terms(found: Weighed, out: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the terms of `_terms` for all queries: `out` [rows, W, G, Dv] are exact outputs, `sinks` [rows, W, G]."""
    rest = found.rest_estimate - overestimate(found.chosen, found.chosen_estimate)
    # Shares of the softmax total: chosen tokens, residual, learned sink. The sink has no value.
    masses = (found.chosen, rest) if sinks is None else (found.chosen, rest, sinks)
    share = torch.stack(masses, -1).softmax(-1)
    fixed = (out - found.chosen_out).mul_(share[..., :1])
    if sinks is not None:
        fixed.addcmul_(share[..., 2:], out)
    mean = found.rest_sum.div(found.rest_count[..., None].clamp(min=1))[:, :, None]
    linear = (mean - out).mul_(share[..., 1:2])
    return torch.stack((fixed, linear)).mul_(linear).sum(-1).div_(out.square().sum(-1))
