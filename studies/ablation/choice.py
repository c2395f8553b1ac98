"""Decode steps and storage of the ablation that select otherwise, or read less of the index.

The library ranks all stored tokens in every step, and each KV head attends to k. Here the heads of a layer share the
tokens that they attend to or store, heads attend to as many as they need, or a part of the index is not read. As in
`steps`, the code is not optimised; the arm counts the bytes.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens, S tokens of the
prompt, W window, P page size, r channels, U pages, k tokens attended to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rocketkv.core.eviction import pooled, window_scores
from rocketkv.core.pages import build_pages, page_count, score_pages
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import Sketch, rotation_matrix, rotation_norm, unpack
from rocketkv.core.topk import select_top
from rocketkv.state.store import KVStore

from .steps import Scored, Step, group_weights

LEAST = 0.25  # of an even share, which each head has at least where heads share
HIGH_BIT = 0.817  # mean size of a code of two bits whose high bit alone is known, in steps, of a normal distribution
BINS = 1 << 16  # of the histogram of costs


def mask_of(positions: Tensor, size: int) -> Tensor:
    """Return [..., size] bool, True at positions [..., k]."""
    found = torch.zeros(*positions.shape[:-1], size, dtype=torch.bool, device=positions.device)
    return found.scatter_(-1, positions, True)


def best_of_heads(weight: Tensor, count: int, least: float) -> Tensor:
    """Choose the tokens of largest weight over all KV heads together, some of each head's own in any case.

    Args:
        weight: [B, Hkv, N], comparable between heads.
        count: tokens a head, on average.
        least: share of `count` that each head gets at least.

    Returns:
        [B, Hkv, N] bool, `Hkv * count` of each row True.
    """
    kv_heads, size = weight.shape[1:]
    own = select_top(weight, max(1, int(least * count)))
    ranked = weight.scatter(-1, own, torch.inf).flatten(1)
    return mask_of(select_top(ranked, kv_heads * count), kv_heads * size).view_as(weight)


def near_mass(scored: Scored, chosen: Tensor) -> Tensor:
    """Return the exact logits [B, Hkv, G, N] of the chosen tokens [B, Hkv, N] bool, minus infinity at the others."""
    exact = scored.rows @ scored.keys.transpose(-1, -2)
    return exact.masked_fill(~chosen[:, :, None], -torch.inf)


def attend_chosen(scored: Scored, chosen: Tensor, rest: Tensor) -> Tensor:
    """Attend exactly to the chosen tokens, any number per head, and to the others as one token of their mean value.

    Args:
        scored: the step.
        chosen: [B, Hkv, N] bool.
        rest: [B, Hkv, G, 1], the logit of the others together.

    Returns:
        [B, H, Dv].
    """
    weight = torch.cat((near_mass(scored, chosen), rest), -1).softmax(-1)
    others = (scored.filled & ~chosen).float()
    mean = others[:, :, None] @ scored.values / others.sum(-1).clamp(min=1)[..., None, None]
    return (weight[..., :-1] @ scored.values + weight[..., -1:] * mean).flatten(1, 2)


def rest_of(scored: Scored, chosen: Tensor) -> Tensor:
    """Return the logit [B, Hkv, G, 1] of all other tokens together, by the estimates."""
    return scored.logits.masked_fill(chosen[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)


def shared_k_step(step: Step, *, least: float = LEAST) -> Tensor:
    """Attend to the Hkv * k tokens of largest estimated weight over all KV heads of the layer."""
    scored = step.score(uneven=True)
    chosen = best_of_heads(group_weights(scored.logits), scored.k, least)
    return attend_chosen(scored, chosen, rest_of(scored, chosen))


def value_norms_step(step: Step) -> Tensor:
    """Rank by estimated weight times the length of the value, which is kept in 16 bits."""
    scored = step.score(uneven=True)
    length = scored.values.norm(dim=-1).bfloat16().float()
    chosen = mask_of(select_top(group_weights(scored.logits) * length, scored.k), scored.keys.shape[2])
    return attend_chosen(scored, chosen, rest_of(scored, chosen))


@dataclass
class CostThreshold:
    """Cost up to which every head of every layer attends to tokens, and the tokens attended to.

    Attributes:
        most: lowest and highest possible threshold.
        value: the threshold; None while it is fitted: then heads attend to k tokens, and costs are counted.
        tokens: [BINS] float64, histogram of the costs of all steps' tokens.
        rows: number of rankings counted.
        attended: tokens that the last step attended to, mean over rows and KV heads.
    """

    most: tuple[float, float]
    value: float | None = None
    tokens: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    rows: int = 0
    attended: float = 0.0

    def within(self, cost: Tensor, k: int) -> Tensor:
        """Return which tokens are attended to, [B, Hkv, N] bool, given the cost of each."""
        if self.value is None:
            self.tokens += torch.histc(cost.clamp(*self.most), BINS, *self.most).double()
            self.rows += cost.shape[0] * cost.shape[1]
            chosen = mask_of(select_top(-cost, k), cost.shape[-1])
        else:
            chosen = cost < self.value
        self.attended = float(chosen.sum(-1).double().mean())
        return chosen


def cost_threshold(
    window: Tensor, keys: Tensor, values: Tensor, store: KVStore, params: AttentionParams, *, most: tuple[float, float]
) -> CostThreshold:
    """Return the state of steps with a cost threshold, before it is fitted."""
    return CostThreshold(most)


def fitted_threshold(states: Sequence[CostThreshold], count: int) -> float:
    """Return the highest threshold with which steps attended to at most `count` tokens a head."""
    attended = torch.stack([state.tokens for state in states]).sum(0).cumsum(0) / sum(state.rows for state in states)
    low, high = states[0].most
    return low + (high - low) * max(1, int((attended <= count).sum())) / BINS


def top_p_step(step: Step) -> Tensor:
    """Attend, in each head, to the fewest tokens whose estimated weight, mean over the group, reaches a share p."""
    scored = step.score(uneven=True)
    weight = group_weights(scored.logits) / scored.logits.shape[2]
    order = weight.argsort(dim=-1, descending=True, stable=True)
    ranked = weight.gather(-1, order)
    before = torch.zeros_like(weight).scatter_(-1, order, ranked.cumsum(-1) - ranked)
    chosen = step.state.within(before.masked_fill(~scored.filled, torch.inf), scored.k)
    return attend_chosen(scored, chosen, rest_of(scored, chosen))


def heavy(weight: Tensor, state: CostThreshold, k: int, least: float) -> Tensor:
    """Return the tokens [B, Hkv, N] bool whose weight reaches the state's threshold, and each head's best.

    Args:
        weight: [B, Hkv, N], mean over the group.
        state: the threshold of minus the weight's logarithm.
        k: tokens of a head on average.
        least: share of k that each head has in any case.
    """
    own = select_top(weight, max(1, int(least * k)))
    return state.within((-weight.log()).scatter(-1, own, -torch.inf), k)


def least_weight_step(step: Step, *, least: float = LEAST) -> Tensor:
    """Attend to all tokens whose estimated weight, mean over the group, reaches a threshold, and each head's best."""
    scored = step.score(uneven=True)
    weight = group_weights(scored.logits) / scored.logits.shape[2]
    chosen = heavy(weight, step.state, scored.k, least)
    return attend_chosen(scored, chosen, rest_of(scored, chosen))


