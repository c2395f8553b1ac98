"""Replacements of a stage in an ablation: other ranks of stage 1, other decode steps.

The steps are not optimised and may read more than the arm counts. All rows of a store have equally many tokens, and
models have neither soft-cap nor learned sinks.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, N stored tokens, S tokens of the
prompt, k tokens attended to, m segments.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rocketkv.core.eviction import TORCH_OPS, EvictionOps, pooled, window_scores
from rocketkv.core.params import AttentionParams
from rocketkv.core.residual import overestimate
from rocketkv.core.sketch import Sketch, decode, rotation_matrix
from rocketkv.core.topk import gather_tokens, select_top
from rocketkv.dispatch import decode_step
from rocketkv.state.store import KVStore

# Factors of the residual's weight that a calibration chooses from.
FACTORS = (1e-4, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.15, 1.3, 1.6)
WIDE_FACTORS = (*FACTORS, 2.0, 2.5, 3.0, 4.0, 6.0)  # where the weight stands for evicted tokens, too

# Ranks of stage 1: its operations, given the layer's values and number.


def random_ranks(values: Tensor, number: int) -> EvictionOps:
    """Rank the tokens before the observation window by chance: the control."""

    def scores(window: Tensor, keys: Tensor, params: AttentionParams, **_: Any) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.rand(*keys.shape[:2], keys.shape[2] - window.shape[2], generator=generator)

    def unpooled(scores: Tensor, window: int, **_: Any) -> Tensor:
        return _with_window(scores, window)

    return TORCH_OPS._replace(window_scores=scores, pool_scores=unpooled)


def unpooled_ties(values: Tensor, number: int) -> EvictionOps:
    """Rank tokens of equal pooled scores by their own scores, not by their positions."""

    def places(scores: Tensor, window: int, *, kernel_size: int, pool_offset: int, **_: Any) -> Tensor:
        order = scores.argsort(dim=-1, stable=True)
        ranks_of = pooled(scores, kernel_size, pool_offset)
        order = order.gather(-1, ranks_of.gather(-1, order).argsort(dim=-1, stable=True))
        place = torch.arange(scores.shape[-1], dtype=torch.float32).expand_as(scores)
        return _with_window(torch.zeros_like(scores).scatter_(-1, order, place), window)

    return TORCH_OPS._replace(pool_scores=places)


def by_value_norms(values: Tensor, number: int) -> EvictionOps:
    """Rank tokens by attention times the length of their values."""

    def scores(window: Tensor, keys: Tensor, params: AttentionParams, **_: Any) -> Tensor:
        norms: Tensor = values[:, :, : -window.shape[2]].norm(dim=-1)
        return window_scores(window, keys, params) * norms

    return TORCH_OPS._replace(window_scores=scores)


def _with_window(scores: Tensor, size: int) -> Tensor:
    return functional.pad(scores, (0, size), value=torch.inf)


# Decode steps.


class Scored(NamedTuple):
    """A step whose token is stored and whose tokens are scored.

    Attributes:
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        logits: [B, Hkv, G, N], estimates.
        rows: [B, Hkv, G, D], the queries times the scaling.
        k: tokens to choose.
        filled: [B, Hkv, N] bool, False after the last token of a shorter row, where logits are minus infinity.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor
    rows: Tensor
    k: int
    filled: Tensor


