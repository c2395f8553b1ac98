"""Stage 2, hybrid sparse attention of one decode step, in three parts (paper, section "hybrid attention").

`score` estimates each page's logits from few channels, `select` chooses tokens by the estimate, `attend` is exact over
them. This is the readable reference: scores, softmax and sums in float32, whatever the dtype of keys and values.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, P page size, U = ceil(N/P) pages,
r channels, k tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .constants import number, steps
from .pages import TILE_PAGES, gather_tokens, movable, page_bounds, page_count, restored

# The least that divides: a head may be zero in the channels that its group chose, and 0 * inf is no score.
_TINY = 1e-30


def score(
    query: Tensor,
    index: Tensor,
    keys: Tensor,
    *,
    stored: int,
    lengths: Tensor | None,
    page_size: int,
    channels: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Estimate the logits of every page from its bounds in the r channels where the group's queries are largest.

    For each channel the page's maximum where the group's sum of q is positive, else its minimum; the temperature
    sqrt(|q_r|_1 / |q|_1) makes up for the channels left out (SparQ, arXiv 2312.04985, section 3).

    Args:
        query: [B, H, D].
        index: [B, Hkv, T, rows, 128], the bounds of closed pages, in any float dtype.
        keys: [B, Hkv, capacity, D], the buffer of stored keys, from which the open page is derived.
        stored: N, tokens of the longest row.
        lengths: [B, Hkv] int32, tokens of each row, or None where every row has N.
        page_size: P.
        channels: r.
        scaling: factor of the true logits.
        softcap: c of `c * tanh(logit / c)`, or None.

    Returns:
        [B, H, U] float32; arbitrary at pages beyond a row's length.
    """
    batch, heads, head_dim = query.shape
    kv_heads, tiles, rows = index.shape[1:4]
    grouped = query.float().view(batch * kv_heads, heads // kv_heads, head_dim)
    # The rule of `select_top`, by a stable sort: the order of channels does not matter, ties go to the lower one.
    size = grouped.abs()
    chosen = size.sum(1).sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, channels)
    scored = grouped.gather(-1, chosen.unsqueeze(1).expand(-1, grouped.shape[1], -1))
    negative = scored.sum(1) <= 0
    bound_row = torch.add(chosen, negative, alpha=head_dim) if rows > head_dim else chosen
    missed = size.sum(-1, keepdim=True) / scored.abs().sum(-1, keepdim=True).clamp_min_(_TINY)
    scored = scored * (missed.sqrt_() * number(scaling))

    # Only the tiles in use are read, and of them the chosen rows of 128 pages.
    pages = page_count(stored, page_size)
    used = -(-pages // TILE_PAGES)
    first_row = steps(batch * kv_heads * tiles, rows, index.device).view(-1, 1, tiles)
    row = bound_row.unsqueeze(-1) + first_row.narrow(-1, 0, used)
    bounds = restored(F.embedding(row, movable(index).view(-1, TILE_PAGES)), index.dtype).float().flatten(2)

    # The open page's bounds are exact; those of closed pages are as coarse as the index's dtype.
    if lengths is None and stored % page_size:
        own = page_bounds(keys[:, :, (pages - 1) * page_size : stored], page_size).flatten(0, 1)
        bounds.select(-1, pages - 1).copy_(own.gather(-1, bound_row))
    estimate = torch.bmm(scored, bounds.narrow(-1, 0, pages))
    if lengths is not None and page_size > 1:
        page = lengths.long() // page_size
        token = page[..., None] * page_size + torch.arange(page_size, device=keys.device)
        # Repeating the page's first token leaves its bounds alone.
        token = torch.where(token < lengths[..., None], token, token[..., :1]).clamp(max=keys.shape[2] - 1)
        own = page_bounds(gather_tokens(token, keys)[0], page_size).flatten(0, 1)
        open_page = torch.bmm(scored, own.gather(-1, bound_row).float().unsqueeze(-1))
        here = torch.arange(pages, device=keys.device) == page.view(-1, 1, 1)
        estimate = torch.where(here, open_page, estimate)
    logits = estimate.view(batch, heads, pages)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def select(
    logits: Tensor,
    k: int,
    *,
    stored: int,
    lengths: Tensor | None,
    kv_heads: int,
    unit_size: int,
    sinks: Tensor | None = None,
    protected: int = 0,
    by_largest: bool = False,
    ordered: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the k stored tokens of largest estimated weight for each KV head.

    The weights are a softmax over stored tokens, each of a page with the page's logit; of those of a group's heads the
    average counts, or the largest.

    Args:
        logits: [B, H, U] float32, one a unit (a page of tokens, or a single token).
        k: tokens to choose, at most N.
        stored: N, tokens of the longest row.
        lengths: [B, Hkv] int32, tokens of each row, or None where every row has N.
        kv_heads: Hkv.
        unit_size: tokens a unit stands for.
        sinks: [H], one learned logit a head that joins the softmax's denominator, or None.
        protected: how many first tokens are chosen before all others, by whole units.
        by_largest: whether the largest weight of the group's heads counts, not their average.
        ordered: whether positions must ascend, for which attention does not care.

    Returns:
        Positions [B, Hkv, k] int32, ascending (a row with fewer tokens than k has others make up the number), and the
        estimated weight of one token of each unit, [B, H, U] float32: summed over chosen tokens, the estimated mass.
    """
    batch, heads, units = logits.shape
    group = heads // kv_heads
    # Equal logits give equal weights, bit for bit: each is the unit's softmax, over the tokens that it should count.
    total: Tensor | int = unit_size
    if lengths is None:
        weight = logits.softmax(-1)
        missing = units * unit_size - stored  # tokens that the last unit is short of
        if missing:
            total = torch.rsub(weight.narrow(-1, units - 1, 1), unit_size, alpha=missing)
    else:
        over_heads = _unit_tokens(units, unit_size, lengths).repeat_interleave(group, dim=1)
        logits = logits.masked_fill(over_heads == 0, -torch.inf)
        weight = logits.softmax(-1)
        total = (weight * over_heads).sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[:, None] - logits.logsumexp(-1, keepdim=True))
    if isinstance(total, Tensor) or total != 1:
        weight = weight / total
    by_head = weight.view(batch, kv_heads, group, units)
    shared = by_head.amax(2) if by_largest else by_head.sum(2)  # the sum ranks as the average does
    if protected:
        shared[..., : page_count(protected, unit_size)] = torch.inf
    if lengths is None:
        positions = ranked_even(shared, k, stored, unit_size)
        positions = positions.sort(-1).values if ordered else positions
    else:
        positions = select_units(shared, _unit_tokens(units, unit_size, lengths).expand_as(shared), k, unit_size)
    return positions.int(), weight


def _unit_tokens(units: int, unit_size: int, lengths: Tensor) -> Tensor:
    """Return how many tokens each unit holds, [B, Hkv, U], of rows of these lengths [B, Hkv]."""
    start = torch.arange(0, units * unit_size, unit_size, device=lengths.device)
    return (lengths[..., None] - start).clamp(min=0, max=unit_size)


def ranked_even(weight: Tensor, k: int, stored: int, unit_size: int) -> Tensor:
    """Do what `select_units` does where all rows have as many tokens, in fewer operations and in no order.

    A unit's rank is one integer: its weight, whose bits are ordered as it is, over its place from the end. No two are
    equal, so any top-k gives the one choice.

    Args:
        weight: [..., U] float32, at least 0; NaN ranks last.
        k: tokens to choose, at most `stored`.
        stored: tokens of every row; the last unit has what the others leave.
        unit_size: tokens of a full unit.

    Returns:
        Positions [..., k] int64, those of a unit side by side.
    """
    units = weight.shape[-1]
    bits = weight.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    rank = torch.add(steps(units, -1, weight.device), bits, alpha=1 << 32)
    # A unit more where one has fewer tokens: together they are k at least.
    short = units * unit_size - stored
    unit = rank.topk(min(units, page_count(k, unit_size) + (short > 0)), dim=-1, sorted=unit_size > 1).indices
    if unit_size == 1:
        return unit
    token = torch.add(steps(unit_size, 1, weight.device), unit.unsqueeze(-1), alpha=unit_size).flatten(-2)
    first = token.narrow(-1, 0, k)
    if not short:
        return first
    # The tokens that the last unit lacks are neighbours: what comes after them moves up.
    lacking = first.cummax(-1).values >= stored
    return torch.where(lacking, token.narrow(-1, short, k), first)


def select_units(weight: Tensor, count: Tensor, k: int, unit_size: int) -> Tensor:
    """Apply the rule of `select_top` to tokens, given one weight a unit and how many tokens each unit holds.

    Equal to `select_top` of the weights repeated for every token, without making them.

    Args:
        weight: [..., U] float; NaN ranks with minus infinity.
        count: [..., U] integers from 0 to `unit_size`, the tokens of each unit.
        k: tokens to choose.
        unit_size: tokens of a full unit; unit u starts at token `u * unit_size`.

    Returns:
        Positions [..., k] int64, ascending; where there are fewer than k tokens, those that follow the last one make up
        the number.
    """
    weight = torch.where(count > 0, weight.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), -torch.inf)
    units = weight.shape[-1]
    # Only one unit, the last, is partial: one more than would do if all were full covers k tokens.
    largest, unit = weight.topk(min(units, page_count(k, unit_size) + 1), dim=-1)
    before = (count.gather(-1, unit).cumsum(-1) < k).sum(-1, keepdim=True)
    threshold = largest.gather(-1, before.clamp(max=largest.shape[-1] - 1))
    above = torch.where(weight > threshold, count, 0)
    tied = torch.where(weight == threshold, count, 0)
    missing = k - above.sum(-1, keepdim=True)
    taken = above + torch.minimum((missing - tied.cumsum(-1) + tied).clamp(min=0), tied)
    end = taken.cumsum(-1)
    number = torch.arange(1, k + 1, device=weight.device).expand(*weight.shape[:-1], k).contiguous()
    unit = torch.searchsorted(end, number).clamp(max=units - 1)
    return unit * unit_size + number - 1 - (end - taken).gather(-1, unit)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend exactly from one query to chosen tokens.

    Args:
        query: [B, H, D].
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        positions: [B, Hkv, k] (an integer dtype), the tokens to attend to, or None for all N.
        mask: [B, Hkv, k or N] bool, False at tokens to leave out, or None. A row with none left gives zeros.
        scaling: factor of the logits.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: [H], one learned logit a head that joins the softmax's denominator, or None.

    Returns:
        [B, H, Dv] in the query's dtype.
    """
    batch, heads, _ = query.shape
    kv_heads = keys.shape[1]
    if positions is not None:
        keys, values = gather_tokens(positions, keys, values)
    rows = query.view(batch, kv_heads, heads // kv_heads, -1)
    over_group = None if mask is None else mask[:, :, None].expand(-1, -1, rows.shape[2], -1)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=over_group, scale=scaling)
    else:
        per_row = None if sinks is None else sinks.view(1, kv_heads, -1)
        out = softmax_attention(rows, keys, values, scaling=scaling, mask=over_group, softcap=softcap, sinks=per_row)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1)[:, :, None, None], 0)
    return out.reshape(batch, heads, -1)


def softmax_attention(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in float32 with a soft-cap (Gemma 2) or learned sinks (GPT-OSS), which PyTorch's own does not have.

    Args:
        rows: [B, Hkv, R, D], queries, those of a group as rows.
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        scaling: factor of the logits.
        mask: broadcastable to [B, Hkv, R, N] bool, False at pairs to leave out, or None.
        softcap: c of `c * tanh(logit / c)`, or None.
        sinks: broadcastable to [B, Hkv, R], the sink's logit of each row, or None.
        dropout: probability of dropping a weight.

    Returns:
        [B, Hkv, R, Dv] in the rows' dtype.
    """
    logits = torch.matmul(rows.float() * scaling, keys.float().transpose(-1, -2))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[..., None]
        peak = torch.maximum(logits.amax(-1, keepdim=True), sink)
        weight = torch.exp(logits - peak)
        weight = weight / (weight.sum(-1, keepdim=True) + torch.exp(sink - peak))
    else:
        weight = logits.softmax(-1)
    if dropout:
        weight = F.dropout(weight, dropout)
    return torch.matmul(weight, values.float()).to(rows.dtype)
