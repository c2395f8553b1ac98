"""The page index: what is written step by step equals what is built at once, at every border."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rocketkv.budget import BudgetSplit
from rocketkv.core.pages import (
    TILE_PAGES,
    build_pages,
    close_pages,
    grow_pages,
    index_rows,
    page_bounds,
    page_count,
    tile_count,
)
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import gather_tokens
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 5, 3
PAGE_SIZES = [1, 2, 3, 5]


def bounds_at(index: Tensor, page: int) -> Tensor:
    """Return the entry [B, Hkv, rows] of a page."""
    return index[:, :, page // TILE_PAGES, :, page % TILE_PAGES]


def naive_bounds(keys: Tensor) -> Tensor:
    """Return the maxima and minima [2D] of the keys [P, D] of a page, or the key of a page of one."""
    if len(keys) == 1:
        return keys[0]
    channels = range(keys.shape[1])
    return torch.stack([max(keys[:, c]) for c in channels] + [min(keys[:, c]) for c in channels])


@pytest.mark.parametrize(
    ("tokens", "page_size", "pages", "tiles"),
    [
        (1, 1, 1, 1),
        (128, 1, 128, 1),
        (129, 1, 129, 2),
        (255, 2, 128, 1),
        (257, 2, 129, 2),
        (640, 5, 128, 1),
        (0, 3, 0, 0),
    ],
)
def test_counts(tokens: int, page_size: int, pages: int, tiles: int) -> None:
    assert page_count(tokens, page_size) == pages
    assert tile_count(tokens, page_size) == tiles


@pytest.mark.parametrize("pages", [0, 1, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_built_index_holds_the_bounds_of_full_pages_and_zeros(page_size: int, pages: int) -> None:
    tokens = pages * page_size + page_size // 2
    keys = torch.randn(2, KV_HEADS, tokens + 7, HEAD_DIM)
    index = build_pages(keys, tokens, page_size)
    assert index.shape == (2, KV_HEADS, tile_count(tokens + 7, page_size), index_rows(HEAD_DIM, page_size), TILE_PAGES)
    assert index.dtype == keys.dtype
    for page in {0, 1, pages // 2, pages - 2, pages - 1}:
        if 0 <= page < pages:
            entry = bounds_at(index, page)
            for b in range(2):
                for g in range(KV_HEADS):
                    own = keys[b, g, page * page_size : (page + 1) * page_size]
                    assert torch.equal(entry[b, g], naive_bounds(own))
    for page in range(pages, index.shape[2] * TILE_PAGES):
        assert (bounds_at(index, page) == 0).all()


def closed_store(lengths: list[int], reserve: int, page_size: int) -> KVStore:
    """Return a store whose rows hold as many random tokens, all of them kept."""
    size = max(lengths)
    store = KVStore()
    key, value = torch.randn(len(lengths), KV_HEADS, size, HEAD_DIM), torch.randn(len(lengths), KV_HEADS, size, 2)
    valid = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    store.extend(key, value, None if min(lengths) == size else valid)
    store.prompt.remember(torch.randn(len(lengths), HEADS, size, HEAD_DIM), WINDOW)
    split = BudgetSplit(token_budget=4, page_size=page_size, channels=HEAD_DIM, top_k=2)
    close_prompt(store, split, AttentionParams(1.0), decode_reserve=reserve, kernel_size=3)
    return store


def index_of(store: KVStore) -> Tensor:
    """Return the page bounds [B, Hkv, T, rows, 128] of a store that is decoding."""
    return store.decoding.buffers.index_tensors[0]


def append(store: KVStore, count: int) -> None:
    batch = store.decoding.keys.shape[0]
    for _ in range(count):
        store.append(torch.randn(batch, KV_HEADS, HEAD_DIM), torch.randn(batch, KV_HEADS, 2))


def assert_index_is_right(store: KVStore) -> None:
    """Assert that each row's full pages have the entries that an index built from that row alone has."""
    keys, seq_lens, index = store.decoding.keys, store.decoding.buffers.seq_lens, index_of(store)
    page_size = store.decoding.split.page_size
    assert index.shape[2] == tile_count(store.capacity, page_size)
    for b in range(keys.shape[0]):
        for g in range(KV_HEADS):
            length = int(seq_lens[b, g])
            rebuilt = build_pages(keys[b : b + 1, g : g + 1], length, page_size)
            for page in range(length // page_size):
                assert torch.equal(bounds_at(index, page)[b, g], bounds_at(rebuilt, page)[0, 0]), (b, g, page)


@pytest.mark.parametrize("pages", [126, 127, 128])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_appending_one_by_one_equals_building_at_once(page_size: int, pages: int) -> None:
    store = closed_store([pages * page_size + page_size // 2] * 2, 4 * page_size, page_size)
    for _ in range(3 * page_size):
        append(store, 1)
        if store.stored % page_size == 0:
            assert_index_is_right(store)
    assert_index_is_right(store)


@pytest.mark.parametrize("pages", [1, 126, 127, 128])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_rows_of_different_lengths_are_indexed_each_for_itself(page_size: int, pages: int) -> None:
    longest = pages * page_size + 1
    store = closed_store([longest, max(1, longest - page_size - 1), 1], 2, page_size)
    assert not store.uniform
    for _ in range(2):
        append(store, page_size + 1)
        assert_index_is_right(store)


@pytest.mark.parametrize("lengths", [[250, 250], [250, 133]], ids=["uniform", "ragged"])
@pytest.mark.parametrize("page_size", [1, 2])
def test_growth_adds_tiles_and_leaves_the_others(page_size: int, lengths: list[int]) -> None:
    store = closed_store(lengths, 6, page_size)
    tiles = index_of(store).shape[2]
    append(store, 6)
    before = index_of(store).clone()
    append(store, 1)
    assert store.capacity == 512
    assert index_of(store).shape[2] == 512 // (page_size * TILE_PAGES) > tiles
    for page in range(min(lengths) // page_size):
        assert torch.equal(bounds_at(index_of(store), page), bounds_at(before, page))
    append(store, 2 * page_size)
    assert_index_is_right(store)


def test_growth_within_the_last_tile_copies_nothing() -> None:
    index = torch.zeros(1, 1, 2, 4, TILE_PAGES)
    assert grow_pages(index, 2 * TILE_PAGES * 3, 3) is index
    assert grow_pages(index, 2 * TILE_PAGES * 3 + 1, 3).shape[2] == 3


@pytest.mark.parametrize("lengths", [[20, 20], [20, 7]], ids=["uniform", "ragged"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_crop_then_append_equals_never_having_appended(page_size: int, lengths: list[int]) -> None:
    store = closed_store(lengths, 40, page_size)
    append(store, 4)
    other = copy.deepcopy(store)
    append(other, 2 * page_size + 1)
    other.crop(store.seen)
    for _ in range(2 * page_size + 2):
        key, value = torch.randn(2, KV_HEADS, HEAD_DIM), torch.randn(2, KV_HEADS, 2)
        store.append(key, value)
        other.append(key, value)
    assert_index_is_right(other)
    for page in range(int(store.decoding.buffers.seq_lens.min()) // page_size):
        assert torch.equal(bounds_at(index_of(store), page), bounds_at(index_of(other), page))


def test_pages_are_closed_in_place() -> None:
    keys, index = torch.randn(2, 3, 400, HEAD_DIM), torch.zeros(2, 3, 2, 2 * HEAD_DIM, TILE_PAGES)
    close_pages(index, keys, 126, 131, 3)
    for page in range(126, 131):
        assert torch.equal(bounds_at(index, page), page_bounds(keys[:, :, 3 * page : 3 * page + 3], 3))
    index[:, :, 0, :, 126:] = index[:, :, 1, :, :3] = 0
    assert (index == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gather_tokens_takes_whole_rows_of_any_layout(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 7, 3, 4)
    positions = torch.randint(0, 7, (2, 3, 5), dtype=dtype)
    expected = torch.stack([torch.stack([tensor[b, positions[b, g].long(), g] for g in range(3)]) for b in range(2)])
    assert torch.equal(gather_tokens(positions, tensor.transpose(1, 2))[0], expected)
    assert torch.equal(gather_tokens(positions, tensor.transpose(1, 2).contiguous())[0], expected)