class Step(NamedTuple):
    """The inputs of one decode step.

    Attributes:
        query: [B, H, D].
        key: [B, Hkv, D].
        value: [B, Hkv, Dv].
        store: the layer's.
        state: of the arm, from its `summary`; None without one.
        params: the model's attention parameters.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    store: KVStore
    state: Any
    params: AttentionParams

    def score(self, *, uneven: bool = False) -> Scored:
        """Append the token and score all stored tokens by the index; rows may differ in length where `uneven`."""
        store, query, params = self.store, self.query, self.params
        store.append(self.key, self.value)
        decoding, stored = store.decoding, store.stored
        index, split, seq_lens = decoding.index, decoding.split, decoding.buffers.seq_lens
        if split.top_k is None or index is None:
            raise ValueError("such a step needs a store that is scored")
        if params.softcap is not None or params.sinks is not None:
            raise ValueError("such a step takes no soft-cap and no learned sinks")
        if not (store.uniform or uneven):
            raise ValueError("such a step takes no rows of fewer tokens than others")
        keys, values = decoding.keys[:, :, :stored], decoding.values[:, :, :stored]
        lengths = None if store.uniform else seq_lens
        tensors = decoding.buffers.index_tensors
        logits = index.score(query, tensors, decoding.keys, params, stored=stored, lengths=lengths)
        grouped = (query.shape[0], keys.shape[1], query.shape[1] // keys.shape[1], -1)
        filled = torch.arange(stored) < seq_lens[..., None]
        logits = logits.view(grouped).masked_fill(~filled[:, :, None], -torch.inf)
        return Scored(keys, values, logits, query.view(grouped) * params.scaling, min(split.top_k, stored), filled)


def plain_step(step: Step) -> Tensor:
    """Run the library's own decode step."""
    return decode_step(step.query, step.key, step.value, step.store, step.params, backend="torch")


def group_weights(logits: Tensor) -> Tensor:
    """Return the weights [B, Hkv, N] by which the library ranks tokens, from logits [B, Hkv, G, N]."""
    return logits.softmax(-1).sum(2)


def _without(logits: Tensor, positions: Tensor) -> Tensor:
    return logits.scatter(-1, positions[:, :, None].expand(*logits.shape[:3], -1), -torch.inf)


def _mean_of_others(values: Tensor, own: Tensor) -> Tensor:
    """Return the mean [B, Hkv, 1, Dv] of the values that are not the chosen ones [B, Hkv, k, Dv]."""
    count = max(1, values.shape[2] - own.shape[2])
    return ((values.sum(2, dtype=torch.float64) - own.sum(2, dtype=torch.float64)) / count).float()[:, :, None]


def _attended(scored: Scored, positions: Tensor, columns: Tensor, column_values: Tensor) -> Tensor:
    """Attend exactly to chosen tokens and to further columns.

    Args:
        scored: the step.
        positions: [B, Hkv, k], the chosen tokens.
        columns: [B, Hkv, G, m], logits.
        column_values: [B, Hkv, m, Dv].

    Returns:
        [B, H, Dv].
    """
    keys, values = gather_tokens(positions, scored.keys, scored.values)
    near = scored.rows @ keys.transpose(-1, -2)
    weight = torch.cat((near, columns - _overestimated(scored, positions, near)), -1).softmax(-1)
    return (weight @ torch.cat((values, column_values), 2)).flatten(1, 2)


def _overestimated(scored: Scored, positions: Tensor, near: Tensor) -> Tensor:
    """Return by how much the others' log mass [B, Hkv, G, 1] is lowered, from the exact logits [B, Hkv, G, k]."""
    chosen = scored.logits.gather(-1, positions[:, :, None].expand_as(near))
    return overestimate(near.logsumexp(-1, keepdim=True), chosen.logsumexp(-1, keepdim=True))


def sketch_mass_step(step: Step) -> Tensor:
    """Take the weight of the chosen tokens from the estimates, too, as SparQ does."""
    scored = step.score()
    positions = select_top(group_weights(scored.logits), scored.k)
    keys, values = gather_tokens(positions, scored.keys, scored.values)
    out = (scored.rows @ keys.transpose(-1, -2)).softmax(-1) @ values
    chosen = positions[:, :, None].expand(*scored.logits.shape[:3], -1)
    rest = scored.logits.softmax(-1).scatter(-1, chosen, 0).sum(-1, keepdim=True)
    return ((1 - rest) * out + rest * _mean_of_others(scored.values, values)).flatten(1, 2)


