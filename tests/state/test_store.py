"""The life of a store: chunks, crops, copies and reordered rows give what a straight run gives; memory stays small."""

from __future__ import annotations

import copy
import re
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive import attention
from pairs import pairs
from rocketkv.budget import METHODS
from rocketkv.state.decoding import decode_room, grown_capacity
from rocketkv.state.store import KVStore
from turns import (
    BUDGET,
    DV,
    HKV,
    PROMPT,
    RESERVE,
    SCALING,
    SPLITS,
    WINDOW,
    D,
    H,
    Tokens,
    close,
    decode,
    extend,
    joined,
    left_padding,
    prompted,
    tokens,
    verify,
)

COMPLETE = [name for name, split in SPLITS.items() if split.kept_tokens is None]
EVICTING = [name for name, split in SPLITS.items() if split.kept_tokens is not None]


@pytest.fixture(params=[None, [PROMPT, 33, 10]], ids=["uniform", "ragged"])
def valid(request: pytest.FixtureRequest) -> Tensor | None:
    return None if request.param is None else left_padding(request.param, PROMPT)


def assert_same(found: KVStore, expected: KVStore) -> None:
    """Assert that two stores hold the same tokens in the same slots, bit for bit, and know the same about them."""
    for name in ("seen", "stored", "shortest", "closed", "uniform"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.decoding.aligned == expected.decoding.aligned
    a, b = found.decoding.buffers, expected.decoding.buffers
    stored = found.stored
    assert torch.equal(a.positions[:, :, :stored], b.positions[:, :, :stored])
    assert torch.equal(a.seq_lens, b.seq_lens)
    held = b.positions[:, :, :stored] >= 0
    for x, y in ((a.keys, b.keys), (a.values, b.values)):
        assert torch.equal(x[:, :, :stored][held], y[:, :, :stored][held])


@pytest.mark.parametrize("expected_length", [0, PROMPT])
@pytest.mark.parametrize("sizes", [[1] * PROMPT, [2, 57, 1], [20, 20, 20], [59, 1]])
@pytest.mark.parametrize("split", ["full", "rocketkv", "streaming", "quest"])
def test_chunks_end_in_the_same_store_as_one_pass(
    split: str, sizes: list[int], expected_length: int, valid: Tensor | None
) -> None:
    prompt, generated = tokens(3, PROMPT), tokens(3, 5)
    whole, chunked = prompted(prompt, SPLITS[split], valid), KVStore()
    start = 0
    for size in sizes:
        part = prompt[start : start + size]
        marked = None if valid is None else valid[:, start : start + size]
        chunked.extend(part.key, part.value, marked, expected=expected_length)
        chunked.prompt.remember(part.query, WINDOW)
        start += size
    close(chunked, SPLITS[split])
    assert_same(chunked, whole)
    assert torch.equal(decode(chunked, generated), decode(whole, generated))


def test_padding_may_begin_or_end_at_a_chunk() -> None:
    valid = left_padding([PROMPT, 40], PROMPT)
    prompt = tokens(2, PROMPT)
    whole = prompted(prompt, SPLITS["rocketkv"], valid)
    for bounds in ([0, 20, PROMPT], [0, 7, 30, PROMPT]):
        chunked = KVStore()
        for first, last in pairwise(bounds):
            # A chunk without padding may say so.
            marked = valid[:, first:last]
            extend(chunked, prompt[first:last], None if marked.all() else marked)
        close(chunked, SPLITS["rocketkv"])
        assert_same(chunked, whole)


# Over a border of pages of 2 and of 5, to the end of the buffer, and beyond it.
@pytest.mark.parametrize(("split", "extra", "before"), pairs(SPLITS, [1, 2, 7, RESERVE - 3, RESERVE + 1], [0, 3]))
def test_append_then_crop_equals_never_having_appended(
    split: str, extra: int, before: int, valid: Tensor | None
) -> None:
    # A rolling buffer that is full drops tokens: it gets room enough here, and a test of its own below.
    reserve = 3 * RESERVE if split == "streaming" else RESERVE
    prompt, early, wrong, late = tokens(3, PROMPT), tokens(3, before), tokens(3, extra), tokens(3, 9)
    straight, cropped = (prompted(prompt, SPLITS[split], valid, reserve) for _ in range(2))
    if before:
        decode(straight, early)
        decode(cropped, early)
    decode(cropped, wrong)
    cropped.crop(PROMPT + before)
    assert_same(cropped, straight)
    assert torch.equal(decode(cropped, late), decode(straight, late))
    assert_same(cropped, straight)


@pytest.mark.parametrize("split", SPLITS)
def test_verify_steps_with_a_crop_after_each_equal_plain_decoding(split: str, valid: Tensor | None) -> None:
    reserve = 3 * RESERVE if split == "streaming" else RESERVE
    prompt, generated = tokens(3, PROMPT), tokens(3, 24)
    straight, drafted = (prompted(prompt, SPLITS[split], valid, reserve) for _ in range(2))
    expected = decode(straight, generated)
    found = []
    for start, accepted in [(0, 1), (1, 4), (5, 2), (7, 5), (12, 7), (19, 5)]:
        draft = joined(generated[start : start + accepted], tokens(3, 3))
        found.append(verify(drafted, draft)[:, :, :accepted])
        drafted.crop(PROMPT + start + accepted)
    assert_near(torch.cat(found, dim=2), expected)
    assert_same(drafted, straight)


@pytest.mark.parametrize("valid", [None, [PROMPT, 33, 2]], ids=["uniform", "ragged"], indirect=True)
@pytest.mark.parametrize("split", EVICTING)
def test_a_crop_into_what_was_evicted_is_refused_with_the_bound(split: str, valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], valid)
    decode(store, tokens(3, 4))
    with pytest.raises(ValueError, match="cannot crop to 20 tokens") as error:
        store.crop(20)
    found = re.search(r"Crop to (\d+) or more", str(error.value))
    assert found is not None
    bound = int(found.group(1))
    # Up to there, stage 1 kept every token.
    recent = WINDOW if SPLITS[split].sinks is None else BUDGET - 4
    assert bound == PROMPT - recent
    before = copy.deepcopy(store)
    with pytest.raises(ValueError, match="cannot crop"):
        store.crop(bound - 1)
    assert_same(store, before)
    store.crop(bound)
    assert store.seen == bound
    seq_lens = store.decoding.buffers.seq_lens
    assert (store.shortest, store.stored) == (int(seq_lens.min()), int(seq_lens.max()))
    assert decode(store, tokens(3, 2)).isfinite().all()


