"""Several prompts on one cache, caches of the user's own, and what one may do to a cache between two steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import rocketkv
from chat import WAYS, turn
from pairs import pairs
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import FAMILIES, LARGE, SMALL, TRANSFORMERS, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.integration

FIRST, SECOND = prompt(90), prompt(50, seed=7)
METHODS = ["rocketkv", "rocketkv+", "snapkv", "quest", "sparq", "streaming", "full"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def settings(method: str) -> dict[str, Any]:
    """Return settings of a method with one split for every prompt."""
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(90, 16)
    return {**SMALL, "method": method, "split": split}


def stored(cache: Any) -> list[Tensor]:
    return [layer.store.phase.positions[..., : layer.store.stored] for layer in rocketkv_layers(cache)]


def two_turns(model: Any, first: Any, second: Tensor, way: str) -> tuple[Tensor, Tensor, Any]:
    """Generate after a first prompt, then after a second one on the same cache; return what `greedy` does of it."""
    inputs = {"input_ids": first} if isinstance(first, Tensor) else first
    tokens, _, cache = greedy(model, inputs)
    new = torch.cat((tokens, second), dim=1)
    ids = torch.cat((inputs["input_ids"], new), dim=1)
    mask = torch.ones_like(ids)
    if "attention_mask" in inputs:
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(new)), dim=1)
    return turn(model, ids, mask, cache, way)


@pytest.mark.parametrize(
    ("family", "padded", "way"),
    pairs(["llama", "gemma2", "gemma3", "gpt-oss"], [False, True], ["all tokens", *WAYS]),
)
def test_second_turn_within_the_budget(family: str, padded: bool, way: str) -> None:
    model = build(family)
    first = left_padded([FIRST, prompt(33)]) if padded else FIRST
    second = prompt(50, rows=2, seed=7) if padded else SECOND
    expected, expected_logits, _ = two_turns(model, first, second, "loop in chunks" if way == "chunks" else way)
    with rocketkv.patch(model, **LARGE):
        tokens, logits, cache = two_turns(model, first, second, way)
    assert tokens.equal(expected)
    close(logits, expected_logits)
    assert cache.get_seq_length() == 90 + 12 + 50 + 11


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_second_turn_is_the_same_in_every_way(method: str, way: str) -> None:
    model = build()
    with rocketkv.patch(model, **settings(method)):
        tokens, logits, cache = two_turns(model, FIRST, SECOND, "all tokens")
        found = two_turns(model, FIRST, SECOND, way)
    assert found[0].equal(tokens)
    close(found[1], logits)
    for positions, other in zip(stored(found[2]), stored(cache), strict=True):
        assert positions.equal(other)
    assert cache.get_seq_length() == 90 + 12 + 50 + 11


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_of_a_padded_batch_is_its_rows_alone(family: str) -> None:
    model = build(family)
    rows = [FIRST, prompt(41), prompt(15, seed=9)]
    seconds = prompt(50, rows=3, seed=8)
    with rocketkv.patch(model, **SMALL):
        _, logits, cache = two_turns(model, left_padded(rows), seconds, "all tokens")
        for i, row in enumerate(rows):
            _, alone, alone_cache = two_turns(model, row, seconds[i : i + 1], "all tokens")
            # The first turn's tokens differ from row to row, but not between batch and row alone.
            close(logits[i : i + 1], alone)
            for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(alone_cache), strict=True):
                for head, other_head in zip(
                    layer.store.phase.positions[i], other.store.phase.positions[0], strict=True
                ):
                    assert (head[head >= 0] - 90 + row.shape[1]).equal(other_head[other_head >= 0])


def test_generate_again_goes_on_where_it_stopped() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        expected, expected_logits, _ = greedy(model, FIRST, 24)
        tokens, _, cache = greedy(model, FIRST, 10)
        found, logits, _ = greedy(model, torch.cat((FIRST, tokens), dim=1), 14, **{CACHE_ARGUMENT: cache})
    assert found.equal(expected[:, 10:])
    close(logits, expected_logits[:, 10:])


@pytest.mark.parametrize("make", [lambda c: rocketkv.RocketKVCache(c, **SMALL), lambda c: DynamicCache(config=c),
                                  lambda c: DynamicCache()], ids=["ours", "dynamic", "bare dynamic"])  # fmt: skip
def test_a_cache_of_ones_own(make: Callable[[Any], Any]) -> None:
    model = build("gemma3")
    with rocketkv.patch(model, **SMALL) as handle:
        expected, expected_logits, _ = greedy(model, FIRST)
        again, again_logits, _ = two_turns(model, FIRST, SECOND, "all tokens")
        cache = make(model.config)
        tokens, logits, returned = greedy(model, FIRST, **{CACHE_ARGUMENT: cache})
        assert returned is cache
        assert tokens.equal(expected)
        close(logits, expected_logits)
        assert [layer.compressed for layer in handle.stats().layers] == [False, True, False, True]
        assert {layer.store.stored for layer in rocketkv_layers(cache)} == {40 + 11}
        ids = torch.cat((FIRST, tokens, SECOND), dim=1)
        tokens, logits, _ = greedy(model, ids, **{CACHE_ARGUMENT: cache})
        assert tokens.equal(again)
        close(logits, again_logits)
        in_a_loop = hand_written(model, FIRST, cache=make(model.config))
        assert in_a_loop[0].equal(expected)
        close(in_a_loop[1], expected_logits)


def steps(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Feed tokens [B, n] one by one and return the logits [B, n, V]."""
    with torch.no_grad():
        out = [model(token, **{CACHE_ARGUMENT: cache}, use_cache=True).logits for token in tokens.split(1, dim=1)]
    return torch.cat(out, dim=1)


