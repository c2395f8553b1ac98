"""Snapshots of caches: a model goes on from one as if nothing had come in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from hybrids import LINEAR, linear
from rocketkv.hf.compiled import TORCH
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from static import ROOM, STATIC, inputs_of, own_loop, places
from tiny import LARGE, SMALL, TRANSFORMERS, build, greedy, left_padded, prompt
from tracking import Tracker

pytestmark = pytest.mark.integration

METHODS = ["rocketkv", "rocketkv+", "quest", "sparq", "snapkv", "streaming", "full"]
CONTEXT = prompt(90)
QUESTIONS = [prompt(6 + i % 5, seed=20 + i) for i in range(7)]  # each length, and two of them again


def settings(method: str) -> dict[str, Any]:
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(90, 16)
    return {**SMALL, "method": method, "split": split}


def forward(model: Any, cache: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **kwargs).logits
    return logits


def read(model: Any, context: dict[str, Tensor], **fields: Any) -> Any:
    ids = context["input_ids"]
    cache = rocketkv.RocketKVCache(model.config, prompt_length=ids.shape[1], **fields)
    forward(model, cache, **{"ids": ids, **{name: value for name, value in context.items() if name != "input_ids"}})
    return cache


def answered(model: Any, cache: Any, question: Tensor, mask: Tensor | None = None, count: int = 5) -> Tensor:
    """Return the logits of a question, a turn unless it is a single token, and of greedy tokens after it."""
    if question.shape[1] > 1:
        cache.begin_turn()
    logits, given = [], question
    for _ in range(count + 1):
        extra: dict[str, Tensor] = {}
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(given.shape)), dim=1)
            extra = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -given.shape[1] :]}
        logits.append(forward(model, cache, given, **extra))
        given = logits[-1][:, -1:].argmax(-1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_many_questions_on_one_context(method: str) -> None:
    model = build()
    fields = settings(method)
    with rocketkv.patch(model, **fields):
        cache = read(model, {"input_ids": CONTEXT}, **fields)
        taken = cache.snapshot()
        for question in QUESTIONS:
            found = answered(model, cache, question)
            expected = answered(model, read(model, {"input_ids": CONTEXT}, **fields), question)
            assert found.equal(expected)
            cache.rollback(taken)
            assert cache.get_seq_length() == 90


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "gemma2"])
def test_hybrids_come_back_with_their_sliding_layers(family: str, padded: bool) -> None:
    model = build(family)
    rows = [CONTEXT, prompt(33), prompt(15, seed=9)]
    context = left_padded(rows) if padded else {"input_ids": CONTEXT}
    mask = context.get("attention_mask")
    questions = [prompt(length, rows=len(rows) if padded else 1, seed=40 + length) for length in (3, 30, 7)]
    with rocketkv.patch(model, **SMALL):
        cache = read(model, context, **SMALL)
        taken = cache.snapshot()
        for question in questions:
            expected = answered(model, read(model, context, **SMALL), question, mask, 12)
            assert answered(model, cache, question, mask, 12).equal(expected)
            later = cache.snapshot()  # of another branch each time
            cache.rollback(taken)
            assert cache.get_seq_length() == 90
            cache.rollback(later)
            assert cache.get_seq_length() == 90 + question.shape[1] + 12
            cache.rollback(taken)


@pytest.mark.skipif(TRANSFORMERS < (5, 8), reason="older ones give such models a cache of their own kind")
@pytest.mark.parametrize("name", LINEAR)
def test_hybrids_come_back_with_their_linear_layers(name: str) -> None:
    model = linear(name)
    late = prompt(6, seed=5).split(1, dim=1)
    with rocketkv.patch(model, **SMALL):
        cache = read(model, {"input_ids": CONTEXT}, **SMALL)
        taken, copied = cache.snapshot(), copy.deepcopy(cache)
        expected = [forward(model, copied, token) for token in late]
        for _ in range(3):
            assert all(forward(model, cache, token).equal(right) for token, right in zip(late, expected, strict=True))
            newer = cache.snapshot()
            cache.rollback(taken)
            forward(model, cache, prompt(1, seed=8))
            cache.rollback(newer)
            cache.rollback(taken)


@pytest.mark.parametrize("method", METHODS)
def test_through_generate(method: str) -> None:
    model = build()
    fields = settings(method)
    with rocketkv.patch(model, **fields):
        first, _, cache = greedy(model, CONTEXT, 10)
        ids = torch.cat((CONTEXT, first), dim=1)
        taken = cache.snapshot()
        expected = greedy(model, CONTEXT, 30)
        for _ in range(2):
            for question in QUESTIONS[:2]:
                asked = torch.cat((ids, question), dim=1)
                found = greedy(model, asked, 8, **{CACHE_ARGUMENT: cache})
                other = greedy(model, CONTEXT, 10)[2]
                right = greedy(model, asked, 8, **{CACHE_ARGUMENT: other})
                assert found[0].equal(right[0])
                assert found[1].equal(right[1])
                cache.rollback(taken)
            # No question at all: the answer goes on, beyond the buffers of its time.
            found = greedy(model, ids, 20, **{CACHE_ARGUMENT: cache})
            assert found[0].equal(expected[0][:, 10:])
            cache.rollback(taken)


def test_drafts_are_taken_back_by_a_snapshot() -> None:
    model = build("gemma3")
    with rocketkv.patch(model, **SMALL):
        straight = read(model, {"input_ids": CONTEXT}, **SMALL)
        expected = answered(model, straight, CONTEXT[:, -1:], count=12)
        cache, found, given = read(model, {"input_ids": CONTEXT}, **SMALL), [], CONTEXT[:, -1:]
        for i in range(13):
            taken = cache.snapshot()
            for draft in prompt(4, seed=60 + i).split(1, dim=1):
                forward(model, cache, draft)
            cache.rollback(taken)
            found.append(forward(model, cache, given))
            given = found[-1][:, -1:].argmax(-1)
    assert torch.cat(found, dim=1).equal(expected)


@pytest.mark.parametrize("rows", ["one", "padded"])
def test_a_static_cache_stays_where_it_is(rows: str) -> None:
    model = build()
    inputs = inputs_of(rows)
    position = inputs["attention_mask"].sum(-1, keepdim=True)

    def steps(cache: Any, ids: Tensor) -> Tensor:
        return torch.cat(
            [
                forward(model, cache, token, position_ids=position + cache.get_seq_length() - 90)
                for token in ids.split(1, dim=1)
            ],
            dim=1,
        )

    with rocketkv.patch(model, **STATIC):
        *_, cache = own_loop(model, inputs, model, 3)
        where, held = places(cache), [layer.step for layer in rocketkv_layers(cache)]
        taken = cache.snapshot()
        batch = inputs["input_ids"].shape[0]
        late = prompt(6, rows=batch, seed=5)
        expected = steps(copy.deepcopy(cache), late)
        for turn in range(2):
            assert steps(cache, late).equal(expected)
            newer = cache.snapshot()
            cache.rollback(taken)
            steps(cache, prompt(9, rows=batch, seed=6))
            cache.rollback(newer)
            assert places(cache) == where
            assert cache.get_seq_length() == 92 + 6
            if turn:
                # A second prompt has buffers of its own; the first one's come back.
                mask = torch.ones(batch, 92 + 6 + 8, dtype=torch.long)
                mask[:, :90] = inputs["attention_mask"]
                cache.begin_turn()
                forward(model, cache, prompt(8, rows=batch, seed=7), attention_mask=mask,
                        position_ids=position + torch.arange(8, 16))  # fmt: skip
                assert places(cache) != where
            cache.rollback(taken)
            assert places(cache) == where
            assert [layer.step for layer in rocketkv_layers(cache)] == held
            assert cache.get_seq_length() == 92
        assert steps(cache, late).equal(expected)


def test_a_full_static_cache_can_go_back() -> None:
    model = build()
    with rocketkv.patch(model, **STATIC):
        *_, cache = own_loop(model, inputs_of("one"), model, 1)
        taken, token = cache.snapshot(), prompt(1, seed=3)
        expected = forward(model, copy.deepcopy(cache), token)
        for _ in range(ROOM):
            forward(model, cache, token)
        with pytest.raises(ValueError, match="raise decode_capacity"):
            forward(model, cache, token)
        cache.rollback(taken)
        assert forward(model, cache, token).equal(expected)


@pytest.mark.skipif(TORCH < (2, 7), reason="PyTorch does not trace the models")
def test_compiled_steps_are_taken_back() -> None:
    model = build()
    with rocketkv.patch(model, **STATIC):
        *_, cache = own_loop(model, inputs_of("one"), model, 1)
        taken = cache.snapshot()
        expected = answered(model, copy.deepcopy(cache), prompt(1, seed=3))
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        for _ in range(2):
            with torch.no_grad():
                for i, token in enumerate(prompt(5, seed=4).split(1, dim=1)):
                    place = torch.tensor([90 + i])
                    old = {"cache_position": place} if TRANSFORMERS < (5,) else {}
                    compiled(token, position_ids=place[None], **{CACHE_ARGUMENT: cache}, **old)
            assert rocketkv_layers(cache)[0].store.lens.uncounted
            cache.rollback(taken)
            assert cache.get_seq_length() == 90
        assert answered(model, cache, prompt(1, seed=3)).equal(expected)


def test_a_snapshot_of_a_cache_copies_no_keys_and_values() -> None:
    model = build("gemma3")
    with rocketkv.patch(model, **SMALL):
        cache = read(model, {"input_ids": CONTEXT}, **SMALL)
        known = [tensor for layer in rocketkv_layers(cache) for tensor in layer.store.tensors().values()]
        lengths = sum(layer.store.decoding.buffers.seq_lens.nbytes for layer in rocketkv_layers(cache))
        with Tracker(known=known) as tracker:
            taken = [cache.snapshot() for _ in range(4)]
        assert tracker.peak == 4 * lengths
        for _ in range(3):
            forward(model, cache, prompt(1))
        with Tracker(known=known) as tracker:
            cache.rollback(taken[1])
        assert tracker.largest[0] < known[0].nbytes // 8


@pytest.mark.parametrize("given", [512, {"token_budget": 512}])
def test_a_cache_of_no_config_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=f"config must be a RocketKVConfig or None, got {type(given).__name__}"):
        rocketkv.RocketKVCache(build().config, given)


def test_a_rollback_to_no_snapshot_is_refused() -> None:
    with pytest.raises(TypeError, match=r"what snapshot\(\) returned, got int"):
        rocketkv.RocketKVCache(build().config, **SMALL).rollback(3)  # type: ignore[arg-type]


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (copy.deepcopy, "of another cache"),
    (lambda cache: rocketkv.RocketKVCache(build().config, **SMALL), "of another cache"),
    (lambda cache: (cache.reset(), cache)[1], "before the cache was reset"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=["copy", "other", "reset"])
def test_snapshots_that_are_not_of_this_cache_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = build()
    with rocketkv.patch(model, **LARGE):
        cache = read(model, {"input_ids": CONTEXT}, **LARGE)
        taken = cache.snapshot()
        changed = change(cache)
        with pytest.raises(ValueError, match=message):
            changed.rollback(taken)
        if changed is not cache:
            cache.rollback(taken)
            assert cache.get_seq_length() == 90
