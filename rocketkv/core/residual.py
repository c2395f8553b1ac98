"""The value residual: a step adds the mean value of the tokens that it does not attend to.

Beyond the paper. Its weight is estimated from the sketch. An estimated logit has an error e, and exp(e) is above 1 on
average, so noisy estimates give the residual too much weight: in models with large keys, so much that the output is
worse than without it. The chosen tokens show how much: both their exact and their estimated mass are known. Where the
estimated mass is the larger one, the residual's weight is divided by the square root of their ratio. The root, since
tokens that were chosen by estimates are overestimated more than the others.

    share of the residual = R / (R + C),  R = estimated mass of the others * sqrt(min(1, C / estimated C))

The mean needs the sum of all stored values. Each step updates that sum, since recomputing it would
read all values. The sum is exact: values are rounded to multiples of 2^-32, and float64 represents every sum of those
below 2^21. So it depends on the stored values alone: a removed token leaves no rounding error, and a recomputed sum has
the same bits as an updated one.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim of keys, Dv of values, N stored tokens, k tokens, M
selections of a row: Hkv in a decode step, n Hkv in a verify step of n queries (`rocketkv.core.verify`).
"""

import torch
from torch import Tensor
from torch.nn import functional

from .params import AttentionParams
from .scratch import block_length
from .topk import gather_tokens, multiples, scalar

# A float64 this large has 2^-32 as its last bit: adding and subtracting it rounds a value to multiples of 2^-32.
ROUNDER = 1.5 * 2.0**20

# Sums of smaller magnitude are exact.
LARGEST_EXACT = 2.0**20


def summable(values: Tensor) -> Tensor:
    """Round values of any shape and float dtype to multiples of 2^-32 in float64, whose sums are exact."""
    rounder = scalar(ROUNDER, torch.float64)
    return values.double().add_(rounder).sub_(rounder)


def sum_values(values: Tensor, stored: int, lengths: Tensor | None = None) -> Tensor:
    """Sum the values of each row's tokens in blocks of tokens; returns [B, Hkv, Dv] float64.

    Args:
        values: [B, Hkv, capacity, Dv].
        stored: N, tokens of the longest row.
        lengths: [B, Hkv], tokens of each row, or None if every row has N.
    """
    batch, kv_heads, _, value_dim = values.shape
    sums = []
    empty = None if lengths is None else torch.arange(stored, device=values.device) >= lengths[..., None]
    block = block_length(values.device, 8 * batch * kv_heads * value_dim)
    for start in range(0, max(stored, 1), block):
        part = summable(values[:, :, start : min(start + block, stored)])
        if empty is not None:
            part.masked_fill_(empty[:, :, start : start + block, None], 0)
        sums.append(part.sum(2))
    return sum(sums[1:], sums[0])


def subtract_last(
    value_sum: Tensor, values: Tensor, lengths: Tensor, *, count: int, longest: int, shortest: int
) -> None:
    """Subtract the values of each row's last `count` tokens from their sum, in place; waits for the device.

    Values that are not finite, and very large ones, are no exact summands: with them, the sums are made anew.

    Args:
        value_sum: [B, Hkv, Dv] float64, of `sum_values`; written.
        values: [B, Hkv, capacity, Dv].
        lengths: [B, Hkv] int32, tokens of each row, the last ones included.
        count: tokens to remove from every row.
        longest: N, tokens of the longest row, the last ones included.
        shortest: tokens of the shortest row, likewise.
    """
    uniform = shortest == longest
    if uniform:
        last = values[:, :, longest - count : longest]
    else:
        slots = lengths.long()[..., None] - count + torch.arange(count, device=values.device)
        last = gather_tokens(slots, values)[0]
    removed = summable(last).sum(2)
    if bool((torch.stack((value_sum, removed)).abs_() < LARGEST_EXACT).all()):
        value_sum.sub_(removed)
    else:
        value_sum.copy_(sum_values(values, longest - count, None if uniform else lengths - count))


def overestimate(exact: Tensor, estimated: Tensor) -> Tensor:
    """Return the amount by which the others' estimated log mass is lowered: half of the chosen tokens' excess.

    The excess is their estimated minus their exact log mass, at least 0; 0 where an estimate is not finite.

    Args:
        exact: log-sum-exp of the chosen tokens' exact logits, of any shape.
        estimated: log-sum-exp of their estimated logits.
    """
    return (estimated - exact).clamp(min=0).nan_to_num(nan=0.0, posinf=0.0) * 0.5