def prefilled(model: Any, ids: Tensor, tokens: Tensor, told: bool = True, **fields: Any) -> Any:
    """Return a cache that has seen a prompt, and some tokens after it."""
    length = ids.shape[1] if told else None
    cache = rocketkv.RocketKVCache(model.config, prompt_length=length, **(fields or SMALL))
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    if tokens.shape[1]:
        steps(model, cache, tokens)
    return cache


@pytest.mark.parametrize(("done", "told", "pickled"), pairs([0, 13], [True, False], [False, True]))
def test_a_copy_goes_on_alike_and_apart(done: int, told: bool, pickled: bool) -> None:
    def clone(cache: Any) -> Any:
        return pickle.loads(pickle.dumps(cache)) if pickled else copy.deepcopy(cache)

    model, tokens, others = build("gemma3"), prompt(30, seed=11), prompt(30, seed=12)
    with rocketkv.patch(model, **SMALL):
        cache = prefilled(model, FIRST, tokens[:, :done], told)
        fork = clone(cache)
        diverging = clone(cache)
        steps(model, diverging, others)
        expected = steps(model, prefilled(model, FIRST, tokens[:, :done], told), tokens[:, done:])
        assert steps(model, cache, tokens[:, done:]).equal(expected)
        assert steps(model, fork, tokens[:, done:]).equal(expected)
    assert fork.get_seq_length() == cache.get_seq_length() == 90 + 30