@pytest.mark.parametrize("length", [PROMPT, PROMPT - 1, 41, 24])
@pytest.mark.parametrize("split", COMPLETE)
def test_a_crop_into_a_prompt_of_which_nothing_was_evicted(split: str, length: int, valid: Tensor | None) -> None:
    # Row 2 of the ragged prompt has no token before position 50.
    prompt, late = tokens(3, PROMPT), tokens(3, 12)
    store = prompted(prompt, SPLITS[split], valid)
    decode(store, tokens(3, 6))
    store.crop(length)
    straight = prompted(prompt[:length], SPLITS[split], None if valid is None else valid[:, :length])
    assert_same(store, straight)
    assert_near(decode(store, late), decode(straight, late))


def test_a_crop_to_nothing_is_a_new_store_even_after_eviction(valid: Tensor | None) -> None:
    prompt, late = tokens(3, PROMPT), tokens(3, 4)
    for split in SPLITS.values():
        store = prompted(tokens(3, PROMPT), split, valid)
        store.crop(0)
        assert store.seen == store.stored == store.capacity == 0
        assert store.tensors() == {}
        extend(store, prompt, valid)
        close(store, split)
        assert torch.equal(decode(store, late), decode(prompted(prompt, split, valid), late))


def test_a_crop_beyond_the_end_does_nothing() -> None:
    store = prompted(tokens(1, PROMPT), SPLITS["rocketkv"])
    before = copy.deepcopy(store)
    store.crop(PROMPT)
    store.crop(PROMPT + 5)
    assert_same(store, before)


