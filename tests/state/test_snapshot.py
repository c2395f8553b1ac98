"""Snapshots: whatever came in between, going back is exact; nothing is copied that need not be; buffers stay."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from rocketkv.core.attention import AttentionParams
from rocketkv.dispatch import decode_step, static_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from static import run_static, static_pair
from tracking import Tracker
from turns import (
    BUDGET,
    KERNEL,
    PROMPT,
    RESERVE,
    SCALING,
    SPLITS,
    D,
    Tokens,
    close,
    decode,
    extend,
    left_padding,
    prompted,
    tokens,
)

METHODS = ["rocketkv", "rocketkv+", "quest", "sparq", "snapkv", "streaming", "full"]
NAN = float("nan")


@pytest.fixture(params=[None, [PROMPT, 33, 10]], ids=["uniform", "ragged"])
def valid(request: pytest.FixtureRequest) -> Tensor | None:
    return None if request.param is None else left_padding(request.param, PROMPT)


def assert_same(found: KVStore, expected: KVStore) -> None:
    """Assert that two stores hold the same tokens, bit for bit, and know the same about them."""
    for name in ("seen", "stored", "shortest", "closed", "aligned", "split", "_complete", "_restorable", "_prompt_end"):
        assert getattr(found, name) == getattr(expected, name), name
    stored = expected.stored
    for name in ("window", "lengths"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or a.equal(b)
    if expected.positions is None:
        assert found.positions is None
        held = torch.ones((*expected.keys.shape[:2], stored), dtype=torch.bool)  # type: ignore[union-attr]
    else:
        assert found.positions is not None
        assert found.positions[..., :stored].equal(expected.positions[..., :stored])
        held = (expected.positions[..., :stored] >= 0).expand(*expected.keys.shape[:2], -1)  # type: ignore[union-attr]
    for a, b in ((found.keys, expected.keys), (found.values, expected.values)):
        assert a[:, :, :stored][held].equal(b[:, :, :stored][held])  # type: ignore[index]


def ask(store: KVStore, question: Tokens, split: str, room: int | None = None) -> None:
    extend(store, question)
    close_prompt(
        store, SPLITS[split], AttentionParams(SCALING), decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=room
    )


def started(split: str, given: Tokens, valid: Tensor | None, room: int | None) -> KVStore:
    store = KVStore()
    extend(store, given, valid)
    close_prompt(
        store, SPLITS[split], AttentionParams(SCALING), decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=room
    )
    return store


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_goes_on_as_from_a_copy(split: str, valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], valid)
    decode(store, tokens(3, 3))
    expected, taken = copy.deepcopy(store), store.snapshot()
    late = tokens(3, 7)
    right = decode(copy.deepcopy(expected), late)
    # Within the room, over the room (growth, or a roll), and over a second prompt.
    for other in (tokens(3, 5), tokens(3, 4 * RESERVE + 3)):
        decode(store, other)
        store.restore(taken)
        assert_same(store, expected)
        assert decode(store, late).equal(right)
    ask(store, tokens(3, 9), split)
    decode(store, tokens(3, 5))
    store.restore(taken)
    assert_same(store, expected)
    assert decode(store, late).equal(right)


def walk(store: KVStore, split: str, rows: int, seed: int, steps: int, *, static: bool) -> None:
    """Take a store through random prompts, steps, crops, snapshots and ways back; compare with copies throughout."""
    choose = random.Random(seed)
    taken: list[tuple[Any, KVStore]] = []
    for _ in range(steps):
        closed = ["snapshot", "snapshot", "decode", "decode", "ask", "chunk", "crop", "back", "back", "drop"]
        what = choose.choice(closed if store.closed else ["snapshot", "chunk", "ask", "crop", "back"])
        room = store.capacity - store.stored
        if what == "snapshot":
            taken.append((store.snapshot(), copy.deepcopy(store)))
        elif what == "decode" and (room or not static):
            count = choose.choice([1, 2, 5, RESERVE + 2])
            decode(store, tokens(rows, min(count, room) if static else count))
        elif what == "chunk":
            extend(store, tokens(rows, choose.choice([3, 9])))
        elif what == "ask":
            ask(store, tokens(rows, choose.choice([3, 9])), split, 2 * RESERVE if static else None)
        elif what == "crop":
            length = store.seen - choose.choice([1, 3, 6])
            if store._complete or length >= store._restorable:
                store.crop(length)
        elif what == "drop" and taken:
            del taken[choose.randrange(len(taken))]
        elif what == "back" and taken:
            chosen, expected = choose.choice(taken)
            store.restore(chosen)
            assert_same(store, expected)
            if store.closed and store.capacity - store.stored >= 4:
                # Both go on alike; the store then goes its own way from there.
                late = tokens(rows, 4)
                assert decode(store, late).equal(decode(copy.deepcopy(expected), late))


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("split", METHODS)
def test_any_walk_comes_back_exactly(split: str, static: bool, valid: Tensor | None) -> None:
    for seed in range(4):
        store = started(split, tokens(3, PROMPT), valid, 2 * RESERVE if static else None)
        walk(store, split, 3, seed, 50, static=static)


def test_an_index_of_several_tiles_comes_back() -> None:
    # 300 pages of one token: three tiles. An older snapshot lets other tokens close pages in the middle one.
    split = rocketkv.BudgetSplit(token_budget=BUDGET, page_size=1, channels=D, top_k=8)
    store = prompted(tokens(1, 120), split)
    old = store.snapshot()
    decode(store, tokens(1, 180))
    new, expected = store.snapshot(), copy.deepcopy(store)
    late = tokens(1, 6)
    right = decode(copy.deepcopy(expected), late)
    for _ in range(2):
        store.restore(old)
        decode(store, tokens(1, 200))
        store.restore(new)
        assert_same(store, expected)
        assert store.decoding.buffers.index_tensors[0] is not None
        assert expected.index is not None
        assert store.decoding.buffers.index_tensors[0][:, :, :2].equal(expected.index[:, :, :2])
        assert store.decoding.buffers.index_tensors[0][:, :, 2, :, :44].equal(expected.index[:, :, 2, :, :44])
        assert decode(store, late).equal(right)


def test_an_index_in_eight_bits_comes_back() -> None:
    split = rocketkv.BudgetSplit(token_budget=BUDGET, page_size=2, channels=D, top_k=8)
    store = KVStore()
    extend(store, tokens(1, PROMPT))
    close_prompt(
        store,
        split,
        AttentionParams(SCALING),
        decode_reserve=RESERVE,
        kernel_size=KERNEL,
        index_dtype=torch.float8_e5m2,
    )
    old = store.snapshot()
    decode(store, tokens(1, 9))
    new, expected = store.snapshot(), copy.deepcopy(store)
    store.restore(old)
    decode(store, tokens(1, 12))
    store.restore(new)
    late = tokens(1, 6)
    assert decode(store, late).equal(decode(expected, late))


@pytest.mark.parametrize("split", METHODS)
@pytest.mark.parametrize("static", [None, 3 * RESERVE], ids=["grows", "static"])
def test_what_spoilt_a_dropped_continuation_spoils_nothing_else(
    split: str, static: int | None, valid: Tensor | None
) -> None:
    store = started(split, tokens(3, PROMPT), valid, static)
    decode(store, tokens(3, 2))
    expected, taken = copy.deepcopy(store), store.snapshot()
    wrong = tokens(3, 9)
    wrong.key.fill_(NAN)
    wrong.value.fill_(NAN)
    decode(store, wrong)
    store.restore(taken)
    for tensor, whole in ((store.keys, True), (store.values, True)):
        assert tensor is not None
        assert tensor.isfinite().all() == whole
    assert store.phase.positions is not None
    assert (store.phase.positions >= 0).sum(-1).equal(store.decoding.buffers.seq_lens.long())  # type: ignore[union-attr]
    late = tokens(3, 5)
    assert decode(store, late).equal(decode(expected, late))


def storages(*stores: Any) -> dict[int, int]:
    """Return the bytes of every storage that stores and snapshots hold, by its address."""
    found: dict[int, int] = {}
    for each in stores:
        tensors = (
            [*each.tensors().values()]
            if isinstance(each, KVStore)
            else [*each.home.values(), each.decoding.buffers.seq_lens]
        )
        tensors += [] if isinstance(each, KVStore) else [part for _, part in each.saved.values()]
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_a_snapshot_shares_everything_but_the_lengths(split: str, valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], valid)
    decode(store, tokens(3, 3))
    before = storages(store)
    with Tracker(known=store.tensors().values()) as tracker:
        taken = [store.snapshot() for _ in range(5)]
    assert tracker.peak == 5 * store.decoding.buffers.seq_lens.nbytes  # type: ignore[union-attr]
    decode(store, tokens(3, RESERVE - 3))  # in the room
    store.restore(taken[0])
    decode(store, tokens(3, 4))
    store.crop(store.seen - 4)
    store.restore(taken[4])
    lengths = {each.decoding.buffers.seq_lens.untyped_storage().data_ptr() for each in taken}  # type: ignore[union-attr]
    assert set(storages(store, *taken)) - set(before) == lengths
    assert not any(each.saved for each in taken)


def test_a_second_prompt_costs_a_snapshot_nothing_but_the_old_buffers() -> None:
    store = prompted(tokens(1, PROMPT), SPLITS["rocketkv"])
    before = storages(store)
    taken = store.snapshot()
    ask(store, tokens(1, 9), "rocketkv")
    assert storages(store).keys().isdisjoint(before)
    held = storages(taken)
    assert set(before) <= set(held)
    assert len(held) == len(before) + 1  # the copy of the lengths
    del taken
    gc.collect()
    assert not list(store._living())


def test_only_what_is_written_over_is_copied() -> None:
    store = prompted(tokens(1, PROMPT), SPLITS["quest"])
    old = store.snapshot()
    decode(store, tokens(1, 8))
    new = store.snapshot()
    store.restore(old)
    assert old.saved == {}
    # Pages of five tokens: twelve are full before the eight tokens come, and thirteen after.
    assert {name: (first, part.shape[2]) for name, (first, part) in new.saved.items()} == {
        "keys": (PROMPT, 8),
        "values": (PROMPT, 8),
        "positions": (PROMPT, 8),
        "index": (0, 1),
    }
    store.restore(new)
    assert new.saved == {}
    assert old.saved == {}


def test_a_roll_makes_one_copy_for_each_snapshot_and_none_without() -> None:
    store = prompted(tokens(1, PROMPT), SPLITS["streaming"])
    decode(store, tokens(1, 60))
    taken = store.snapshot()
    decode(store, tokens(1, 200))
    kept = {name: part for name, (_, part) in taken.saved.items()}
    assert kept["keys"].shape[2] == taken.stored
    decode(store, tokens(1, 200))
    assert all(taken.saved[name][1] is part for name, part in kept.items())


def test_an_open_prompt_comes_back() -> None:
    given, question, other = tokens(3, PROMPT), tokens(3, 20), tokens(3, 12)
    for inference in (False, True):
        store = KVStore()
        with torch.inference_mode(inference):
            extend(store, given[:40])
            first = store.snapshot()
            extend(store, given[40:])
            second, expected = store.snapshot(), copy.deepcopy(store)
            store.crop(44)
            extend(store, other)
            store.restore(first)
            extend(store, other)
            close(store, SPLITS["rocketkv"])
            decode(store, question)
        store.restore(second)
        assert_same(store, expected)
        close(store, SPLITS["rocketkv"])
        assert_same(store, prompted(given, SPLITS["rocketkv"]))
        store.restore(first)
        extend(store, given[40:])
        close(store, SPLITS["rocketkv"])
        assert_same(store, prompted(given, SPLITS["rocketkv"]))


def test_an_empty_store_comes_back() -> None:
    store = KVStore()
    taken = store.snapshot()
    given = tokens(2, PROMPT)
    extend(store, given)
    close(store, SPLITS["rocketkv"])
    store.restore(taken)
    assert store.tensors() == {}
    assert store.seen == store.stored == store.capacity == 0
    extend(store, given)
    close(store, SPLITS["rocketkv"])
    assert_same(store, prompted(given, SPLITS["rocketkv"]))


def test_rows_that_were_moved_come_back(valid: Tensor | None) -> None:
    for static in (None, 3 * RESERVE):
        store = started("rocketkv", tokens(3, PROMPT), valid, static)
        expected, taken = copy.deepcopy(store), store.snapshot()
        where = {name: tensor.data_ptr() for name, tensor in store.tensors().items()}
        for rows in ([2, 0, 0], [1]):
            store.map(lambda tensor, rows=rows: tensor.index_select(0, torch.tensor(rows)))  # type: ignore[misc]
            decode(store, tokens(len(rows), 3))
            store.restore(taken)
            assert {name: tensor.data_ptr() for name, tensor in store.tensors().items()} == where
            late = tokens(3, 4)
            assert decode(store, late).equal(decode(copy.deepcopy(expected), late))


@pytest.mark.parametrize("method", ["rocketkv", "streaming", "full"])
def test_steps_that_only_the_device_counted_are_taken_back(method: str) -> None:
    growing, static, given = static_pair(method, [60, 33], 20)
    step = static_step(given.query[:, :, 0], static)
    before, later = static.snapshot(), given[:6]
    expected = decode(growing, later)
    static.advance_uncounted(captured=True)  # from now on, a graph may be replayed at any time
    for _ in range(2):
        assert_near(run_static(step, later), expected)
        assert static.seen == 66
        after = static.snapshot()
        static.restore(before)
        assert (static.seen, int(static.clock())) == (60, 60)
        run_static(step, given[6:15])
        assert static.seen == 69
        static.restore(after)
        assert static.seen == 66
        static.restore(before)
    # So it may after another prompt, on whose buffers it does not work.
    ask(static, tokens(2, 7), method, 20)
    assert static.counted
    static.restore(before)
    assert not static.counted
    assert_near(run_static(step, later), expected)
    assert static.seen == 66


def test_steps_of_the_kernels_are_taken_back() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    given, valid = tokens(2, PROMPT, 16, 16), left_padding([PROMPT, 33], PROMPT)
    other, late = tokens(2, 5, 16, 16), tokens(2, 3, 16, 16)
    store, settings = prompted(given, SPLITS["rocketkv"], valid), {"backend": "triton", "workspaces": {}}

    def steps(tokens: Tokens) -> Tensor:
        parts = (tokens.query, tokens.key, tokens.value)
        each = ([part[:, :, i] for part in parts] for i in range(len(tokens)))
        return torch.stack(
            [decode_step(*step, store, params=AttentionParams(SCALING), **settings) for step in each], dim=2
        )  # type: ignore[arg-type]

    steps(other[:1])
    taken, expected = store.snapshot(), copy.deepcopy(store)
    right = steps(late)
    store.restore(taken)
    newer = store.snapshot()
    steps(other)
    for back in (taken, newer):
        store.restore(back)
        assert_same(store, expected)
        assert steps(late).equal(right)
    assert settings["workspaces"]


def test_a_snapshot_of_another_store_or_life_is_refused() -> None:
    store, other = (prompted(tokens(1, PROMPT), SPLITS["rocketkv"]) for _ in range(2))
    taken = store.snapshot()
    for wrong in (other, copy.deepcopy(store)):
        with pytest.raises(ValueError, match="of another store"):
            wrong.restore(taken)
    store.clear()
    with pytest.raises(ValueError, match="before it was cleared"):
        store.restore(taken)
