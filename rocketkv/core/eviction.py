"""Stage 1, permanent eviction at the end of a prompt: importance scores of its tokens.

Source: paper (arXiv 2502.14051), section 3.3, "First Stage: SnapKV": SnapKV (arXiv 2404.14469) with a larger pooling
kernel and one selection per KV head.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens, W window queries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .calibration import Weighed, weigh_chosen
from .compact import compact
from .params import AttentionParams
from .scratch import block_length
from .sketch import write_tokens
from .topk import full_precision, select_top

# Largest logits of one KV head that are kept whole on a CPU, in bytes.
MOST_LOGITS = 16 * 2**20

# Numbers of float32 in some cache lines: a length of rows that are read and written fast.
LINE = 64


@torch.no_grad()  # a model's learned sinks are parameters
def window_scores(
    query: Tensor,
    key: Tensor,
    params: AttentionParams,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Sum the attention weights of the observation window's queries on every earlier token, per KV head.

    The sum is over the W queries and the heads of a group. Softmax attention in float32, causal inside the window. On a
    CPU the keys are read once, row by row and KV head by KV head, where the logits of one are few enough; else twice,
    block by block.

    Args:
        query: [B, H, W, D], the queries of the last W tokens (the observation window).
        key: [B, Hkv, S, D], all keys; the last W are those of the window.
        params: the model's attention parameters.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None without padding.

    Returns:
        [B, Hkv, S - W] float32; 0 at padding.
    """
    batch, heads, window, head_dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = query.float().reshape(batch, kv_heads, group * window, head_dim) * params.scaling
    if key.device.type == "cpu" and 4 * group * window * size <= MOST_LOGITS:
        return _scores_by_head(rows, key, params, window, valid)
    block = max(window, block_length(key.device, 4 * batch * heads * window))

    def logits(start: int, stop: int) -> Tensor:
        # [B, Hkv, G * W, block]
        scores = torch.matmul(rows, key[:, :, start:stop].float().transpose(-1, -2))
        if params.softcap is not None:
            scores = torch.tanh_(scores.div_(params.softcap)).mul_(params.softcap)
        if valid is not None:
            scores.masked_fill_(~valid[:, :, None, start:stop], -torch.inf)
        if stop > size - window:
            token = torch.arange(start, stop, device=key.device)
            own = torch.arange(size - window, size, device=key.device).repeat(group)
            scores.masked_fill_(token > own[:, None], -torch.inf)
        return scores

    peak = torch.full((batch, kv_heads, group * window), -torch.inf, dtype=torch.float32, device=key.device)
    if params.sinks is not None:
        own_sinks = params.sinks.float().reshape(1, kv_heads, group, 1)
        peak = own_sinks.expand(batch, -1, -1, window).reshape_as(peak).clone()
    mass = torch.zeros_like(peak) if params.sinks is None else torch.ones_like(peak)
    for start in range(0, size, block):
        scores = logits(start, min(start + block, size))
        new_peak = torch.maximum(peak, scores.amax(-1))
        # A row of only padding has no finite peak; zero keeps its exponentials at zero.
        anchor = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        mass = mass * torch.exp(peak - anchor) + scores.sub_(anchor[..., None]).exp_().sum(-1)
        peak = new_peak
    anchor = torch.where(peak == -torch.inf, 0.0, peak)
    weight = torch.where(mass > 0, 1.0 / mass, 0.0)
    if valid is not None:
        real = valid[:, :, -window:].expand(-1, kv_heads, -1)
        weight = weight * real.repeat(1, 1, group)
    total = torch.empty(batch, kv_heads, size - window, dtype=torch.float32, device=key.device)
    for start in range(0, size - window, block):
        stop = min(start + block, size - window)
        scores = logits(start, stop)
        total[:, :, start:stop] = torch.matmul(weight[:, :, None], scores.sub_(anchor[..., None]).exp_())[:, :, 0]
    return total