def residual_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    logits: Tensor,
    value_sum: Tensor,
    params: AttentionParams,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None,
    filled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend exactly to chosen tokens, and add the mean value of all others with their estimated weight.

    Exact logits weight the chosen tokens; the others weigh as the module describes. After SparQ (arXiv 2312.04985,
    Equation 10), which adds the mean of all values and estimates both weights.

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step; so are all other tensors with one entry per query head.
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        positions: [B, M, k] (an integer dtype), the chosen tokens, without duplicates; positions beyond a row's
            length are ignored.
        logits: [B, H, N] float32, the estimated logits of all tokens.
        value_sum: [B, M, Dv] float32 or float64, the sum of all values that each query sees.
        params: the model's attention parameters, with one learned sink per query.
        bias: [B, H] float32, log of the factor on the others' weight, or None (`rocketkv.core.calibration`).
        lengths: [B, M], tokens that each query sees, or None if every one sees N.
        filled: whether every query sees k tokens or more, so that no position is ignored.

    Returns:
        The output [B, H, Dv] in the query's dtype, zeros for a row without tokens; and the estimated weight of the
        tokens that were not chosen, bias included, [B, H] float32.
    """
    batch, heads, _ = query.shape
    kv_heads, stored = positions.shape[1], logits.shape[-1]
    grouped = (batch, kv_heads, heads // kv_heads)
    real = None if lengths is None or filled else positions < lengths[..., None]
    place = positions.long()
    if real is not None:
        # Ignored positions point behind the last token, so that they mask no real one.
        place = torch.where(real, place, stored)
        positions = positions.clamp(max=stored - 1)
        logits = functional.pad(logits, (0, 1))
    own_keys, own_values = (tensor.float() for tensor in gather_tokens(positions, keys, values))
    rows = query.float().reshape(batch * kv_heads, heads // kv_heads, -1)
    exact = torch.bmm(rows * scalar(params.scaling), own_keys.flatten(0, 1).transpose(1, 2)).view(*grouped, -1)
    if params.softcap is not None:
        exact = torch.tanh(exact / params.softcap) * params.softcap
    chosen = place[:, :, None].expand(*grouped, -1)
    estimated = logits.view(*grouped, -1)
    both = torch.stack((exact, estimated.gather(-1, chosen)))
    others = estimated.scatter(-1, chosen, -torch.inf)[..., :stored]
    left: Tensor | int = max(1, stored - positions.shape[-1])
    if real is not None:
        both = both.masked_fill(~real[:, :, None], -torch.inf)
        own_values = own_values.masked_fill(~real[..., None], 0)
    if lengths is not None:
        empty = multiples(stored, 1, query.device) >= lengths[..., None]
        others = others.masked_fill_(empty[:, :, None], -torch.inf)
        left = (lengths - (positions.shape[-1] if real is None else real.sum(-1))).clamp(min=1)[..., None]
    mean = ((value_sum - own_values.sum(2)) / left).float()
    total = both.logsumexp(-1, keepdim=True)
    lowered = overestimate(total[0], total[1])
    if bias is not None:
        lowered = lowered - bias.view(*grouped, 1)
    # One softmax over exact and estimated logits; only the sum of the others' weights is used. Instead of lowering many
    # estimates, the few exact logits are raised: the softmax is the same.
    columns = [both[0] + lowered, others]
    if params.sinks is not None:
        columns.append(params.sinks.float().view(1, kv_heads, -1, 1) + lowered)
    weight = torch.cat(columns, -1).softmax(-1)
    if lengths is not None and not filled:
        weight = weight.masked_fill((lengths == 0)[..., None, None], 0)
    attended = exact.shape[-1]
    rest = weight.narrow(-1, attended, stored).sum(-1)
    out = torch.bmm(weight.flatten(0, 1).narrow(-1, 0, attended), own_values.flatten(0, 1))
    out.addcmul_(rest.view(*out.shape[:2], 1), mean.reshape(-1, 1, out.shape[2]))
    return out.view(batch, heads, -1).to(query.dtype), rest.view(batch, heads)