@pytest.mark.parametrize("removed", [1, 7, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_crop_forgets_what_it_removes(padded: bool, removed: int) -> None:
    model, tokens = build(), prompt(40, seed=11, rows=2)
    with rocketkv.patch(model, **SMALL):
        inputs = left_padded([FIRST, prompt(20)]) if padded else {"input_ids": prompt(90, rows=2)}
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        with torch.no_grad():
            model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
        copied = copy.deepcopy(cache)
        steps(model, copied, tokens[:, :5])
        expected = steps(model, copied, tokens[:, 5:])
        steps(model, cache, tokens[:, :5])
        steps(model, cache, prompt(removed, seed=13, rows=2))
        cache.crop(90 + 5 if TRANSFORMERS < (5, 16) else -removed)
        assert cache.get_seq_length() == 95
        found = steps(model, cache, tokens[:, 5:])
    close(found, expected)
    for positions, other in zip(stored(cache), stored(copied), strict=True):
        assert positions.equal(other)


def test_crop_cannot_bring_back_what_was_evicted() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        cache = prefilled(model, FIRST, prompt(5))
        with pytest.raises(ValueError, match="cannot crop to 60 tokens"):
            cache.crop(60)
        # The last tokens of the prompt, of which none is ever evicted, may go.
        cache.crop(85)
        assert cache.get_seq_length() == 85
        assert steps(model, cache, prompt(9)).isfinite().all()
    with rocketkv.patch(model, **LARGE):
        cache = prefilled(model, FIRST, prompt(5), **LARGE)
        expected = greedy(model, FIRST[:, :60], 6)
        cache.crop(59)
        tokens, logits, _ = hand_written(model, FIRST[:, 59:60], 6, cache=cache)
    assert tokens.equal(expected[0])
    close(logits, expected[1])


ROW_OPERATIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize(("padded", "told", "operation"), pairs([False, True], [True, False], ROW_OPERATIONS))
def test_row_operations(padded: bool, told: bool, operation: str) -> None:
    model, tokens = build(), prompt(30, seed=11, rows=3)
    operate, order = ROW_OPERATIONS[operation]
    inputs = left_padded([FIRST, prompt(20), prompt(55)]) if padded else {"input_ids": prompt(90, rows=3)}
    mask = inputs.get("attention_mask")
    position = None if mask is None else mask.sum(-1, keepdim=True)

    def go_on(cache: Any, rows: list[int]) -> Tensor:
        logits = []
        with torch.no_grad():
            for i in range(tokens.shape[1]):
                at = None if position is None else position[rows] + i
                given = tokens[rows, i : i + 1]
                full = None if mask is None else torch.cat((mask[rows], mask.new_ones(len(rows), i + 1)), dim=1)
                logits.append(
                    model(given, **{CACHE_ARGUMENT: cache}, use_cache=True, position_ids=at, attention_mask=full).logits
                )
        return torch.cat(logits, dim=1)

    with rocketkv.patch(model, **SMALL):
        caches = []
        for _ in range(2):
            cache = rocketkv.RocketKVCache(model.config, prompt_length=90 if told else None, **SMALL)
            with torch.no_grad():
                model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
            caches.append(cache)
        expected = go_on(caches[0], [0, 1, 2])
        operate(caches[1])
        found = go_on(caches[1], order)
    close(found, expected[order])


def test_reset_forgets_everything() -> None:
    model = build()  # the sliding layers of transformers 4 keep zeros
    with rocketkv.patch(model, **SMALL):
        expected = greedy(model, SECOND)
        cache = greedy(model, FIRST)[2]
        cache.reset()
        assert cache.get_seq_length() == 0
        tokens, logits, _ = greedy(model, SECOND, **{CACHE_ARGUMENT: cache})
    assert tokens.equal(expected[0])
    close(logits, expected[1])


def test_several_tokens_after_a_prompt_verify_a_draft() -> None:
    """Nothing is evicted in them, one warning says how to begin a turn, and `begin_turn` runs stage 1 again."""
    model = build()
    with rocketkv.patch(model, **SMALL), torch.no_grad():
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        model(FIRST, **{CACHE_ARGUMENT: cache})
        tokens = prompt(5, seed=3)
        single = copy.deepcopy(cache)
        expected = [model(token, **{CACHE_ARGUMENT: single}).logits for token in tokens.split(1, dim=1)]
        with pytest.warns(UserWarning, match=r"verifies a draft, and evicts nothing.*call begin_turn\(\)"):
            found = model(tokens, **{CACHE_ARGUMENT: cache}).logits
        close(found, torch.cat(expected, dim=1))
        layers = rocketkv_layers(cache)
        assert [layer.store.stored for layer in layers] == [layer.store.stored for layer in rocketkv_layers(single)]
        model(tokens, **{CACHE_ARGUMENT: cache})  # warnings are errors here: there is no second one
        cache.begin_turn()
        model(SECOND, **{CACHE_ARGUMENT: cache})
        assert not any(layer.store.closed for layer in layers)
        model(prompt(1), **{CACHE_ARGUMENT: cache})
        assert all(layer.store.decoding.prompt_end == 90 + 5 + 5 + 50 for layer in layers)