def _scores_by_head(rows: Tensor, key: Tensor, params: AttentionParams, window: int, valid: Tensor | None) -> Tensor:
    """Return the scores of `window_scores`, one row and KV head at a time.

    Args:
        rows: [B, Hkv, G W, D] float32, the window's scaled queries.
        key: [B, Hkv, S, D].
        params: the model's attention parameters.
        window: W.
        valid: [B, 1 or Hkv, S] bool, or None.
    """
    batch, kv_heads, count, _ = rows.shape
    size = key.shape[2]
    # Blocks stay in a core's cache from the product to the exponentials; rows begin with cache lines.
    length = max(1, block_length(key.device, 4 * count) // LINE) * LINE
    scratch = [rows.new_empty(count * min(length, size - start)) for start in range(0, size, length)]
    sinks = None if params.sinks is None else params.sinks.float().view(kv_heads, -1).repeat_interleave(window, 1)
    later = torch.full((window, window), -torch.inf).triu_(1).repeat(count // window, 1)
    total = rows.new_zeros(batch, kv_heads, size - window)
    for row in range(batch):
        for head in range(kv_heads):
            real = None if valid is None else valid[row, min(head, valid.shape[1] - 1)]
            first = 0 if real is None else min(int(real.byte().argmax()), size - window)  # a padded row as if alone
            own = None if real is None or real[first:].all() else real[first:]
            own_sinks = None if sinks is None else sinks[head]
            keys = key[row, head, first:]
            total[row, head, first:] = _head_scores(rows[row, head], keys, params, later, own_sinks, own, scratch)
    return total


def _head_scores(
    rows: Tensor,
    key: Tensor,
    params: AttentionParams,
    later: Tensor,
    sinks: Tensor | None,
    valid: Tensor | None,
    scratch: Sequence[Tensor],
) -> Tensor:
    """Return the scores of one row and KV head, [n - W] float32.

    Args:
        rows: [G W, D] float32, the window's scaled queries.
        key: [n, D].
        params: the model's attention parameters.
        later: [G W, W] float32, minus infinity at tokens of the window that come after a query, else 0.
        sinks: [G W] float32, each query's learned sink, or None.
        valid: [n] bool, or None.
        scratch: memory of each block's logits, overwritten.
    """
    count, size = rows.shape[0], key.shape[0]
    window, block = later.shape[1], scratch[0].numel() // count
    starts = range(0, size, block)
    peaks, masses = rows.new_empty(2, len(starts), count)
    weights = []
    for number, start in enumerate(starts):
        stop = min(start + block, size)
        logits = scratch[number][: count * (stop - start)].view(count, -1)
        torch.mm(rows, key[start:stop].float().t(), out=logits)
        if params.softcap is not None:
            torch.tanh_(logits.div_(params.softcap)).mul_(params.softcap)
        if stop > size - window:
            late = max(start, size - window)
            logits[:, late - start :].add_(later[:, late - size + window : stop - size + window])
        if valid is not None:
            logits.masked_fill_(~valid[start:stop], -torch.inf)
        # Where a query sees no token, a finite peak keeps its exponentials at zero.
        peak = torch.amax(logits, -1, out=peaks[number]).clamp_(min=torch.finfo(torch.float32).min)
        weights.append(logits.sub_(peak[:, None]).exp_())
        torch.sum(logits, -1, out=masses[number])
    peak = peaks.amax(0) if sinks is None else torch.maximum(peaks.amax(0), sinks)
    factors = peaks.sub_(peak).exp_().nan_to_num_(nan=1.0)  # infinity minus infinity is NaN
    mass = masses.mul_(factors).sum(0)
    if sinks is not None:
        mass += torch.exp(sinks - peak)
    factors.mul_(mass.reciprocal_().nan_to_num_(nan=0.0, posinf=0.0))  # 0 where a query sees no token
    if valid is not None:
        factors.mul_(valid[-window:].repeat(count // window))
    summed = [torch.mm(each[None], part) for part, each in zip(weights, factors, strict=True)]
    return torch.cat(summed, 1)[0, : size - window]


def pool_reach(kernel_size: int, offset: int) -> tuple[int, int]:
    """Return how many tokens before a token, and how many after it, its pool covers.

    Args:
        kernel_size: odd width of the pool.
        offset: tokens by which the pool moves towards the beginning; it ends at the token itself at the furthest.
    """
    half = kernel_size // 2
    moved = min(offset, half)
    return half + moved, half - moved


def pooled(scores: Tensor, kernel_size: int, offset: int = 0) -> Tensor:
    """Max-pool scores [B, Hkv, S] over each token's pool (see `pool_reach`)."""
    if offset:
        scores = F.pad(scores, pool_reach(kernel_size, offset), value=-torch.inf)
        return F.max_pool1d(scores, kernel_size, stride=1)
    return F.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def value_aware(scores: Tensor, value: Tensor) -> Tensor:
    """Multiply each token's score by the distance between its value and the output.

    Without a token of weight a and value v, an output o becomes o + a / (1 - a) (o - v). This function estimates the
    length of that change: the score replaces a / (1 - a), and the mean of all values, weighted by the scores, is o.
    Beyond the paper; after VATP (arXiv 2406.12335), which multiplies by the length of v.

    Args:
        scores: [B, Hkv, S - W] float32, from `window_scores`.
        value: [B, Hkv, S, Dv], all values; the last W are those of the window.

    Returns:
        [B, Hkv, S - W] float32; 0 where the score is 0.
    """
    batch, kv_heads, size = scores.shape
    rows, value_dim = batch * kv_heads, value.shape[3]
    value = value.float() if value.dtype == torch.float64 else value  # differences from the mean are float32
    block = block_length(value.device, 4 * rows * value_dim)
    blocks = [slice(start, min(start + block, size)) for start in range(0, max(size, 1), block)]
    # Values at padding are arbitrary.
    unscored = (scores == 0)[..., None]
    out = value.new_zeros(rows, 1, value_dim, dtype=torch.float32)
    changed = torch.empty_like(scores)
    with full_precision(value.device):
        for part in blocks:
            scored = value[:, :, part].masked_fill(unscored[:, :, part], 0).float()
            out.baddbmm_(scores[:, :, part].flatten(0, 1)[:, None], scored.flatten(0, 1))
        total = scores.sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        mean = out.view(batch, kv_heads, 1, value_dim) / total[..., None, None]
        for part in blocks:
            torch.linalg.vector_norm(value[:, :, part].float() - mean, dim=-1, out=changed[:, :, part])
        return changed.masked_fill_(unscored[..., 0], 0).mul_(scores)


def pool_scores(
    scores: Tensor, window: int, *, kernel_size: int, pool_offset: int = 0, valid: Tensor | None = None
) -> Tensor:
    """Max-pool the scores, and set the observation window to +inf and padding to -inf.

    Tokens that only padding separates are neighbours.

    Args:
        scores: [B, Hkv, S - W] float32.
        window: W.
        kernel_size: odd width of the pools.
        pool_offset: tokens by which pools move towards the beginning, see `pool_reach`.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.

    Returns:
        [B, Hkv, S] float32: plus infinity in the window, minus infinity at padding.
    """
    if valid is None:
        scores = pooled(scores, kernel_size, pool_offset)
    else:
        order = (~valid[..., :-window]).byte().argsort(dim=-1, stable=True).expand_as(scores)
        neighbours = pooled(scores.gather(-1, order), kernel_size, pool_offset)
        scores = torch.zeros_like(scores).scatter_(-1, order, neighbours)
    # Padding is masked after pooling, which spreads scores into it.
    scores = F.pad(scores, (0, window), value=torch.inf)
    return scores if valid is None else scores.masked_fill(~valid, -torch.inf)


class EvictionOps(NamedTuple):
    """The operations at a prompt's end that a backend implements; `TORCH_OPS` has the documented reference of each."""

    window_scores: Callable[..., Tensor]
    pool_scores: Callable[..., Tensor]
    select_top: Callable[[Tensor, int], Tensor]
    compact: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    value_aware: Callable[[Tensor, Tensor], Tensor] = value_aware
    write_sketch: Callable[..., None] = write_tokens
    weigh_chosen: Callable[..., Weighed] = weigh_chosen


TORCH_OPS = EvictionOps(window_scores, pool_scores, select_top, compact)


def prompt_scores(
    query: Tensor,
    key: Tensor,
    params: AttentionParams,
    *,
    value: Tensor | None = None,
    kernel_size: int,
    pool_offset: int = 0,
    valid: Tensor | None = None,
    ops: EvictionOps = TORCH_OPS,
) -> Tensor:
    """Return the importance scores of a prompt's tokens: max-pooled attention weights, +inf in the window.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens (the observation window).
        key: [B, Hkv, S, D], all keys of the prompt.
        params: the model's attention parameters.
        value: [B, Hkv, S, Dv], all values, to multiply scores by `value_aware`; or None.
        kernel_size: odd width of the max-pooling over positions.
        pool_offset: tokens by which pools move towards the beginning, see `pool_reach`.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.
        ops: the backend's operations.

    Returns:
        [B, Hkv, S] float32: plus infinity in the window, minus infinity at padding.
    """
    with full_precision(key.device):
        scores = ops.window_scores(query, key, params, valid=valid)
    if value is not None:
        scores = ops.value_aware(scores, value)
    return ops.pool_scores(scores, query.shape[2], kernel_size=kernel_size, pool_offset=pool_offset, valid=valid)
