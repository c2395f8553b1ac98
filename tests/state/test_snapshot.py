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
from rocketkv.dispatch import Workspaces, decode_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from rocketkv.static_step import static_step
from static import run_static, static_pair
from tracking import Tracker
from turns import (
    BUDGET,
    KERNEL,
    PARAMS,
    PROMPT,
    RESERVE,
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
    for name in ("seen", "stored", "shortest", "split", "complete", "restorable"):
        assert getattr(found, name) == getattr(expected, name), name
    assert type(found.phase) is type(expected.phase)
    for name in ("aligned", "prompt_end", "earlier"):
        assert getattr(found.phase, name, None) == getattr(expected.phase, name, None), name
    stored, own, others = expected.stored, found.tensors(), expected.tensors()
    for name in ("queries", "query_ring", "seq_lens"):
        assert (name in own) == (name in others)
        assert name not in own or own[name].equal(others[name])
    held = torch.ones((*others["keys"].shape[:2], stored), dtype=torch.bool)
    assert ("positions" in own) == ("positions" in others)
    if "positions" in others:
        assert own["positions"][..., :stored].equal(others["positions"][..., :stored])
        held &= others["positions"][..., :stored] >= 0
    for name in ("keys", "values"):
        assert own[name][:, :, :stored][held].equal(others[name][:, :, :stored][held])


def ask(store: KVStore, question: Tokens, split: str, room: int | None = None) -> None:
    extend(store, question)
    close_prompt(store, SPLITS[split], PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=room)


def started(split: str, given: Tokens, valid: Tensor | None, room: int | None) -> KVStore:
    store = KVStore()
    extend(store, given, valid)
    close_prompt(store, SPLITS[split], PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=room)
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
            if store.complete or length >= store.restorable:
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
    for seed in range(3):
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
        bounds, right_bounds = store.tensors()["bounds"], expected.tensors()["bounds"]
        assert bounds[:, :, :2].equal(right_bounds[:, :, :2])
        assert bounds[:, :, 2, :, :44].equal(right_bounds[:, :, 2, :, :44])
        assert decode(store, late).equal(right)


def test_an_index_in_eight_bits_comes_back() -> None:
    split = rocketkv.BudgetSplit(token_budget=BUDGET, page_size=2, channels=D, top_k=8)
    store = KVStore()
    extend(store, tokens(1, PROMPT))
    close_prompt(
        store,
        split,
        PARAMS,
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
    keys, values, positions, seq_lens = store.decoding.buffers[:4]
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert (positions >= 0).sum(-1).equal(seq_lens.long())
    late = tokens(3, 5)
    assert decode(store, late).equal(decode(expected, late))


def storages(*stores: Any) -> dict[int, int]:
    """Return the bytes of every storage that stores and snapshots hold, by its address."""
    found: dict[int, int] = {}
    for each in stores:
        if isinstance(each, KVStore):
            tensors = list(each.tensors().values())
        else:
            tensors = [*each.tensors.values(), *each.copies.values(), *(part for _, part in each.saved.values())]
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_a_snapshot_shares_everything_but_the_lengths(split: str, valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], valid)
    decode(store, tokens(3, 3))
    before = storages(store)
    with Tracker(known=store.tensors().values()) as tracker:
        taken = [store.snapshot() for _ in range(5)]
    assert tracker.peak == 5 * store.decoding.buffers.seq_lens.nbytes
    decode(store, tokens(3, RESERVE - 3))  # in the room
    store.restore(taken[0])
    decode(store, tokens(3, 4))
    store.crop(store.seen - 4)
    store.restore(taken[4])
    seq_lens = {each.copies["seq_lens"].untyped_storage().data_ptr() for each in taken}
    assert set(storages(store, *taken)) - set(before) == seq_lens
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
    assert not list(store.snapshots.living())


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
        "bounds": (0, 1),
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
    assert kept["keys"].shape[2] == taken.lens.longest
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
    static.note_captured()  # from now on, a graph may be replayed at any time
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
    assert not static.lens.uncounted
    static.restore(before)
    assert static.lens.uncounted
    assert_near(run_static(step, later), expected)
    assert static.seen == 66


def test_steps_of_the_kernels_are_taken_back() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    given, valid = tokens(2, PROMPT, 16, 16), left_padding([PROMPT, 33], PROMPT)
    other, late = tokens(2, 5, 16, 16), tokens(2, 3, 16, 16)
    store, workspaces = prompted(given, SPLITS["rocketkv"], valid), Workspaces()

    def steps(given: Tokens) -> Tensor:
        out = []
        for i in range(len(given)):
            query, key, value = given.query[:, :, i], given.key[:, :, i], given.value[:, :, i]
            out.append(decode_step(query, key, value, store, PARAMS, backend="triton", workspaces=workspaces))
        return torch.stack(out, dim=2)

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
    assert workspaces.buffers


def test_a_snapshot_of_another_store_or_life_is_refused() -> None:
    store, other = (prompted(tokens(1, PROMPT), SPLITS["rocketkv"]) for _ in range(2))
    taken = store.snapshot()
    for wrong in (other, copy.deepcopy(store)):
        with pytest.raises(ValueError, match="of another store"):
            wrong.restore(taken)
    store.clear()
    with pytest.raises(ValueError, match="before it was cleared"):
        store.restore(taken)
