"""The page index of stage 2: per-channel maxima and minima of each page's keys.

Source: paper (arXiv 2502.14051), section 3.4, steps 1 and 2, and Algorithm 1; r is its k1.

Full pages are stored and never change. The open page, the last partial one, is computed from its few keys when it is
scored. So crop, fork and reorder only change lengths, and padding never enters the bounds.

Layout: `[B, Hkv, tile, rows, 128 pages]`. There are 2D rows (the maxima, then the minima), or D for pages of one token,
whose bounds are the key itself. A channel of a tile is contiguous, so scoring r channels reads r rows of each tile;
growth appends tiles.

The index has the keys' dtype or 8 bits (`RocketKVConfig.index_dtype`). In 8 bits the bounds of full pages are rounded
to nearest, so they are coarser than those of the open page and may lie up to one rounding inside the true bounds.

Letters: B batch, H query heads, Hkv KV heads, D head dim, P page size, N stored tokens, T tiles, U = ceil(N/P) pages,
r channels, M selections of a row: Hkv in a decode step, n Hkv in a verify step of n queries (`rocketkv.core.verify`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .params import AttentionParams
from .topk import gather_tokens, multiples, scalar

TILE_PAGES = 128
FLOAT8 = torch.float8_e5m2

# Avoids a division by zero: a query head may be zero in all channels that its group selects.
_TINY = 1e-30


def index_dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype for a value of `RocketKVConfig.index_dtype`, or None for the dtype of the keys."""
    return FLOAT8 if name == "float8_e5m2" else None


def movable(tensor: Tensor) -> Tensor:
    """Return a view that PyTorch can gather, scatter and concatenate on every device: 8-bit floats as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor


def restored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """View the result of an operation on a `movable` view in the original dtype again."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def rounded(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Round bounds to the index's dtype, to nearest; 8-bit values out of range saturate, NaN stays NaN."""
    if dtype == FLOAT8:
        # PyTorch releases differ in how they convert values out of range.
        limit = torch.finfo(dtype).max
        bounds = bounds.clamp(-limit, limit)
    return bounds.to(dtype)