@dataclass
class Selection:
    """The state of `reuse_step` from one step to the next.

    Attributes:
        chosen: [B, Hkv, N] bool.
        rest: [B, Hkv, G, 1], the logit of the other tokens less that of the chosen.
    """

    chosen: Tensor | None = None
    rest: Tensor | None = None


def no_selection(window: Tensor, keys: Tensor, values: Tensor, store: KVStore, params: AttentionParams) -> Selection:
    """Return the state with which `reuse_step` begins."""
    return Selection()


def reuse_step(step: Step, *, period: int) -> Tensor:
    """Rank tokens in every `period`-th step; in those between, attend to the same and to newer tokens.

    The other tokens keep their weight relative to the chosen.
    """
    scored = step.score()
    size = scored.keys.shape[2]
    state: Selection = step.state
    if (step.store.generated - 1) % period == 0 or state.chosen is None or state.rest is None:
        chosen = mask_of(select_top(group_weights(scored.logits), scored.k), size)
        rest = rest_of(scored, chosen)
        state.chosen = chosen
        state.rest = rest - near_mass(scored, chosen).logsumexp(-1, keepdim=True)
        return attend_chosen(scored, chosen, rest)
    missing = size - state.chosen.shape[-1]
    old = torch.nn.functional.pad(state.chosen, (0, missing))
    chosen = torch.nn.functional.pad(state.chosen, (0, missing), value=True)
    return attend_chosen(scored, chosen, state.rest + near_mass(scored, old).logsumexp(-1, keepdim=True))


def scored_pages(pages: int, share: float) -> int:
    """Return how many of U pages a coarse ranking leaves."""
    return math.ceil(pages * share)


