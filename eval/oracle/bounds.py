"""Oracle bounds of one layer: the fewest tokens that attention needs for an error, and the parts of a method's error.

The tokens of a decode step are ranked by true weight: softmax per query head, mean over the group, ties by the rule of
`select_top`. A step needs the smallest prefix of that ranking for which exact attention is within a relative L2 error
of attention to all tokens, over the group's outputs together. Two bounds follow (as in EMPIRIC, Behnam et al., SIGOPS
Operating Systems Review 2025):

- *compute*: the size of each step's prefix, the tokens that a step must read if all are stored;
- *storage*: the size of the prefixes' union over steps, the tokens that must be stored for all steps.

Errors are not monotone in a prefix's size, and the union of prefixes is not the smallest sufficient set: both are
bounds for methods that rank tokens by weight, as all methods of this library do.

Letters: G query heads of a group, H query heads, Hkv KV heads, D and Dv head dims, S tokens, m steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Partial outputs of a block of ranked tokens, [steps, G, block, Dv] in float64, stay under this.
BLOCK_BYTES = 16 * 2**20

# A relative error below this is rounding in float32: it has no parts.
EXACT = 1e-5

PARTS = ("eviction", "k", "index", "residual")


class Prefixes(NamedTuple):
    """The tokens that the steps of one KV head need.

    Attributes:
        sizes: [m] int64, tokens of each step's prefix.
        ranking: [m, S] int64, each step's tokens from the largest weight down.
    """

    sizes: Tensor
    ranking: Tensor


def group_weights(
    query: Tensor, keys: Tensor, *, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention weights of decode steps for the last m of S tokens; each token attends to itself.

    Args:
        query: [G, m, D], one group's queries.
        keys: [S, D], its keys.
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [G], one learned logit a head that joins the softmax's denominator, or None.

    Returns:
        [G, m, S] float64, 0 at later tokens; with `sinks` they add up to less than 1.

    Raises:
        ValueError: there are more steps than tokens.
    """
    steps, size = query.shape[1], keys.shape[0]
    if steps > size:
        raise ValueError(f"query must have one step per token, at most {size} steps, got {steps}")
    logits = torch.matmul(query.double() * scaling, keys.double().t())
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    end = torch.arange(size - steps, size, device=keys.device)
    logits.masked_fill_(torch.arange(size, device=keys.device) > end[:, None], -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.double()[:, None, None].expand(-1, steps, 1)
    return torch.cat((logits, column), -1).softmax(-1)[..., :-1]


def smallest_prefixes(weights: Tensor, values: Tensor, error: float) -> Prefixes:
    """Return the smallest prefix of each step's ranking for which attention is within an error of attention to all.

    Attention to a prefix is renormalised as in `attention.attend`: weights over their sum and the sinks' share.

    Args:
        weights: [G, m, S] float64, of `group_weights`.
        values: [S, Dv].
        error: the largest relative L2 error over the group's outputs together.

    Raises:
        ValueError: the error is not between 0 and 1, or weights or values are not finite.
    """
    if not 0 < error < 1:
        raise ValueError(f"error must be between 0 and 1, a share of the output's norm; got {error}")
    values = values.double()
    if not bool(weights.isfinite().all() and values.isfinite().all()):
        raise ValueError(
            "weights and values must be finite, got NaN or inf; check the model's queries, keys and values"
        )
    group, steps, size = weights.shape
    ranking = weights.sum(0).sort(dim=-1, descending=True, stable=True).indices
    full = torch.matmul(weights, values).transpose(0, 1)  # [m, G, Dv]
    bound = error * full.square().sum((1, 2)).sqrt()
    sink_share = (1 - weights.sum(-1)).clamp(min=0).t() if size else weights.new_zeros(steps, group)
    # Without sinks, rounding leaves a share of 1e-16.
    sink_share = torch.where(sink_share < 1e-12, 0.0, sink_share)[..., None]
    sizes = torch.full((steps,), size, device=weights.device)
    open_steps = torch.arange(steps, device=weights.device)
    total, mass = torch.zeros_like(full), sink_share
    start = 0
    while start < size and len(open_steps):
        block = max(1, BLOCK_BYTES // (8 * len(open_steps) * group * values.shape[1]))
        tokens = ranking[open_steps, start : start + block]  # [open, block]
        chosen = weights[:, open_steps].gather(-1, tokens.expand(group, -1, -1)).transpose(0, 1)  # [open, G, block]
        sums = (chosen[..., None] * values[tokens][:, None]).cumsum(2).add_(total[:, :, None])
        masses = chosen.cumsum(-1).add_(mass)
        out = sums / masses.clamp(min=torch.finfo(torch.float64).tiny)[..., None]
        distance = (out - full[open_steps][:, :, None]).square().sum((1, 3)).sqrt()  # [open, block]
        within = distance <= bound[open_steps][:, None]
        found = within.any(-1)
        first = within.byte().argmax(-1)
        sizes[open_steps[found]] = start + first[found] + 1
        left = ~found
        open_steps, total, mass = open_steps[left], sums[left][:, :, -1], masses[left][..., -1:]
        start += tokens.shape[1]
    # No step needs later tokens, even if rounding rejected every prefix.
    seen = torch.arange(size - steps + 1, size + 1, device=weights.device)
    return Prefixes(torch.minimum(sizes, seen), ranking)


def union(prefixes: Prefixes) -> Tensor:
    """Return which of the S tokens are in any step's prefix, [S] bool."""
    steps, size = prefixes.ranking.shape
    needed = torch.arange(size, device=prefixes.sizes.device) < prefixes.sizes[:, None]
    chosen = torch.zeros(steps, size, dtype=torch.bool, device=needed.device).scatter_(1, prefixes.ranking, needed)
    return chosen.any(0)


class Parts(NamedTuple):
    """The parts of an error vector, over the steps of one KV head.

    Attributes:
        errors: of each stage after the first (full attention): relative L2, mean over steps.
        square: the total's squared relative norm, summed over steps.
        products: of each part with the total, summed over steps: they add up to `square`.
        gap: largest relative distance of the total from the sum of its parts, of any step.
    """

    errors: list[float]
    square: float
    products: list[float]
    gap: float


def decompose(outputs: Sequence[Tensor], total: Tensor) -> Parts:
    """Split the error of the last stage into the difference vectors between consecutive stages.

    All vectors are divided by the norm of the first stage's output of their step, so all steps have the same weight.

    Args:
        outputs: of each stage, [m, n]; the first is full attention, the last the method.
        total: [m, n], the last less the first, computed independently of `outputs`.
    """
    full = outputs[0].double()
    norm = full.square().sum(-1, keepdim=True).sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    stages = [output.double() / norm for output in outputs]
    whole = total.double() / norm
    parts = [after - before for before, after in itertools.pairwise(stages)]
    gap = (torch.stack(parts).sum(0) - whole).square().sum(-1).sqrt().max()
    errors = [float((stage - stages[0]).square().sum(-1).sqrt().mean()) for stage in stages[1:]]
    products = [float((part * whole).sum()) for part in parts]
    return Parts(errors, float(whole.square().sum()), products, float(gap))


def shares(square: float, products: Sequence[float], steps: int) -> list[float] | None:
    """Return the projection share of each part, which add up to 1, or None if the error is only rounding.

    Args:
        square: see `Parts`, summed over heads or texts.
        products: see `Parts`, summed likewise.
        steps: number of steps in the sums.
    """
    if square <= steps * EXACT**2:
        return None
    return [product / square for product in products]