def page_count(tokens: int, page_size: int) -> int:
    """Return the number of pages of `tokens` tokens, the open one included."""
    return -(-tokens // page_size)


def tile_count(tokens: int, page_size: int) -> int:
    """Return the number of index tiles of `tokens` tokens."""
    return -(-page_count(tokens, page_size) // TILE_PAGES)


def index_rows(head_dim: int, page_size: int) -> int:
    """Return the rows of a tile: 2D for maxima and minima, or D for pages of one token."""
    return head_dim if page_size == 1 else 2 * head_dim


def page_bounds(keys: Tensor, page_size: int) -> Tensor:
    """Return the per-channel maxima and minima of pages, full or partial, from their keys [..., <= P, D].

    Returns:
        [..., 2D], or [..., D] for pages of one token, whose bounds are the key itself.
    """
    if page_size == 1:
        return keys[..., 0, :]
    return torch.cat((keys.amax(-2), keys.amin(-2)), dim=-1)


def build_pages(keys: Tensor, tokens: int, page_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Build the index of all full pages of the first `tokens` tokens, with room for the whole buffer.

    Args:
        keys: [B, Hkv, N, D], the buffer of stored keys.
        tokens: slots that the longest row fills.
        page_size: P, tokens per page.
        dtype: dtype of the index, or None for the dtype of the keys.

    Returns:
        [B, Hkv, T, rows, 128]; entries of pages that are not full are zero.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    rows = index_rows(head_dim, page_size)
    tiles = tile_count(capacity, page_size)
    index = keys.new_zeros(batch, kv_heads, tiles, rows, TILE_PAGES, dtype=dtype or keys.dtype)
    full = tokens // page_size
    if full:
        pages = keys[:, :, : full * page_size].reshape(batch, kv_heads, full, page_size, head_dim)
        bounds = rounded(page_bounds(pages, page_size), index.dtype)
        whole, rest = divmod(full, TILE_PAGES)
        split = whole * TILE_PAGES
        index[:, :, :whole] = bounds[:, :, :split].reshape(batch, kv_heads, whole, TILE_PAGES, rows).transpose(-1, -2)
        if rest:
            index[:, :, whole, :, :rest] = bounds[:, :, split:].transpose(-1, -2)
    return index


def grow_pages(index: Tensor, capacity: int, page_size: int) -> Tensor:
    """Return an index [B, Hkv, T, rows, 128] with tiles for `capacity` tokens: itself, or a copy with zeros added."""
    missing = tile_count(capacity, page_size) - index.shape[2]
    if missing <= 0:
        return index
    empty = index.new_zeros(*index.shape[:2], missing, *index.shape[3:])
    return restored(torch.cat((movable(index), movable(empty)), dim=2), index.dtype)


def close_pages(index: Tensor, keys: Tensor, first: int, last: int, page_size: int) -> None:
    """Write the bounds of pages that have just become full in every row, in place.

    Args:
        index: [B, Hkv, T, rows, 128].
        keys: [B, Hkv, N, D], the buffer of stored keys.
        first: number of the first page.
        last: number of the page after the last one.
        page_size: P, tokens per page.
    """
    while first < last:
        tile, column = divmod(first, TILE_PAGES)
        stop = min(last, (tile + 1) * TILE_PAGES)
        tokens = keys[:, :, first * page_size : stop * page_size]
        pages = tokens.view(*keys.shape[:2], stop - first, page_size, -1)
        bounds = rounded(page_bounds(pages, page_size), index.dtype)
        index[:, :, tile, :, column : column + stop - first] = bounds.transpose(-1, -2)
        first = stop


def close_last_pages(index: Tensor, keys: Tensor, lengths: Tensor, page_size: int, count: int = 1) -> None:
    """Write the bounds of the pages that each row's last tokens have filled, in place and without a host sync.

    Args:
        index: [B, Hkv, T, rows, 128].
        keys: [B, Hkv, N, D], the buffer of stored keys.
        lengths: [B, Hkv] int32, tokens of each row.
        page_size: P, tokens per page.
        count: n, the last tokens of each row, which may have filled pages.
    """
    batch, kv_heads, tiles, rows, _ = index.shape
    page = ((lengths.long() - count).clamp(min=0) // page_size)[..., None]
    pages = page_count(count, page_size)
    if pages > 1:
        page = page + torch.arange(pages, device=keys.device)
    tokens = (page[..., None] * page_size + torch.arange(page_size, device=keys.device)).flatten(2)
    own = gather_tokens(tokens.clamp(max=keys.shape[2] - 1), keys)[0]
    bounds = page_bounds(own.view(batch, kv_heads, pages, page_size, -1), page_size)
    full = (page + 1) * page_size <= lengths[..., None]
    row = torch.arange(rows, device=keys.device)
    entry = ((page // TILE_PAGES)[..., None] * rows + row) * TILE_PAGES + (page % TILE_PAGES)[..., None]
    entry = entry.flatten(2)
    flat = movable(index.view(batch, kv_heads, tiles * rows * TILE_PAGES))
    new = torch.where(
        full[..., None], movable(rounded(bounds, index.dtype)), flat.gather(2, entry).view(*page.shape, rows)
    )
    flat.scatter_(2, entry, new.flatten(2))


def score_pages(
    query: Tensor,
    bounds: Tensor,
    keys: Tensor,
    params: AttentionParams,
    *,
    stored: int,
    lengths: Tensor | None,
    page_size: int,
    channels: int,
) -> Tensor:
    """Estimate the logit of every page from its bounds in the r channels where the group's queries are largest.

    In each channel the score uses the page's maximum if the group's sum of q is positive, else its minimum (paper,
    Algorithm 1). The temperature sqrt(|q_r|_1 / |q|_1) corrects for the channels left out (SparQ, arXiv 2312.04985,
    Equation 9).

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step.
        bounds: [B, Hkv, T, rows, 128], the bounds of full pages, in any float dtype.
        keys: [B, Hkv, capacity, D], the buffer of stored keys, for the bounds of the open page.
        params: the model's attention parameters; learned sinks change no logit.
        stored: N, tokens of the longest row.
        lengths: [B, M] int32, tokens that each query sees, or None if every one sees N.
        page_size: P.
        channels: r.

    Returns:
        [B, H, U], or [B, n H, U], float32; arbitrary at pages beyond a row's length.
    """
    batch, heads, head_dim = query.shape
    kv_heads, tiles, rows = bounds.shape[1:4]
    groups = batch * (kv_heads if lengths is None else lengths.shape[1])
    grouped = query.float().view(groups, -1, head_dim)
    # The rule of `select_top`, by a stable sort: ties go to the lower channel, and the order does not matter.
    size = grouped.abs()
    chosen = size.sum(1).sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, channels)
    scored = grouped.gather(-1, chosen.unsqueeze(1).expand(-1, grouped.shape[1], -1))
    negative = scored.sum(1) <= 0
    bound_row = torch.add(chosen, negative, alpha=head_dim) if rows > head_dim else chosen
    missed = size.sum(-1, keepdim=True) / scored.abs().sum(-1, keepdim=True).clamp_min_(_TINY)
    scored = scored * (missed.sqrt_() * scalar(params.scaling))

    # Read only the tiles in use, and only their chosen rows of 128 pages.
    pages = page_count(stored, page_size)
    used = -(-pages // TILE_PAGES)
    first_row = multiples(batch * kv_heads * tiles, rows, bounds.device).view(-1, 1, tiles)
    row = bound_row.reshape(batch * kv_heads, -1, 1) + first_row.narrow(-1, 0, used)
    read = restored(F.embedding(row, movable(bounds).view(-1, TILE_PAGES)), bounds.dtype).float()
    read = read.view(groups, channels, -1)

    # The open page's bounds are exact; those of full pages have the precision of the index's dtype.
    if lengths is None and stored % page_size:
        own = page_bounds(keys[:, :, (pages - 1) * page_size : stored], page_size).flatten(0, 1)
        read.select(-1, pages - 1).copy_(own.gather(-1, bound_row))
    estimate = torch.bmm(scored, read.narrow(-1, 0, pages))
    if lengths is not None and page_size > 1:
        page = lengths.long() // page_size
        token = page[..., None] * page_size + torch.arange(page_size, device=keys.device)
        # Repeating the page's first token does not change its bounds.
        token = torch.where(token < lengths[..., None], token, token[..., :1]).clamp(max=keys.shape[2] - 1)
        own = page_bounds(gather_tokens(token, keys)[0], page_size).flatten(0, 1)
        open_page = torch.bmm(scored, own.gather(-1, bound_row).float().unsqueeze(-1))
        here = torch.arange(pages, device=keys.device) == page.view(-1, 1, 1)
        estimate = torch.where(here, open_page, estimate)
    logits = estimate.view(batch, heads, pages)
    return logits if params.softcap is None else torch.tanh(logits / params.softcap) * params.softcap


@dataclass(frozen=True)
class PageIndex:
    """The page index: scores pages of P tokens on r channels of their bounds, its only tensor. See `TokenIndex`."""

    page_size: int
    channels: int
    names: ClassVar[tuple[str, ...]] = ("bounds",)
    slotted: ClassVar[tuple[str, ...]] = names

    def build(
        self,
        keys: Tensor,
        queries: Tensor,
        tokens: int,
        lengths: Tensor | None,
        dtype: torch.dtype | None,
        write_sketch: Callable[..., None] | None = None,
    ) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        return (build_pages(keys, tokens, self.page_size, dtype),)

    def grow(self, tensors: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        return (grow_pages(tensors[0], capacity, self.page_size),)

    def append(
        self, tensors: Sequence[Tensor], keys: Tensor, lengths: Tensor, slot: int | None, count: int = 1
    ) -> None:
        """See `TokenIndex`."""
        size = self.page_size
        if slot is None:
            close_last_pages(tensors[0], keys, lengths, size, count)
        else:
            close_pages(tensors[0], keys, slot // size, (slot + count) // size, size)

    def rebuild(self, tensors: Sequence[Tensor], keys: Tensor, tokens: int) -> None:
        """See `TokenIndex`."""
        (bounds,) = tensors
        movable(bounds).copy_(movable(build_pages(keys, tokens, self.page_size, bounds.dtype)))

    def score(
        self,
        query: Tensor,
        tensors: Sequence[Tensor],
        keys: Tensor,
        params: AttentionParams,
        *,
        stored: int,
        lengths: Tensor | None,
    ) -> Tensor:
        """See `TokenIndex`."""
        sizes = {"page_size": self.page_size, "channels": self.channels}
        return score_pages(query, tensors[0], keys, params, stored=stored, lengths=lengths, **sizes)

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """See `TokenIndex`."""
        return tile_count(capacity, self.page_size), index_rows(head_dim, self.page_size), TILE_PAGES

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """See `TokenIndex`."""
        return math.prod(self.shape("bounds", capacity, head_dim)) * itemsize

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """See `TokenIndex`."""
        pages = page_count(stored, self.page_size) if nominal else tile_count(stored, self.page_size) * TILE_PAGES
        return pages * self.channels * itemsize