def ends_step(step: Step) -> Tensor:
    """Attend to the first four tokens and to the last k/8 regardless of their scores."""
    scored = step.score()
    shared = group_weights(scored.logits)
    shared[..., :4] = shared[..., -max(1, scored.k // 8) :] = torch.inf
    positions = select_top(shared, scored.k)
    columns = _without(scored.logits, positions).logsumexp(-1, keepdim=True)
    own = gather_tokens(positions, scored.values)[0]
    return _attended(scored, positions, columns, _mean_of_others(scored.values, own))


def segments_step(step: Step, *, segments: int) -> Tensor:
    """Use a residual for each of m runs of neighbouring tokens, each with its mean value."""
    scored = step.score()
    positions = select_top(group_weights(scored.logits), scored.k)
    return _attended(scored, positions, *_segment_columns(scored, positions, segments))


def _segment_columns(scored: Scored, positions: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Return logits [B, Hkv, G, m] and values [B, Hkv, m, Dv] of the other tokens, a column a segment."""
    stored = scored.values.shape[2]
    size = -(-stored // segments)
    missing = size * segments - stored
    others = functional.pad(_without(scored.logits, positions), (0, missing), value=-torch.inf)
    columns = others.view(*others.shape[:3], segments, size).logsumexp(-1)
    left = torch.ones(*positions.shape[:2], stored).scatter_(2, positions, 0)
    left = functional.pad(left, (0, missing)).view(*left.shape[:2], segments, size)
    values = functional.pad(scored.values, (0, 0, 0, missing)).view(*left.shape, -1)
    mean = (values * left[..., None]).sum(3) / left.sum(-1).clamp(min=1)[..., None]
    return columns, mean


class Evicted(NamedTuple):
    """A summary of the tokens that stage 1 evicted, for each of m runs of them.

    Attributes:
        tokens: [B, Hkv, m, 1], how many.
        key: [B, Hkv, m, D], their mean key.
        variance: [B, Hkv, m, D], of each channel.
        value: [B, Hkv, m, Dv], their mean value.
    """

    tokens: Tensor
    key: Tensor
    variance: Tensor
    value: Tensor


def evicted_summary(
    window: Tensor, keys: Tensor, values: Tensor, store: KVStore, params: AttentionParams, *, runs: int
) -> Evicted:
    """Summarise the evicted tokens of a prompt's keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]."""
    batch, kv_heads, size = keys.shape[:3]
    kept = store.decoding.positions[:, :, : store.stored].long()
    left = torch.ones(batch, kv_heads, size, dtype=torch.bool).scatter_(2, kept, False)
    gone = size - kept.shape[2]
    if gone < runs:
        raise ValueError(f"there must be at least {runs} evicted tokens to summarise, got {gone}")
    place = left.nonzero()[:, 2].view(batch, kv_heads, gone)  # every row lost as many
    bounds = [round(run * gone / runs) for run in range(runs + 1)]
    parts: list[list[Tensor]] = [[], [], [], []]
    for start, stop in itertools.pairwise(bounds):
        own_keys, own_values = gather_tokens(place[..., start:stop], keys, values)
        parts[0].append(torch.full((batch, kv_heads, 1), float(stop - start)))
        parts[1].append(own_keys.mean(2))
        parts[2].append(own_keys.var(2, correction=0))
        parts[3].append(own_values.mean(2))
    return Evicted(*(torch.stack(part, 2) for part in parts))


def evicted_step(step: Step, *, with_variance: bool) -> Tensor:
    """Include the evicted tokens: their mean value, with the weight of normally distributed logits.

    The mean of exp(l) for normal l is exp(mean + variance / 2); channels are taken as independent of each other.
    """
    scored = step.score()
    positions = select_top(group_weights(scored.logits), scored.k)
    columns, own = _segment_columns(scored, positions, 1)
    logits = scored.rows @ step.state.key.transpose(-1, -2) + step.state.tokens.log().transpose(-1, -2)
    if with_variance:
        logits = logits + scored.rows.square() @ step.state.variance.transpose(-1, -2) / 2
    return _attended(scored, positions, torch.cat((columns, logits), -1), torch.cat((own, step.state.value), 2))


class Calibrated(NamedTuple):
    """Calibration of the residual of each query head by the window's queries.

    Attributes:
        factor: [B, Hkv, G, 1], of its weight.
        value: [B, Hkv, G, Dv], the mean, by weight and over those queries, of the values that their steps would have
            left out, evicted ones included; or None for the mean value of the stored tokens that are left out.
    """

    factor: Tensor
    value: Tensor | None


def calibrate(
    window: Tensor, keys: Tensor, values: Tensor, store: KVStore, params: AttentionParams, *, learned: bool
) -> Calibrated:
    """Choose the factors with the least error for the window's queries as steps.

    Errors are against exact attention to the whole prompt.

    Args:
        window: [B, H, W, D].
        keys: [B, Hkv, S, D], the prompt's.
        values: [B, Hkv, S, Dv].
        store: the closed store.
        params: the model's attention parameters.
        learned: whether the value, too, is that of the window's queries.
    """
    decoding = store.decoding
    split = decoding.split
    if split.top_k is None or split.sketch_bits is None or params.softcap is not None or params.sinks is not None:
        raise ValueError("calibration needs a sketch, and takes no soft-cap and no learned sinks")
    batch, kv_heads, size, head_dim = keys.shape
    queries, stored, k = window.shape[2], store.stored, min(split.top_k, store.stored)
    rows = window.view(batch, kv_heads, -1, queries, head_dim) * params.scaling
    own = torch.arange(size - queries, size)[:, None]
    logits = (rows @ keys[:, :, None].transpose(-1, -2)).masked_fill(torch.arange(size) > own, -torch.inf)
    expected = logits.softmax(-1) @ values[:, :, None]
    place = decoding.positions[:, :, None, :stored].long()
    hidden = place > own  # [B, Hkv, W, N]
    kept_keys, kept = decoding.keys[:, :, None, :stored], decoding.values[:, :, None, :stored]
    sketch = Sketch(*decoding.buffers.index_tensors)
    sketched = decode(sketch, stored, rotation_matrix(head_dim, keys.device), split.sketch_bits)
    estimate = (rows @ sketched[:, :, None].transpose(-1, -2)).masked_fill(hidden[:, :, None], -torch.inf)
    chosen = torch.zeros_like(hidden).scatter_(-1, select_top(estimate.softmax(-1).sum(2), k), True)
    others = ~(chosen | hidden)
    rest = estimate.masked_fill(~others[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
    near = (rows @ kept_keys.transpose(-1, -2)).masked_fill(~chosen[:, :, None], -torch.inf)
    value = None
    if learned:
        taken = torch.zeros(logits.shape[:2] + logits.shape[3:], dtype=torch.bool)
        taken = taken.scatter_(-1, place.expand_as(hidden), chosen)
        left = logits.masked_fill(taken[:, :, None], -torch.inf).softmax(-1)
        value = (left @ values[:, :, None]).mean(3)
        filled = value[:, :, :, None]
    else:
        mean = others.float() @ kept[:, :, 0] / others.sum(-1, keepdim=True).clamp(min=1)
        filled = mean[:, :, None]  # [B, Hkv, 1, W, Dv]
    factors = WIDE_FACTORS if learned else FACTORS
    errors = []
    for factor in factors:
        weight = torch.cat((near, rest + math.log(factor)), -1).softmax(-1)
        out = weight[..., :-1] @ kept + weight[..., -1:] * filled
        errors.append(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).mean(-1))
    return Calibrated(torch.tensor(factors)[torch.stack(errors).argmin(0)][..., None], value)


def calibrated_step(step: Step) -> Tensor:
    """Use a residual whose weight, and optionally value, is calibrated for each query head."""
    scored = step.score()
    positions = select_top(group_weights(scored.logits), scored.k)
    keys, values = gather_tokens(positions, scored.keys, scored.values)
    near = scored.rows @ keys.transpose(-1, -2)
    column = _without(scored.logits, positions).logsumexp(-1, keepdim=True) - _overestimated(scored, positions, near)
    weight = torch.cat((near, column + step.state.factor.log()), -1).softmax(-1)
    other = _mean_of_others(scored.values, values) if step.state.value is None else step.state.value
    return (weight[..., :-1] @ values + weight[..., -1:] * other).flatten(1, 2)
