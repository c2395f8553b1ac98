"""Operations at a prompt's end in compiled code on a CPU, in PyTorch's threads.

Letters: B batch, Hkv KV heads, D head dim, Dv value dim, S tokens, W observation window, n tokens, C code bytes.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import ELEMENTS, prompt_entries, weigh_entry
from .lowlevel import LANES
from .prompt import PARTS, SketchOperands, ValueOperands
from .threads import run, thread_count
from .weigh import NUMBERS, WeighOperands

_LINE = 64  # bytes of a cache line


class Weighed(NamedTuple):
    """The result of `weigh_chosen`: see `rocketkv.core.calibration.Weighed`."""

    chosen: Tensor
    chosen_estimate: Tensor
    rest_estimate: Tensor
    chosen_out: Tensor
    rest_sum: Tensor
    rest_count: Tensor


class SketchTensors(NamedTuple):
    """The tensors of a sketch: see `rocketkv.core.sketch.Sketch`."""

    codes: Tensor
    scales: Tensor
    mean: Tensor
    balance: Tensor


def operations(keys: Tensor, encoding: Callable[[int, int], tuple[int, float, float]]) -> dict[str, Callable[..., Any]]:
    """Return the operations for such keys and values by their names; none for dtypes that decode steps refuse.

    Args:
        keys: any keys of the layer.
        encoding: see `write_sketch`.
    """
    if keys.dtype not in ELEMENTS or keys.dtype.itemsize == 1:
        return {}
    write = functools.partial(write_sketch, encoding)
    return {"value_aware": value_aware, "write_sketch": write, "weigh_chosen": weigh_chosen}


def _side_by_side(tokens: Tensor) -> Tensor:
    """Return tokens [B, Hkv, n, D] whose channels are adjacent."""
    return tokens if tokens.stride(3) == 1 else tokens.contiguous()


def _block(operands: tuple[int, ...]) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack(f"={len(operands)}q", *operands))


def write_sketch(
    encoding: Callable[[int, int], tuple[int, float, float]],
    sketch: SketchTensors,
    keys: Tensor,
    start: int | Tensor,
    rotation: Tensor,
    bits: int,
) -> None:
    """Write the sketch of consecutive tokens in place, as `rocketkv.core.sketch.write_tokens`, bit for bit.

    Args:
        encoding: returns the constants of a head dim and bits: grid, `rotation_norm`, spacing of levels.
        sketch: the sketch of the buffer, with room for the tokens.
        keys: [B, Hkv, n, D], the tokens.
        start: slot of the first token, one for all rows, or [B, Hkv] (an integer dtype).
        rotation: [D, D], of `rotation_matrix(D)`.
        bits: bits per channel, 1 to 4.
    """
    batch, kv_heads, count, head_dim = keys.shape
    lines, threads = batch * kv_heads, thread_count()
    if not lines * count:
        return
    keys = _side_by_side(keys)
    starts = torch.full((lines,), start) if isinstance(start, int) else start.long().contiguous()
    odd = head_dim // (head_dim & -head_dim)
    # Of the rotation's first row, all but the first entry of the reflection are negative before the random signs.
    place = torch.arange(head_dim)
    signs = rotation[0].sign() * torch.where((place % odd == 0) & (odd > 1), 1.0, -1.0)
    grid, norm, spacing = encoding(head_dim, bits)
    constants = torch.tensor((norm / grid, spacing), dtype=torch.float32)
    local_bytes = -(-4 * LANES * (head_dim + 5) // _LINE) * _LINE
    local = torch.empty(threads * local_bytes, dtype=torch.uint8)
    counters = torch.zeros(2, dtype=torch.int64)
    operands = SketchOperands(
        counters=counters.data_ptr(),
        local=local.data_ptr(),
        local_bytes=local_bytes,
        lines=lines,
        kv_heads=kv_heads,
        tokens=count,
        capacity=sketch.codes.shape[2],
        head_dim=head_dim,
        odd=odd,
        bits=bits,
        code_bytes=sketch.codes.shape[3],
        grid=grid,
        keys=keys.data_ptr(),
        row_stride=keys.stride(0),
        head_stride=keys.stride(1),
        token_stride=keys.stride(2),
        starts=starts.data_ptr(),
        mean=sketch.mean.data_ptr(),
        balance=sketch.balance.data_ptr(),
        signs=signs.data_ptr(),
        codes=sketch.codes.data_ptr(),
        scales=sketch.scales.data_ptr(),
        constants=constants.data_ptr(),
    )
    block = _block(operands)
    run(prompt_entries(keys.dtype).write_sketch, ctypes.addressof(block), threads)


def value_aware(scores: Tensor, value: Tensor) -> Tensor:
    """Multiply each token's score by the distance of its value from the output, as `rocketkv.core.eviction`.

    Args:
        scores: [B, Hkv, S - W] float32, from `window_scores`.
        value: [B, Hkv, S, Dv], all values; the last W are those of the window.

    Returns:
        [B, Hkv, S - W] float32; 0 where the score is 0.
    """
    batch, kv_heads, count = scores.shape
    lines, dim, threads = batch * kv_heads, value.shape[3], thread_count()
    value, scores = _side_by_side(value), scores.contiguous()
    out = torch.empty_like(scores)
    sums = scores.new_empty(lines, PARTS, dim + 1)
    counters = torch.zeros(1, dtype=torch.int64)
    operands = ValueOperands(
        counters=counters.data_ptr(),
        lines=lines,
        kv_heads=kv_heads,
        tokens=count,
        value_dim=dim,
        values=value.data_ptr(),
        row_stride=value.stride(0),
        head_stride=value.stride(1),
        token_stride=value.stride(2),
        scores=scores.data_ptr(),
        sums=sums.data_ptr(),
        out=out.data_ptr(),
    )
    block, entries = _block(operands), prompt_entries(value.dtype)
    run(entries.sum_weighted, ctypes.addressof(block), threads)
    counters.zero_()
    run(entries.measure_values, ctypes.addressof(block), threads)
    return out


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
    """Choose tokens as n steps would, and attend to them, as `rocketkv.core.calibration.weigh_chosen`.

    Args:
        estimates: [p, n, G, N] float32, estimated logits of p rows and KV heads, minus infinity at unseen tokens.
        logits: [p, n, G, N] float32, the exact ones.
        values: [p, N, Dv] float32.
        k: tokens to choose, at most N.
        sinks: [p, n, G] float32, learned sinks, or None.
        protected: number of first tokens that are chosen before all others.
        by_largest: whether the largest weight over the group's heads ranks a token, not the average.
    """
    pairs, count, group, stored = estimates.shape
    dim, threads = values.shape[2], thread_count()
    values = values.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    numbers = estimates.new_empty(pairs, count, group, NUMBERS)
    sums = estimates.new_empty(pairs, count, group + 1, dim)
    counts = estimates.new_empty(pairs, count)
    padded = -(-stored // LANES) * LANES
    local_bytes = -(-4 * ((group + 2) * padded + LANES + 3 * k) // _LINE) * _LINE
    local = torch.empty(threads * local_bytes, dtype=torch.uint8)
    counters = torch.zeros(2, dtype=torch.int64)
    operands = WeighOperands(
        counters=counters.data_ptr(),
        local=local.data_ptr(),
        local_bytes=local_bytes,
        queries=pairs * count,
        window=count,
        group=group,
        stored=stored,
        value_dim=dim,
        top_k=k,
        protected=protected,
        by_largest=by_largest,
        estimates=estimates.data_ptr(),
        logits=logits.data_ptr(),
        values=values.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        numbers=numbers.data_ptr(),
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
    )
    block = _block(operands)
    run(weigh_entry(), ctypes.addressof(block), threads)
    chosen, estimate, rest = numbers.unbind(-1)
    seen = (estimates[:, :, 0] != -torch.inf).float()
    others = torch.bmm(seen, values).sub_(sums[:, :, group]), seen.sum(-1).sub_(counts)
    return Weighed(chosen, estimate, rest, sums[:, :, :group], *others)