@pytest.mark.parametrize("removed", [1, 5, 30])
@pytest.mark.parametrize("split", SPLITS)
def test_a_crop_of_an_open_prompt(split: str, removed: int, valid: Tensor | None) -> None:
    prompt, late = tokens(3, PROMPT), tokens(3, 6)
    store = KVStore()
    extend(store, prompt[:40], None if valid is None else valid[:, :40])
    wrong = tokens(3, removed)
    extend(store, wrong)
    store.crop(40)
    extend(store, prompt[40:], None if valid is None else valid[:, 40:])
    close(store, SPLITS[split])
    straight = prompted(prompt, SPLITS[split], valid)
    assert_same(store, straight)
    assert torch.equal(decode(store, late), decode(straight, late))


def test_a_crop_of_an_open_prompt_takes_its_queries_back() -> None:
    prompt, late = tokens(2, PROMPT), tokens(2, 6)
    store = KVStore()
    extend(store, prompt[:-2])
    extend(store, tokens(2, 2))
    store.crop(PROMPT - 2)
    # Half of the window is from before the crop.
    extend(store, prompt[-2:])
    close(store, SPLITS["rocketkv"])
    straight = prompted(prompt, SPLITS["rocketkv"])
    assert_same(store, straight)
    assert torch.equal(decode(store, late), decode(straight, late))


@pytest.mark.parametrize("split", SPLITS)
def test_a_crop_from_a_second_prompt_back_into_the_answer_before_it(split: str, valid: Tensor | None) -> None:
    prompt, answer, question, late = tokens(3, PROMPT), tokens(3, 8), tokens(3, 14), tokens(3, 6)
    store, straight = prompted(prompt, SPLITS[split], valid), prompted(prompt, SPLITS[split], valid)
    decode(store, answer)
    extend(store, tokens(3, 10))
    store.crop(PROMPT + 7)
    extend(store, tokens(3, 3))
    store.crop(PROMPT + 5)
    decode(straight, answer[:5])
    for each in (store, straight):
        extend(each, question)
        close(each, SPLITS[split])
    assert store.seen == straight.seen == PROMPT + 5 + 14
    assert_near(decode(store, late), decode(straight, late))
    assert_same(store, straight)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("split", ["full", "rocketkv", "rocketkv+", "streaming", "quest"])
def test_rows_are_reordered_repeated_and_selected(split: str, rows: list[int], valid: Tensor | None) -> None:
    prompt, early, late = tokens(3, PROMPT), tokens(3, 7), tokens(3, RESERVE)
    index = torch.tensor(rows)
    plain = prompted(prompt, SPLITS[split], valid)
    first, expected = decode(plain, early), decode(plain, late)

    moved = prompted(prompt, SPLITS[split], valid)
    decode(moved, early)
    moved.map(lambda tensor: tensor.index_select(0, index))
    assert_near(decode(moved, late.rows(index)), expected[index])

    # In the middle of a prompt, its window's queries move along.
    moved = KVStore()
    extend(moved, prompt[:50], None if valid is None else valid[:, :50])
    moved.map(lambda tensor: tensor.index_select(0, index))
    extend(moved, prompt.rows(index)[50:], None if valid is None else valid[index, 50:])
    close(moved, SPLITS[split])
    assert_near(decode(moved, early.rows(index)), first[index])


@pytest.mark.parametrize("split", SPLITS)
def test_a_copy_goes_its_own_way(split: str, valid: Tensor | None) -> None:
    prompt, early = tokens(3, PROMPT), tokens(3, 3)
    one, other = tokens(3, RESERVE + 3), tokens(3, RESERVE + 3)
    store = prompted(prompt, SPLITS[split], valid)
    decode(store, early)
    fork = copy.deepcopy(store)
    found, forked = decode(store, one), decode(fork, other)
    for taken, result in ((one, found), (other, forked)):
        straight = prompted(prompt, SPLITS[split], valid)
        decode(straight, early)
        assert torch.equal(result, decode(straight, taken))


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_gives_the_same_bits_twice(split: str, valid: Tensor | None) -> None:
    prompt, generated = tokens(3, PROMPT), tokens(3, 2 * RESERVE)
    first = decode(prompted(prompt, SPLITS[split], valid), generated)
    assert torch.equal(decode(prompted(prompt, SPLITS[split], valid), generated), first)


