"""How much the value residual weighs: calibrated at a prompt's end, by its last queries as if each were a decode step.

The residual gives the tokens that a step does not attend to one value, the mean of theirs, with the weight that their
estimated logits have. Estimates are noisy and the mean is not their weighted mean, so that in some heads less of it, or
nothing, comes nearer to exact attention. What the window's queries would have given with a weight f times as large,
relative to a total that hardly depends on f, is linear in f, so the f of least squared error has a closed form.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens, W window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import BudgetSplit
from .decode import DecodeBuffers
from .params import AttentionParams
from .token_index import TokenIndex
from .topk import full_precision, select

# The logits of some queries, [B, H, queries, N] in float32, and each of their few copies, stay under this; those of one
# query may be larger.
BLOCK_BYTES = 4 * 2**20

# Pseudo-count of the ridge prior at f = 1, in observation windows.
PRIOR = 0.1

# Squared relative errors of all queries together that are not worth fitting: far above rounding's.
NEGLIGIBLE = 1e-6

# The factors that can be. More than some would be to stand for what stage 1 evicted, which no step can know.
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
    """Return the logarithm of the factor of each query head's residual, what `residual_attend` takes as its bias.

    Errors are against exact attention to what is stored. No host sync.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens.
        buffers: the prompt's compacted tokens and their index.
        index: a sketch of the keys.
        params: the model's attention parameters.
        split: what a step may read.
        stored: N, tokens of the longest row.
        seen: tokens of the sequence.

    Returns:
        [B, H] float32; 0 for rows that a step reads whole.
    """
    keys, values, positions, lengths = buffers[:4]
    batch, heads, window, _ = query.shape
    kv_heads = keys.shape[1]
    terms = query.new_zeros(2, batch, kv_heads, heads // kv_heads, dtype=torch.float32)
    if split.top_k is not None and stored > split.token_budget:
        count = max(1, BLOCK_BYTES // (4 * batch * heads * stored))
        with full_precision(query.device):
            for start in range(0, window, count):
                part = query[:, :, start : start + count]
                last = torch.arange(start, start + part.shape[2], device=query.device) + (seen - window)
                # A step sees what came up to it.
                seen_by = (positions[:, :, None, :stored] <= last[:, None]) & (
                    torch.arange(stored, device=query.device) < lengths[..., None, None]
                )
                found = _terms(part, keys, values, seen_by, index, buffers.index_tensors, params, split, stored)
                # At padding there is no query.
                real = (seen_by & (positions[:, :, None, :stored] == last[:, None])).any(-1)
                terms += torch.where(real[:, :, None] & found.isfinite(), found, 0).sum(-1)
    cross, square = terms
    factor = (cross + PRIOR * square + NEGLIGIBLE) / ((1 + PRIOR) * square + NEGLIGIBLE)
    factor = torch.where((lengths > split.token_budget)[..., None], factor, 1.0)
    return factor.clamp(LEAST, MOST).log().flatten(1)


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
    """Return [2, B, Hkv, G, n], of queries [B, H, n, D] that see [B, Hkv, n, N] bool.

    With the error `u + f v` of a query's output over the output's length: the products `-u v` and `v v`.
    """
    batch, heads, count, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads, count)
    rows = query.reshape(*grouped, head_dim)
    estimates = index.score(rows.flatten(1, 3), index_tensors, keys, params, stored=stored, lengths=None)
    estimates = estimates.view(*grouped, stored)
    estimates = estimates.masked_fill(~seen[:, :, None], -torch.inf)
    # Each query is a row of its own.
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
    rest = estimates.masked_fill_((chosen | ~seen)[:, :, None], -torch.inf).logsumexp(-1)
    found = []
    for head in range(kv_heads):  # keys and values are turned to float32 one head at a time
        own = slice(head, head + 1)
        sink = None if params.sinks is None else params.sinks.view(kv_heads, -1)[head].float()
        found.append(
            _head_terms(
                rows[:, head].float() * params.scaling,
                keys[:, head, :stored].float(),
                values[:, head, :stored].float(),
                seen[:, own],
                chosen[:, own],
                rest[:, head],
                params.softcap,
                sink,
            )
        )
    return torch.stack(found, 2)


def _head_terms(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    chosen: Tensor,
    rest: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return [2, B, G, n] of one KV head: see `_terms`.

    Args:
        rows: [B, G, n, D], queries times the scaling.
        keys: [B, N, D].
        values: [B, N, Dv].
        seen: [B, 1, n, N] bool.
        chosen: [B, 1, n, N] bool, those of them that a step would attend to.
        rest: [B, G, n], the logit of the others together, by the estimates.
        softcap: of the logits, or None.
        sinks: [G], or None.
    """
    # The group's queries as rows of one matrix: keys and values are not copied for each head.
    logits = torch.bmm(rows.flatten(1, 2), keys.transpose(1, 2)).view(*rows.shape[:3], -1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    near = logits.masked_fill(~chosen, -torch.inf)
    columns = [logits.logsumexp(-1), near.logsumexp(-1), rest]
    weights = logits.softmax(-1), near.softmax(-1)
    out, own = (torch.bmm(weight.flatten(1, 2), values).view(*rows.shape[:3], -1) for weight in weights)
    others = (seen & ~chosen).float()
    mean = torch.bmm(others[:, 0], values)[:, None] / others.sum(-1, keepdim=True).clamp(min=1)
    # Shares of the chosen and of the others in a step's total, in which sinks have no value.
    sink = torch.full_like(rest, -torch.inf) if sinks is None else sinks[:, None].expand_as(rest)
    share = torch.stack((columns[1], rest, sink), -1).softmax(-1)
    out = out * torch.sigmoid(columns[0] - sink)[..., None]
    fixed = share[..., :1] * own - (share[..., :1] + share[..., 2:]) * out
    linear = share[..., 1:2] * (mean - out)
    size = out.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack(((-fixed * linear).sum(-1) / size, linear.square().sum(-1) / size))
