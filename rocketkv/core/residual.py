"""The value residual: the tokens that a step does not attend to count as one, of their mean value.

Their mean needs the sum of all stored values, which is kept beside them, since to add them up would read them all. It
is exact, so that it depends on what is stored and on nothing else: a token that was taken back leaves no trace, and a
sum made anew has the bits of one that grew. Each value is rounded to a multiple of 2^-32, and of those float64 holds
every sum below 2^21.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim of keys, Dv of values, N stored tokens, k tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .params import AttentionParams
from .topk import gather_tokens, scalar

# A float64 this large has 2^-32 as its last bit: adding it and taking it away rounds what it is added to.
ROUNDER = 1.5 * 2.0**20

# Blocks of tokens whose values, [B, Hkv, block, Dv] in float64, stay under this.
BLOCK_BYTES = 4 * 2**20


def summable(values: Tensor) -> Tensor:
    """Return values, of any shape and float dtype, in float64, as multiples of 2^-32: what is summed of them."""
    rounder = scalar(ROUNDER, torch.float64)
    return values.double().add_(rounder).sub_(rounder)


def sum_values(values: Tensor, stored: int, lengths: Tensor | None = None) -> Tensor:
    """Return the sum of the values of each row's tokens, [B, Hkv, Dv] float64, by blocks of tokens.

    Args:
        values: [B, Hkv, capacity, Dv].
        stored: N, tokens of the longest row.
        lengths: [B, Hkv], tokens of each row, or None where every row has N.
    """
    batch, kv_heads, _, value_dim = values.shape
    total = values.new_zeros(batch, kv_heads, value_dim, dtype=torch.float64)
    block = max(1, BLOCK_BYTES // (8 * batch * kv_heads * value_dim))
    for start in range(0, stored, block):
        part = summable(values[:, :, start : min(start + block, stored)])
        if lengths is not None:
            slot = torch.arange(start, start + part.shape[2], device=part.device)
            part.masked_fill_((slot >= lengths[..., None])[..., None], 0)
        total += part.sum(2)
    return total


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
) -> tuple[Tensor, Tensor]:
    """Attend exactly to chosen tokens, and to all others as one: their mean value, with their estimated weight.

    The weight of the chosen tokens comes from their exact logits, that of the others from the estimates (the mean value
    is SparQ's, arXiv 2312.04985, section 3; there it is of all tokens, and both weights are estimates).

    Args:
        query: [B, H, D].
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        positions: [B, Hkv, k] (an integer dtype), the chosen tokens, none twice; those beyond a row's length do not
            count.
        logits: [B, H, N] float32, the estimated logits of all tokens; those of the chosen are not used.
        value_sum: [B, Hkv, Dv] float32 or float64, the sum of the values of all of a row's tokens.
        params: the model's attention parameters.
        bias: [B, H] float32, added to the logit of the others together, or None (`rocketkv.core.calibration`).
        lengths: [B, Hkv], tokens of each row, or None where every row has N.

    Returns:
        Out, [B, H, Dv] in the query's dtype, zeros for a row without tokens; and the estimated weight of the tokens
        that were not chosen, [B, H] float32.
    """
    batch, heads, _ = query.shape
    kv_heads, stored = keys.shape[1], logits.shape[-1]
    grouped = (batch, kv_heads, heads // kv_heads)
    real = None if lengths is None else positions < lengths[..., None]
    place = positions.long()
    if real is not None:
        # Those that do not count take no token's place.
        place = torch.where(real, place, stored)
        positions = positions.clamp(max=stored - 1)
        logits = functional.pad(logits, (0, 1))
    own_keys, own_values = (tensor.float() for tensor in gather_tokens(positions, keys, values))
    rows = query.float().reshape(batch * kv_heads, heads // kv_heads, -1)
    exact = torch.bmm(rows * scalar(params.scaling), own_keys.flatten(0, 1).transpose(1, 2)).view(*grouped, -1)
    if params.softcap is not None:
        exact = torch.tanh(exact / params.softcap) * params.softcap
    if bias is not None:
        # Taken from the few exact logits in place of being added to the many estimates: the softmax is the same.
        bias = bias.view(*grouped, 1)
        exact = exact - bias
    chosen = place[:, :, None].expand(*grouped, -1)
    others = logits.view(*grouped, -1).scatter(-1, chosen, -torch.inf)[..., :stored]
    left: Tensor | int = max(1, stored - positions.shape[-1])
    if lengths is not None and real is not None:
        exact = exact.masked_fill(~real[:, :, None], -torch.inf)
        own_values = own_values.masked_fill(~real[..., None], 0)
        filled = torch.arange(stored, device=query.device) < lengths[..., None]
        others = others.masked_fill(~filled[:, :, None], -torch.inf)
        left = (lengths - real.sum(-1)).clamp(min=1)[..., None]
    mean = ((value_sum - own_values.sum(2)) / left).float()
    # One softmax over exact logits and estimates; of what it gives the others only the sum counts.
    columns = [exact, others]
    if params.sinks is not None:
        own_sinks = params.sinks.float().view(1, kv_heads, -1, 1).expand(*grouped, 1)
        columns.append(own_sinks if bias is None else own_sinks - bias)
    weight = torch.cat(columns, -1).softmax(-1)
    if lengths is not None:
        weight = weight.masked_fill((lengths == 0)[..., None, None], 0)
    attended = exact.shape[-1]
    rest = weight.narrow(-1, attended, stored).sum(-1)
    out = torch.bmm(weight.flatten(0, 1).narrow(-1, 0, attended), own_values.flatten(0, 1))
    out.addcmul_(rest.view(*out.shape[:2], 1), mean.reshape(-1, 1, out.shape[2]))
    return out.view(batch, heads, -1).to(query.dtype), rest.view(batch, heads)
