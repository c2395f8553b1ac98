"""Stage 1, permanent eviction: which tokens of a prompt stay (paper, section "permanent KV cache eviction").

SnapKV's observation window with a larger pooling kernel and one selection per KV head. Pure functions on tensors.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens, W window queries.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores of one block of keys, [B, H, W, block] in float32, stay under this: 128K tokens need no score matrix.
SCORE_BLOCK_BYTES = 8 * 2**20

# Up to here a stable sort, two operations, is quicker than the ten that find the threshold.
SORTED_SIZE = 256


def select_top(scores: Tensor, n: int) -> Tensor:
    """Return the positions of the n largest scores, the one rule for every top-k of this library.

    Everything above the n-th largest value, then the lowest positions at that value, in position order. `torch.topk`
    breaks ties as it likes, differently with padding and on each device, and pooling and pages make ties all the time.

    Args:
        scores: [..., S], any float dtype; NaN ranks with minus infinity.
        n: how many positions, 1 <= n <= S.

    Returns:
        [..., n] int64, ascending.

    Raises:
        ValueError: n is out of range.
    """
    size = scores.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the {size} scores, got {n}")
    if n == size:
        return torch.arange(size, device=scores.device).expand(*scores.shape[:-1], size)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if size <= SORTED_SIZE:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :n].sort(dim=-1).values
    threshold = scores.topk(n, dim=-1).values[..., -1:]
    above = (scores > threshold).cumsum(-1)
    tied = (scores == threshold).cumsum(-1)
    taken = above + torch.minimum(tied, n - above[..., -1:])
    # The i-th taken position is the first one up to which i are taken.
    number = torch.arange(1, n + 1, device=scores.device).expand(*scores.shape[:-1], n).contiguous()
    return torch.searchsorted(taken, number)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast, if it is on, leaves scores in float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def window_scores(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return how much the last W queries attend to every earlier token, summed over them and over each group's heads.

    Softmax attention in float32, causal inside the window, by blocks of keys in two passes: no [W, S] matrix lives.

    Args:
        query: [B, H, W, D], the queries of the last W tokens.
        key: [B, Hkv, S, D], all keys, the window's own last.
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [H], one learned logit a head that joins the softmax's denominator, or None.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None where all are tokens.

    Returns:
        [B, Hkv, S - W] float32; 0 at padding.
    """
    batch, heads, window, head_dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = query.float().reshape(batch, kv_heads, group * window, head_dim) * scaling
    block = max(window, SCORE_BLOCK_BYTES // (4 * batch * heads * window))

    def logits(start: int, stop: int) -> Tensor:
        # [B, Hkv, G * W, block]
        scores = torch.matmul(rows, key[:, :, start:stop].float().transpose(-1, -2))
        if softcap is not None:
            scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
        if valid is not None:
            scores.masked_fill_(~valid[:, :, None, start:stop], -torch.inf)
        if stop > size - window:
            token = torch.arange(start, stop, device=key.device)
            own = torch.arange(size - window, size, device=key.device).repeat(group)
            scores.masked_fill_(token > own[:, None], -torch.inf)
        return scores

    peak = torch.full((batch, kv_heads, group * window), -torch.inf, dtype=torch.float32, device=key.device)
    if sinks is not None:
        peak = sinks.float().reshape(1, kv_heads, group, 1).expand(batch, -1, -1, window).reshape_as(peak).clone()
    mass = torch.ones_like(peak) if sinks is not None else torch.zeros_like(peak)
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


def pool_reach(kernel_size: int, offset: int) -> tuple[int, int]:
    """Return how many tokens before a token and how many behind it are in its pool.

    Args:
        kernel_size: odd width of the pool.
        offset: tokens by which it is moved back, towards the beginning; no further than to end at the token itself.
    """
    half = kernel_size // 2
    moved = min(offset, half)
    return half + moved, half - moved


def pooled(scores: Tensor, kernel_size: int, offset: int = 0) -> Tensor:
    """Return the maximum of each token's neighbourhood of odd width (see `pool_reach`), of scores [B, Hkv, S]."""
    if offset:
        scores = F.pad(scores, pool_reach(kernel_size, offset), value=-torch.inf)
        return F.max_pool1d(scores, kernel_size, stride=1)
    return F.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def value_aware(scores: Tensor, value: Tensor) -> Tensor:
    """Return each token's score times the distance of its value from the output: how far its loss would move that.

    Without a token of weight a and value v, an output o would be o + a / (1 - a) (o - v). Here o is that of the scores,
    the mean of all values by them, and a the score itself (beyond the paper; after value-aware eviction, VATP, arXiv
    2406.12335, which takes the length of v).

    Args:
        scores: [B, Hkv, S - W] float32, of `window_scores`.
        value: [B, Hkv, S, Dv], all values, the window's own last.

    Returns:
        [B, Hkv, S - W] float32; 0 where the score is.
    """
    batch, kv_heads, size = scores.shape
    block = max(1, SCORE_BLOCK_BYTES // (4 * batch * kv_heads * value.shape[3]))
    blocks = [slice(start, min(start + block, size)) for start in range(0, size, block)]

    def scored(part: slice) -> Tensor:
        # A value at padding may be anything, and counts for nothing.
        return value[:, :, part].float().masked_fill(scores[:, :, part, None] == 0, 0)

    out = value.new_zeros(batch, kv_heads, 1, value.shape[3], dtype=torch.float32)
    changed = torch.empty_like(scores)
    with full_precision(value.device):
        for part in blocks:
            out += scores[:, :, None, part] @ scored(part)
        out /= scores.sum(-1)[..., None, None].clamp(min=torch.finfo(torch.float32).tiny)
        for part in blocks:
            changed[:, :, part] = scores[:, :, part] * torch.linalg.vector_norm(scored(part) - out, dim=-1)
    return changed


def prompt_scores(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor | None = None,
    kernel_size: int,
    pool_offset: int = 0,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return by what stage 1 ranks the tokens of a prompt: the window before all, the rest after max-pooling.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens.
        key: [B, Hkv, S, D], all keys of the prompt.
        value: [B, Hkv, S, Dv], all values, where tokens rank by what they change (`value_aware`); or None.
        kernel_size: odd width of the max-pooling over positions.
        pool_offset: tokens by which pools are moved back, see `pool_reach`.
        scaling: factor of the logits.
        softcap: see `window_scores`.
        sinks: see `window_scores`.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.

    Returns:
        [B, Hkv, S] float32: plus infinity in the window, minus infinity at padding.
    """
    window = query.shape[2]
    with full_precision(key.device):
        scores = window_scores(query, key, scaling=scaling, softcap=softcap, sinks=sinks, valid=valid)
    if value is not None:
        scores = value_aware(scores, value)
    if valid is None:
        scores = pooled(scores, kernel_size, pool_offset)
    else:
        # A row's tokens side by side: padding between them must not part neighbours.
        order = (~valid[..., :-window]).byte().argsort(dim=-1, stable=True).expand_as(scores)
        beside = pooled(scores.gather(-1, order), kernel_size, pool_offset)
        scores = torch.zeros_like(scores).scatter_(-1, order, beside)
    # The window wins over everything, padding (masked after pooling, which spreads into it) over nothing.
    scores = F.pad(scores, (0, window), value=torch.inf)
    return scores if valid is None else scores.masked_fill(~valid, -torch.inf)


def prompt_positions(query: Tensor, key: Tensor, kept: int, **ranking: Any) -> Tensor:
    """Return which `kept` tokens of a prompt survive stage 1: the window, and the best of the rest after max-pooling.

    Args:
        query: [B, H, W, D], the queries of the prompt's last W tokens.
        key: [B, Hkv, S, D], all keys of the prompt, S > kept >= W.
        kept: tokens per KV head that survive.
        **ranking: the other arguments of `prompt_scores`.

    Returns:
        [B, Hkv, kept] int64, ascending. Where a row has fewer than `kept` tokens, padding makes up the number.

    Raises:
        ValueError: `kept` is smaller than the window.
    """
    window = query.shape[2]
    if kept < window:
        raise ValueError(f"kept must be at least the window of {window} tokens, got {kept}")
    return select_top(prompt_scores(query, key, **ranking), kept)


def recent_positions(valid: Tensor, kept: int, sinks: int) -> Tensor:
    """Return the positions of each row's first `sinks` tokens and of its most recent `kept - sinks`.

    Args:
        valid: [..., S] bool, False where there is no token.
        kept: how many positions, 1 <= kept <= S.
        sinks: how many of them are the first tokens.

    Returns:
        [..., kept] int64, ascending; where a row has fewer tokens, positions without one make up the number.
    """
    position = torch.arange(valid.shape[-1], dtype=torch.float32, device=valid.device)
    scores = torch.where(valid.cumsum(-1) <= sinks, torch.inf, position)
    return select_top(scores.masked_fill(~valid, -torch.inf), kept)
