"""What a decode step does underneath: it never waits for the device, and copies none of what is stored."""

from __future__ import annotations

import copy

import pytest
import torch

from rocketkv.budget import METHODS, BudgetSplit
from rocketkv.core.decode import recent_slots
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import MOST_CACHED, _multiples, multiples, scalar
from rocketkv.dispatch import decode_step
from rocketkv.state.store import KVStore
from tracking import Tracker
from turns import HKV, Tokens, close, decode, extend, left_padding, tokens

SIZE, BUDGET, RESERVE, WIDTH = 2000, 64, 40, 64
LAYOUTS = {"uniform": [SIZE, SIZE], "ragged": [SIZE, 1100], "ragged with a short row": [SIZE, 30]}
# The oracles read all keys by definition.
PRACTICAL = [name for name in METHODS if name not in ("exact-topk", "stored-topk")]


def wide(count: int) -> Tokens:
    return tokens(2, count, WIDTH, WIDTH)


def steady_store(method: str, lengths: list[int]) -> KVStore:
    """Return a store in the middle of decoding, with room for more."""
    store = KVStore()
    extend(store, wide(SIZE), None if min(lengths) == SIZE else left_padding(lengths, SIZE))
    close(store, METHODS[method].split(SIZE, BUDGET, WIDTH, RESERVE), RESERVE)
    decode(store, wide(7))
    return store


def tracked_steps(store: KVStore, given: Tokens) -> Tracker:
    known = [*store.tensors().values(), given.query, given.key, given.value]
    with Tracker(known) as tracker:
        decode(store, given)
    assert tracker.operations
    return tracker


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method: str, layout: str) -> None:
    store = steady_store(method, LAYOUTS[layout])
    # Over a border of pages, too.
    assert tracked_steps(store, wide(RESERVE - 8)).syncs() == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", PRACTICAL)
def test_no_step_copies_what_is_stored(method: str, layout: str) -> None:
    store = steady_store(method, LAYOUTS[layout])
    tracker = tracked_steps(store, wide(12))
    size, name = tracker.largest
    keys = 2 * HKV * store.stored * WIDTH * 4
    assert size < keys, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_step_writes_into_the_same_buffers(method: str, layout: str) -> None:
    store = steady_store(method, LAYOUTS[layout])
    before = {name: tensor.data_ptr() for name, tensor in store.tensors().items()}
    decode(store, wide(20))
    assert {name: tensor.data_ptr() for name, tensor in store.tensors().items()} == before


def test_what_steps_keep_is_on_the_cpu_whatever_the_default_device_is() -> None:
    scalar.cache_clear()
    _multiples.cache_clear()
    for method in ("rocketkv", "rocketkv+"):
        store, given = steady_store(method, LAYOUTS["uniform"]), wide(2)
        expected = decode(copy.deepcopy(store), given)
        scalar.cache_clear()
        _multiples.cache_clear()
        with torch.device("meta"):
            decode(copy.deepcopy(store), given)
        assert decode(store, given).equal(expected)


def test_what_steps_keep_is_small() -> None:
    for count in (1, MOST_CACHED, MOST_CACHED + 1):
        made = multiples(count, -3, torch.device("cpu"))
        assert made.tolist() == [-3 * i for i in range(count)]
        assert (multiples(count, -3, torch.device("cpu")) is made) == (count <= MOST_CACHED)


@pytest.mark.parametrize("residual", [False, True])
def test_a_step_has_gradients(residual: bool) -> None:
    split = BudgetSplit(token_budget=24, kept_tokens=40, page_size=2, channels=6, top_k=12, residual=residual)
    store = KVStore()
    extend(store, wide(80))
    close(store, split, RESERVE)
    given = wide(1)
    query = given.query[:, :, 0].requires_grad_()
    decode_step(
        query, given.key[:, :, 0], given.value[:, :, 0], store, AttentionParams(WIDTH**-0.5), backend="torch"
    ).sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert query.grad.any()


def test_growth_and_rolling_do_not_wait_either() -> None:
    for method in ("rocketkv", "streaming"):
        store = steady_store(method, LAYOUTS["ragged"])
        assert tracked_steps(store, wide(RESERVE)).syncs() == []


@pytest.mark.parametrize(("k", "sinks"), [(1, 1), (8, 4), (8, 8), (5, 1)])
def test_recent_is_the_first_and_the_last_slots(k: int, sinks: int) -> None:
    lengths = torch.tensor([[k, k + 1, 50], [k + 7, 49, 33]], dtype=torch.int32)
    found = recent_slots(lengths, k, sinks)
    for length, slots in zip(lengths.view(-1).tolist(), found.view(-1, k).tolist(), strict=True):
        assert slots == [*range(sinks), *range(length - (k - sinks), length)]


def test_the_tracker_sees_what_lives_and_what_dies() -> None:
    given = torch.zeros(1000)
    with Tracker([given]) as tracker:
        first = given + 1
        view = first[10:20].view(2, 5)
        assert sum(tracker.live.values()) == 4000
        second = torch.cat((first, given))
        del first
        assert sum(tracker.live.values()) == 12000
        del view
        assert sum(tracker.live.values()) == 8000
        positive = second.sum() > 0
        assert bool(positive)
        del second, positive
        assert not tracker.live
    assert tracker.peak == 12000
    assert tracker.largest == (8000, "cat")
    assert tracker.syncs() == ["_local_scalar_dense"]
