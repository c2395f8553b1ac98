"""Stage 1 at the end of a prompt: score, pool, select, compact. Nothing is read back by the host.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens, W window queries, P page size.
"""

import torch
import triton
from torch import Tensor

from .compact import compact_kernel, tokens_first_kernel
from .decode import INTERPRETED
from .decode_shape import DTYPES, LARGEST_HEAD_DIM, TILE_PAGES
from .operands import Params
from .pool import pool_kernel, side_by_side_kernel
from .select_top import BINS, DIGITS, count_kernel, digits_kernel, positions_kernel
from .window_scores import LOG2E, window_merge_kernel, window_statistics_kernel, window_sums_kernel

# Of a fixed size, so that a row's scores depend neither on the other rows nor on the device.
SPLIT_KEYS = 1024
MERGE_BLOCK = 32
POOL_CHUNK = 1024
SELECT_CHUNK = 4096
COUNT_BLOCK = 32  # chunks' counts that are read at once
LIST_CHUNK = 4096


def _rowwise(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bytes(valid: Tensor) -> Tensor:
    """Return a mask as the bytes that the kernels read."""
    return valid.contiguous().view(torch.uint8)


def _blocks(rows: int, head_dim: int, low_precision: bool) -> tuple[int, int, int, int, int]:
    """Return query rows and keys of a product, in the first pass and in the second, and the warps of both."""
    if not low_precision:  # larger products of float32 do not fit the registers
        return 16, 32, 16, 32, 4
    padded = {block: triton.cdiv(rows, block) * block for block in (128, 64)}
    block = max(16, min(64 if padded[64] < padded[128] else 128, triton.next_power_of_2(rows)))
    smaller = min(block, 64)
    return (block, 64, smaller, 128, 8) if head_dim <= 128 else (smaller, 32, smaller, 64, 8)


def refusal(keys: Tensor) -> str | None:
    """Return why these kernels cannot end a prompt with such keys [B, Hkv, S, D], or None if they can."""
    if keys.dtype not in DTYPES:
        return f"keys are {keys.dtype}; the kernels take float16, bfloat16 and float32"
    if keys.shape[3] > LARGEST_HEAD_DIM:
        return f"head_dim is {keys.shape[3]}; the kernels take up to {LARGEST_HEAD_DIM}"
    return None


def window_scores(
    query: Tensor,
    key: Tensor,
    params: Params,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Return how much the last W queries attend to every earlier token, summed over them and over each group's heads.

    Three launches; beside the result lives a few numbers for each query row and split of the keys.

    Args:
        query: [B, H, W, D], the queries of the last W tokens.
        key: [B, Hkv, S, D], all keys, the window's own last; any strides.
        params: the model's attention parameters; the scaling is positive.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None where all are tokens.

    Returns:
        [B, Hkv, S - W] float32; 0 at padding.
    """
    scaling, softcap, sinks = params.scaling, params.softcap, params.sinks
    batch, heads, window, head_dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    older = size - window
    scores = torch.empty(batch, kv_heads, older, dtype=torch.float32, device=key.device)
    if not older:
        return scores
    query, key = query.contiguous(), _rowwise(key)
    group_rows = heads // kv_heads * window
    rows = batch * kv_heads
    low_precision = key.dtype == query.dtype and key.dtype in (torch.float16, torch.bfloat16)
    exact = INTERPRETED or not low_precision
    row_block, key_block, sum_rows, sum_keys, warps = _blocks(group_rows, head_dim, low_precision)
    row_blocks = triton.cdiv(group_rows, row_block)
    splits = triton.cdiv(size, SPLIT_KEYS)
    peaks, sums = torch.empty(2, rows, splits, group_rows, dtype=torch.float32, device=key.device)
    anchors, weights = torch.empty(2, rows, group_rows, dtype=torch.float32, device=key.device)
    mask = query if valid is None else _bytes(valid)
    mask_heads = 1 if valid is None else valid.shape[1]
    head_block = max(16, triton.next_power_of_2(head_dim))
    cap = 1.0 if softcap is None else softcap
    factor = LOG2E.value if softcap is not None else scaling * LOG2E.value
    strides = key.stride()[:3]
    window_statistics_kernel[(rows, splits, row_blocks)](
        query, key, mask, peaks, sums, size, SPLIT_KEYS, kv_heads, mask_heads, *strides, scaling, factor, cap,
        M=group_rows, W=window, D=head_dim, VALID=valid is not None, SOFTCAP=softcap is not None, EXACT=exact,
        DP=head_block, MB=row_block, BN=key_block, num_warps=warps,
    )  # fmt: skip
    window_merge_kernel[(rows, triton.cdiv(group_rows, MERGE_BLOCK))](
        peaks, sums, peaks if sinks is None else sinks, mask, anchors, weights,
        size, splits, kv_heads, mask_heads, factor,
        M=group_rows, W=window, SINKS=sinks is not None, VALID=valid is not None,
        SP=MERGE_BLOCK, MB=MERGE_BLOCK, num_warps=4,
    )  # fmt: skip
    window_sums_kernel[(rows, triton.cdiv(older, sum_keys))](
        query, key, mask, anchors, weights, scores, size, older, kv_heads, mask_heads, *strides, scaling, factor, cap,
        M=group_rows, D=head_dim, VALID=valid is not None, SOFTCAP=softcap is not None, EXACT=exact,
        DP=head_block, MB=sum_rows, BN=sum_keys, num_warps=warps,
    )  # fmt: skip
    return scores


def pool_scores(
    scores: Tensor, window: int, *, kernel_size: int, pool_offset: int = 0, valid: Tensor | None = None
) -> Tensor:
    """Return the maximum of each token's neighbourhood, with the window above everything and padding below.

    A row's tokens are pooled side by side: padding between them does not part neighbours.

    Args:
        scores: [B, Hkv, S - W] float32; a NaN makes its whole neighbourhood NaN.
        window: W.
        kernel_size: odd width of the neighbourhood.
        pool_offset: tokens by which it is moved back, no further than to end at the token itself.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.

    Returns:
        [B, Hkv, S] float32: plus infinity in the window, minus infinity at padding.
    """
    scores = scores.contiguous()
    batch, kv_heads, older = scores.shape
    size = older + window
    rows = batch * kv_heads
    pooled = scores.new_empty(batch, kv_heads, size)
    mask, ranks, mask_heads = scores, scores, 1
    if valid is not None:
        mask, mask_heads = _bytes(valid), valid.shape[1]
        ranks = valid.cumsum(-1, dtype=torch.int32)
        beside = torch.empty_like(scores)
        side_by_side_kernel[(rows, triton.cdiv(older, POOL_CHUNK))](
            scores, mask, ranks, beside, size, older, kv_heads, mask_heads, CHUNK=POOL_CHUNK, num_warps=4
        )
        scores = beside
    half = kernel_size // 2
    pool_kernel[(rows, triton.cdiv(size, POOL_CHUNK))](
        scores, mask, ranks, pooled, size, older, kv_heads, mask_heads,
        KERNEL=kernel_size, BEFORE=half + min(pool_offset, half), VALID=valid is not None, CHUNK=POOL_CHUNK,
        num_warps=4,
    )  # fmt: skip
    return pooled


def select_top(scores: Tensor, n: int) -> Tensor:
    """Return the positions of the n largest scores: those above the n-th largest value, then the lowest at it.

    Six launches and a fill, whatever the scores.

    Args:
        scores: [..., S], any float dtype; NaN ranks with minus infinity.
        n: how many positions, 1 <= n <= S.

    Returns:
        [..., n] int32, ascending.

    Raises:
        ValueError: n is out of range.
    """
    size = scores.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the {size} scores, got {n}")
    scores = scores.float().contiguous()
    shape = scores.shape[:-1]
    rows, chunks = shape.numel(), triton.cdiv(size, SELECT_CHUNK)
    histograms = torch.zeros(rows, DIGITS.value, BINS.value, dtype=torch.int32, device=scores.device)
    counts = torch.empty(rows, 2, chunks, dtype=torch.int32, device=scores.device)
    positions = torch.empty(*shape, n, dtype=torch.int32, device=scores.device)
    grid = (rows, chunks)
    for number in range(DIGITS.value):
        digits_kernel[grid](scores, histograms, size, n, ROUND=number, CHUNK=SELECT_CHUNK, num_warps=8)
    count_kernel[grid](scores, histograms, counts, size, n, CHUNK=SELECT_CHUNK, num_warps=8)
    positions_kernel[grid](
        scores, histograms, counts, positions, size, n,
        CHUNKS=COUNT_BLOCK, CHUNK=SELECT_CHUNK, num_warps=8,
    )  # fmt: skip
    return positions


def compact(
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    valid: Tensor | None,
    positions: Tensor | None,
    count: int,
    capacity: int,
    page_size: int | None,
    index_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Copy the chosen tokens of each row to the front of new buffers, and build the index of their pages on the way.

    One launch and a fill; with `valid` two launches, the first of which puts the tokens of each row before the padding.

    Args:
        keys: [B, Hkv, S, D], the prompt's; any strides.
        values: [B, Hkv, S, Dv], likewise.
        slots: [B, Hkv, chosen] int32 or int64, ascending, or None for the first `count`.
        valid: [B, 1 or Hkv, S] bool, False at slots without a token, or None where all chosen hold one.
        positions: [B, 1 or Hkv, S or more] int32, each slot's position in the sequence, or None where they are equal.
        count: tokens of the longest row; without `valid`, all chosen.
        capacity: slots of the new buffers, at least `count`.
        page_size: P, or None where there is no index.
        index_dtype: of the index, or None for the keys'.

    Returns:
        keys: [B, Hkv, capacity, D], zero from `count` on.
        values: [B, Hkv, capacity, Dv], likewise.
        positions: [B, Hkv, capacity] int32, -1 behind a row's tokens.
        lengths: [B, Hkv] int32.
        index: [B, Hkv, tiles, D or 2D, 128], zero at pages that are not full within `count`, or None.
    """
    batch, kv_heads, stored, head_dim = keys.shape
    value_dim = values.shape[3]
    rows, device = batch * kv_heads, keys.device
    keys, values = _rowwise(keys), _rowwise(values)
    lengths = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    if slots is None or valid is None:
        valid = None
        lengths.fill_(count)
    else:
        slots = slots.contiguous()
        ordered = torch.empty(batch, kv_heads, count, dtype=torch.int32, device=device)
        tokens_first_kernel[(rows,)](
            slots, _bytes(valid), ordered, lengths, slots.shape[2], stored, count, kv_heads, valid.shape[1],
            CHUNK=LIST_CHUNK, num_warps=8,
        )  # fmt: skip
        slots = ordered
    new_keys = keys.new_empty(batch, kv_heads, capacity, head_dim)
    new_values = values.new_empty(batch, kv_heads, capacity, value_dim)
    new_positions = torch.empty(batch, kv_heads, capacity, dtype=torch.int32, device=device)
    pages = triton.cdiv(capacity, page_size or 1)
    tiles = triton.cdiv(pages, TILE_PAGES)
    index = None
    if page_size is not None:
        lines = head_dim if page_size == 1 else 2 * head_dim
        index = keys.new_empty(batch, kv_heads, tiles, lines, TILE_PAGES, dtype=index_dtype or keys.dtype)
        pages = tiles * TILE_PAGES  # all of a tile is written
    source = lengths if positions is None else positions.contiguous()
    head_block = triton.next_power_of_2(head_dim)
    block = 32 if head_block <= 128 else 16
    compact_kernel[(rows, triton.cdiv(pages, block))](
        keys, values, lengths if slots is None else slots.contiguous(), source, lengths,
        new_keys, new_values, new_positions, new_keys if index is None else index,
        stored, count, capacity, page_size or 1, tiles, kv_heads, source.shape[1],
        *keys.stride()[:3], *values.stride()[:3], source.shape[-1],
        D=head_dim, DV=value_dim, SLOTS=slots is not None, VALID=valid is not None, POSITIONS=positions is not None,
        INDEX=index is not None, SINGLE=page_size == 1, DP=head_block, DVP=triton.next_power_of_2(value_dim), BP=block,
        num_warps=4,
    )  # fmt: skip
    return new_keys, new_values, new_positions, lengths, index