def near_tokens(
    query: Tensor, scored: Scored, params: AttentionParams, *, page_size: int, channels: int, share: float
) -> Tensor:
    """Return the tokens [B, Hkv, N] bool of the pages that rank first by their bounds, for queries [B, H, D]."""
    size = scored.keys.shape[2]
    bounds, pages = build_pages(scored.keys, size, page_size), page_count(size, page_size)
    sizes = {"page_size": page_size, "channels": channels}
    logits = score_pages(query, bounds, scored.keys, params, stored=size, lengths=None, **sizes)
    weight = group_weights(logits.view(*scored.logits.shape[:3], pages))
    near = mask_of(select_top(weight, scored_pages(pages, share)), pages)
    return near.repeat_interleave(page_size, dim=-1)[..., :size]


def coarse_step(step: Step, *, page_size: int, channels: int, share: float) -> Tensor:
    """Choose pages by their bounds, as the paper's stage 2 does, and rank the tokens of those alone by the sketch.

    The tokens that are not scored count for nothing in the residual.

    Args:
        step: its inputs.
        page_size: P.
        channels: r.
        share: of the pages that are scored.
    """
    scored = step.score()
    near = near_tokens(step.query, scored, step.params, page_size=page_size, channels=channels, share=share)
    logits = scored.logits.masked_fill(~near[:, :, None], -torch.inf)
    chosen = mask_of(select_top(group_weights(logits), scored.k), scored.keys.shape[2])
    return attend_chosen(scored, chosen, logits.masked_fill(chosen[:, :, None], -torch.inf).logsumexp(-1, keepdim=True))


def high_bit_logits(scored: Scored, store: KVStore) -> Tensor:
    """Estimate the logits [B, Hkv, G, N] of a step by the high bits alone of the store's sketch of two."""
    if store.decoding.split.sketch_bits != 2:
        raise ValueError("high bits are those of a sketch of two bits: give the split sketch_bits=2")
    sketch = Sketch(*store.decoding.buffers.index_tensors)
    size, head_dim = scored.keys.shape[2:]
    high = torch.where(unpack(sketch.codes[:, :, :size], 2, head_dim) >= 2, HIGH_BIT, -HIGH_BIT)
    turned = scored.rows @ rotation_matrix(head_dim).T / rotation_norm(head_dim)
    logits = turned @ high.transpose(-1, -2) * sketch.scales[:, :, None, :size].float()
    return (logits + scored.rows @ sketch.mean[..., None]).masked_fill(~scored.filled[:, :, None], -torch.inf)


def planes_step(step: Step, *, share: float, least: float = LEAST) -> Tensor:
    """Score all tokens by the high bit of a sketch of two, and the best of them, and they alone, by both.

    The residual counts the others by their high bits. With a state, heads attend to as many tokens as they need, as in
    `least_weight_step`, else to k tokens.

    Args:
        step: its inputs; a sketch of two bits, and a cost threshold or None as state.
        share: of a row's tokens that are scored by both bits.
        least: see `least_weight_step`.
    """
    scored = step.score(uneven=True)
    size, rough = scored.keys.shape[2], high_bit_logits(scored, step.store)
    count = (scored.filled.sum(-1, keepdim=True) * share).ceil().clamp(min=scored.k)
    order = group_weights(rough).argsort(dim=-1, descending=True, stable=True)
    near = torch.zeros_like(scored.filled).scatter_(-1, order, torch.arange(size) < count)
    logits = torch.where(near[:, :, None], scored.logits, rough)
    weight = (group_weights(logits) / logits.shape[2]).masked_fill(~near, 0)
    if step.state is None:
        chosen = mask_of(select_top(weight, scored.k), size)
    else:
        chosen = heavy(weight, step.state, scored.k, least)
    rest = logits.masked_fill(chosen[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
    return attend_chosen(scored, chosen, rest)


def shared_storage(
    window: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: int,
    params: AttentionParams,
    *,
    kernel_size: int,
    least: float = LEAST,
    by_values: bool = False,
) -> Tensor:
    """Return which tokens each head stores where the heads of a layer share Hkv * N (AdaKV, arXiv 2407.11550).

    Args:
        window: [B, H, W, D], the prompt's last queries.
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        kept: N, of a head on average.
        params: the model's attention parameters.
        kernel_size: of the pooling.
        least: share of N that each head stores at least.
        by_values: whether to rank by scores times the length of the value, over its mean in the head.

    Returns:
        [B, Hkv, S] bool.
    """
    size = window.shape[2]
    scores = window_scores(window, keys, params)
    if by_values:
        length = values[:, :, :-size].norm(dim=-1)
        scores = scores * length / length.mean(-1, keepdim=True)
    best = best_of_heads(pooled(scores, kernel_size), kept - size, least)
    return torch.nn.functional.pad(best, (0, size), value=True)
