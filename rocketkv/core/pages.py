"""Stage 2's index: the per-channel maximum and minimum of the keys of each page (paper, section "hybrid attention").

Closed pages are immutable and stored; the open page, the last partial one, is derived from its few keys when it is
scored. So crop, fork and reorder are a matter of lengths, and padding pollutes nothing.

Layout: `[B, Hkv, tile, rows, 128 pages]`, rows = 2D (the maxima, then the minima), or D where a page is one token and
both are the key itself. A channel of a tile is contiguous, so scoring r channels reads r rows a tile; growth adds
tiles.

Kept in the keys' dtype or in 8 bits (`RocketKVConfig.index_dtype`): then a closed page's bounds are rounded to nearest,
so they are a little coarser than those of the open page, and may lie a rounding inside of what they bound.

Letters: B batch, Hkv KV heads, D head dim, P page size, N stored tokens, T tiles.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .constants import steps

TILE_PAGES = 128
FLOAT8 = torch.float8_e5m2  # the upper half of a float16: every GPU converts it


def torch_dtype(name: str) -> torch.dtype | None:
    """Return the dtype that a value of `RocketKVConfig.index_dtype` names, or None for the keys' own."""
    return FLOAT8 if name == "float8_e5m2" else None


def movable(tensor: Tensor) -> Tensor:
    """Return a view in a dtype that PyTorch gathers, scatters and joins everywhere: floats of 8 bits as their bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor


def restored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what was made of a `movable` tensor in that tensor's dtype."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def rounded(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bounds, of any shape, in the index's dtype, to nearest; in 8 bits what is out of range becomes its end.

    NaN stays.
    """
    if dtype == FLOAT8:
        limit = torch.finfo(dtype).max
        bounds = bounds.clamp(-limit, limit)
    return bounds.to(dtype)


def page_count(tokens: int, page_size: int) -> int:
    """Return how many pages hold `tokens` tokens, the open one included."""
    return -(-tokens // page_size)


def tile_count(tokens: int, page_size: int) -> int:
    """Return how many tiles the index of `tokens` tokens has."""
    return -(-page_count(tokens, page_size) // TILE_PAGES)


def index_rows(head_dim: int, page_size: int) -> int:
    """Return the rows of a tile: maxima and minima of D channels, or the key's own D channels for single tokens."""
    return head_dim if page_size == 1 else 2 * head_dim


def page_bounds(keys: Tensor, page_size: int) -> Tensor:
    """Return the maxima and minima of pages, whole or partial, given as [..., <= P, D].

    Returns:
        [..., 2D], or [..., D] where a page is one token and both are the key itself.
    """
    if page_size == 1:
        return keys[..., 0, :]
    return torch.cat((keys.amax(-2), keys.amin(-2)), dim=-1)


def build_index(keys: Tensor, tokens: int, page_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Build the index of all pages that are full within the first `tokens` tokens, with room for the whole buffer.

    Args:
        keys: [B, Hkv, N, D], the buffer of stored keys.
        tokens: how many of the N are filled, in the longest row.
        page_size: P, tokens a page.
        dtype: of the index, or None for the keys'.

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


def grow_index(index: Tensor, capacity: int, page_size: int) -> Tensor:
    """Return an index [B, Hkv, T, rows, 128] with tiles for `capacity` tokens: itself, or a copy with zeros added."""
    missing = tile_count(capacity, page_size) - index.shape[2]
    if missing <= 0:
        return index
    empty = index.new_zeros(*index.shape[:2], missing, *index.shape[3:])
    return restored(torch.cat((movable(index), movable(empty)), dim=2), index.dtype)


def close_page(index: Tensor, keys: Tensor, page: int, page_size: int) -> None:
    """Write the bounds of page number `page`, just filled in every row, into `index` in place.

    Args:
        index: [B, Hkv, T, rows, 128].
        keys: [B, Hkv, N, D], the buffer of stored keys.
        page: number of the page.
        page_size: P, tokens a page.
    """
    tile, column = divmod(page, TILE_PAGES)
    bounds = page_bounds(keys[:, :, page * page_size : (page + 1) * page_size], page_size)
    index[:, :, tile, :, column] = rounded(bounds, index.dtype)


def close_pages(index: Tensor, keys: Tensor, lengths: Tensor, page_size: int) -> None:
    """Write the bounds of each row's last page where it has just been filled, in place and without a host sync.

    Args:
        index: [B, Hkv, T, rows, 128].
        keys: [B, Hkv, N, D], the buffer of stored keys.
        lengths: [B, Hkv] int32, tokens of each row.
        page_size: P, tokens a page.
    """
    batch, kv_heads, tiles, rows, _ = index.shape
    page = (lengths.long() - 1).clamp(min=0) // page_size
    tokens = page[..., None] * page_size + torch.arange(page_size, device=keys.device)
    bounds = page_bounds(gather_tokens(tokens.clamp(max=keys.shape[2] - 1), keys)[0], page_size)
    full = (lengths > 0) & (lengths % page_size == 0)
    row = torch.arange(rows, device=keys.device)
    entry = ((page // TILE_PAGES)[..., None] * rows + row) * TILE_PAGES + (page % TILE_PAGES)[..., None]
    flat = movable(index.view(batch, kv_heads, tiles * rows * TILE_PAGES))
    new = movable(rounded(bounds, index.dtype))
    flat.scatter_(2, entry, torch.where(full[..., None], new, flat.gather(2, entry)))


def gather_tokens(positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gather whole tokens of tensors [B, Hkv, N, D] at positions [B, Hkv, k] (an integer dtype) to [B, Hkv, k, D]."""
    size = tensors[0].shape[2]
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.shape[2] != size:
            index = positions.long()[..., None]
            return tuple(tensor.gather(2, index.expand(-1, -1, -1, tensor.shape[3])) for tensor in tensors)
    batch, kv_heads, _ = positions.shape
    rows = positions + steps(batch * kv_heads, size, positions.device).view(batch, kv_heads, 1)
    return tuple([F.embedding(rows, tensor.view(-1, tensor.shape[3])) for tensor in tensors])