def test_full_is_dense_attention(valid: Tensor | None) -> None:
    prompt, generated = tokens(3, PROMPT), tokens(3, 2 * RESERVE + 1)
    out = decode(prompted(prompt, SPLITS["full"], valid), generated)
    for row in range(3):
        mine = prompt.row(row, None if valid is None else valid[row])
        own = generated.row(row)
        for step in (0, 1, RESERVE, 2 * RESERVE):
            key = torch.cat((mine.key, own.key[:, :, : step + 1]), dim=2)
            value = torch.cat((mine.value, own.value[:, :, : step + 1]), dim=2)
            assert_near(out[row : row + 1, :, step], attention(own.query[:, :, step], key, value, SCALING))


# A prompt within the budget, and one beyond it.
@pytest.mark.parametrize("length", [9, PROMPT])
def test_a_rolling_store_is_bounded_and_attends_to_the_first_and_the_last(length: int) -> None:
    steps = 10 * RESERVE
    prompt, generated = tokens(2, length), tokens(2, steps)
    store = prompted(prompt, SPLITS["streaming"])
    key, value = (torch.cat((getattr(prompt, n), getattr(generated, n)), dim=2) for n in ("key", "value"))
    for step in range(steps):
        out = decode(store, generated[step : step + 1])[:, :, 0]
        assert store.capacity <= max(length, BUDGET) + decode_room(store.split, RESERVE)  # type: ignore[arg-type]
        end = length + step + 1
        seen = list(range(end)) if end <= BUDGET else [0, 1, 2, 3, *range(end - (BUDGET - 4), end)]
        assert_near(out, attention(generated.query[:, :, step], key, value, SCALING, [[seen] * HKV] * 2))
    assert store.seen == length + steps


@pytest.mark.parametrize("lengths", [[PROMPT, PROMPT], [PROMPT, 9], [9, 9]], ids=["uniform", "ragged", "short"])
def test_a_rolling_store_refuses_a_crop_into_what_it_dropped(lengths: list[int]) -> None:
    size = max(lengths)
    store = prompted(
        tokens(2, size), SPLITS["streaming"], None if min(lengths) == size else left_padding(lengths, size)
    )
    steps = 10 * RESERVE
    decode(store, tokens(2, steps))
    assert not store.decoding.aligned
    with pytest.raises(ValueError, match=f"cannot crop to {size + 5} tokens") as error:
        store.crop(size + 5)
    found = re.search(r"Crop to (\d+) or more", str(error.value))
    assert found is not None
    # Whatever may be taken back leaves the store as it was at that token.
    bound = int(found.group(1))
    assert size + 5 < bound <= size + steps
    store.crop(bound)
    positions = store.decoding.positions
    assert int(positions.max()) == bound - 1
    assert torch.equal(store.decoding.buffers.seq_lens, (positions >= 0).sum(-1))
    assert decode(store, tokens(2, 2)).isfinite().all()


def test_a_rolling_store_can_take_drafts_back(valid: Tensor | None) -> None:
    steps = 8 * RESERVE
    prompt, generated = tokens(3, PROMPT), tokens(3, steps)
    straight, drafted = (prompted(prompt, SPLITS["streaming"], valid) for _ in range(2))
    expected = decode(straight, generated)
    for step in range(steps):
        assert_near(decode(drafted, generated[step : step + 1])[:, :, 0], expected[:, :, step])
        decode(drafted, tokens(3, 5))
        drafted.crop(PROMPT + step + 1)
    assert drafted.capacity == straight.capacity


@pytest.mark.parametrize("split", EVICTING)
def test_what_was_evicted_is_freed(split: str) -> None:
    prompt = tokens(1, PROMPT)
    gone = [weakref.ref(tensor.untyped_storage()) for tensor in (prompt.query, prompt.key, prompt.value)]
    store = prompted(prompt, SPLITS[split])
    del prompt
    assert [reference() for reference in gone] == [None] * 3
    kept = SPLITS[split].kept_tokens
    assert kept is not None
    capacity = kept + decode_room(SPLITS[split], RESERVE)
    assert store.capacity == capacity
    assert store.tensors()["keys"].untyped_storage().nbytes() == HKV * capacity * D * 4
    assert store.tensors()["values"].untyped_storage().nbytes() == HKV * capacity * DV * 4
    assert not {"queries", "query_ring"} & store.tensors().keys()


def test_a_window_of_queries_does_not_keep_the_prompts_queries_alive() -> None:
    store, prompt = KVStore(), tokens(1, PROMPT)
    extend(store, prompt)
    assert store.tensors()["queries"].untyped_storage().nbytes() == H * WINDOW * D * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", SPLITS)
def test_everything_stored_keeps_the_keys_dtype(split: str, dtype: torch.dtype) -> None:
    given = tokens(2, PROMPT)
    low = Tokens(given.query.to(dtype), given.key.to(dtype), given.value.to(dtype))
    store = prompted(low, SPLITS[split])
    out = decode(store, low[:RESERVE])
    assert out.dtype == dtype
    for name in ("keys", "values", "bounds"):
        if name in store.tensors():
            assert store.tensors()[name].dtype == dtype
    assert store.tensors()["positions"].dtype == store.tensors()["seq_lens"].dtype == torch.int32


@pytest.mark.parametrize("reserve", [1, 3, 9])
@pytest.mark.parametrize("method", METHODS)
def test_the_least_budget_works(method: str, reserve: int) -> None:
    budget = METHODS[method].least_budget(WINDOW, reserve)
    for length in (1, WINDOW, WINDOW + reserve, budget + 1, PROMPT):
        store = prompted(tokens(2, length), METHODS[method].split(length, budget, D, reserve), reserve=reserve)
        assert decode(store, tokens(2, 12)).isfinite().all()
        assert store.seen == length + 12


def test_a_prompt_that_ends_with_padding_is_refused_where_stage_1_would_rank_by_it() -> None:
    prompt, right = tokens(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.bool)
    right[1, -1] = False
    store = KVStore()
    extend(store, prompt, right)
    with pytest.raises(
        ValueError, match=r"must end with a token in every row.*row 1 ends with padding; pad on the left"
    ):
        close(store, SPLITS["rocketkv"])
    # Where nothing is ranked, a row may end anywhere.
    for split in ("full", "quest", "streaming"):
        store = prompted(prompt, SPLITS[split], right)
        alone = prompted(prompt.row(1, right[1]), SPLITS[split])
        late = tokens(3, 5)
        assert_near(decode(store, late)[1], decode(alone, late.row(1))[0])


def test_calls_out_of_order_are_refused() -> None:
    store, given = KVStore(), tokens(1, 10)
    with pytest.raises(ValueError, match="needs a store whose prompt is closed"):
        store.append(given.key[:, :, 0], given.value[:, :, 0])
    with pytest.raises(ValueError, match="extend it with a prompt's tokens first"):
        close(store, SPLITS["rocketkv"])
    store.extend(given.key, given.value)
    with pytest.raises(ValueError, match="remember its queries first"):
        close(store, SPLITS["rocketkv"])
    with pytest.raises(ValueError, match="needs a store whose prompt is closed"):
        decode(store, given)


@pytest.mark.parametrize("first", [1, 300, 1452, 7702, 100_000])
def test_growth_copies_few_tokens_and_leaves_little_room(first: int) -> None:
    capacity, copied, last = first, 0, 3 * first + 2000
    while capacity < last:
        copied += capacity
        grown = grown_capacity(capacity)
        assert 0 < grown - capacity <= max(256, capacity / 8)
        # Kernels are compiled for powers of two: buffers pass none that their tokens do not.
        assert grown <= max(256, 1 << capacity.bit_length())
        capacity = grown
    assert copied <= 16 * (capacity - first) + capacity


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "snapkv"])
def test_full_buffers_grow_to_the_next_step(method: str) -> None:
    store = prompted(tokens(1, PROMPT), SPLITS[method])
    full = store.capacity
    decode(store, tokens(1, RESERVE + 1))
    assert store.capacity == grown_capacity(full) == 256
    assert all(tensor.shape[2] == 256 for name, tensor in store.tensors().items() if name in ("keys", "positions"))
