"""What a conversation leaves in its cache: after crops, refused ones too, and after drafts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.chat import ChatMarks
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.patch import state_of
from rocketkv.state import history
from rocketkv.state.history import History
from rocketkv.state.protection import RowMarks
from tiny import SKETCH_SPLIT, SMALL, TRANSFORMERS, begin_turn, build, greedy, prompt
from turns import last_queries

pytestmark = pytest.mark.integration

MT: dict[str, Any] = {**SMALL, "method": "rocketkv-mt"}
AWAY: dict[str, Any] = {**MT, "method": "rocketkv-mt+", "split": SKETCH_SPLIT, "history_device": "cpu"}


def forward(model: Any, cache: Any, ids: Tensor) -> Tensor:
    begin_turn(cache, ids)
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
    return logits


def decode(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return torch.cat([forward(model, cache, token) for token in ids.split(1, dim=1)], dim=1)


def read(model: Any, **fields: Any) -> RocketKVCache:
    """Return a cache that has seen a prompt of 90 tokens."""
    cache = RocketKVCache(model.config, prompt_length=90, **fields)
    forward(model, cache, prompt(90))
    return cache


def crop(cache: Any, removed: int) -> None:
    cache.crop(cache.get_seq_length() - removed if TRANSFORMERS < (5, 16) else -removed)


@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_refused_crop_leaves_the_history_alone(fields: dict[str, Any]) -> None:
    model = build()
    settings = {**fields, "decode_capacity": 32}
    with rocketkv.patch(model, **settings):
        cache = read(model, **settings)
        decode(model, cache, prompt(60, seed=3))
        other = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="cannot crop to 110 tokens"):
            crop(cache, 40)
        found = [forward(model, each, prompt(20, seed=5)) for each in (cache, other)]
    assert found[0].equal(found[1])


def test_no_more_can_be_removed_than_there_is() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        cache = read(model, **MT)
        for layer in rocketkv_layers(cache):
            with pytest.raises(ValueError, match="cannot remove 91 tokens: the sequence has 90"):
                layer.crop(-91)
        assert cache.get_seq_length() == 90


@pytest.mark.parametrize(
    ("length", "error", "match"),
    [(0, ValueError, "at least 1"), (-5, ValueError, "at least 1"), (True, TypeError, "bool"), ("5", TypeError, "str")],
)
def test_a_prompts_length_is_checked(length: Any, error: type[Exception], match: str) -> None:
    model = build()
    with pytest.raises(error, match=match):
        RocketKVCache(model.config, prompt_length=length, **MT)
    cache = RocketKVCache(model.config, **MT)
    with pytest.raises(error, match=match):
        cache.begin_turn(length)


def test_a_crop_of_an_open_prompt_forgets_its_ids() -> None:
    """Messages of an open prompt are looked for with each of its forwards, in all its ids."""
    model = build()
    settings = {**SMALL, "protect": ((0, 4),), "fair_shares": True}
    first, second = prompt(90).clamp(max=90), prompt(30, seed=4).clamp(max=90)
    first[0, 40:42] = second[0, 10:12] = torch.tensor([93, 95])
    with rocketkv.patch(model, **SMALL):
        state = state_of(model)
        assert state is not None
        state.config = replace(state.config, protect=((0, 4),), fair_shares=True)
        state.chat = ChatMarks((1,), (93, 94), ((93, 95), (93, 95)))
        cache = RocketKVCache(model.config, **settings)
        forward(model, cache, first)
        crop(cache, 10)
        forward(model, cache, second)
        for layer in rocketkv_layers(cache):
            assert layer.store.marks == (RowMarks(((0, 4),), (40, 90)),)
        crop(cache, 95)
        forward(model, cache, second)
        assert rocketkv_layers(cache)[0].store.marks == (RowMarks(((0, 4),), (15 + 10,)),)


@pytest.mark.parametrize("count", [2, 7, 8, 12])
def test_rejected_drafts_leave_the_remembered_queries_as_they_were(count: int) -> None:
    model = build()
    settings = {**SMALL, "decode_capacity": 40}
    found = []
    with rocketkv.patch(model, **settings):
        for drafts in (0, count):
            cache = read(model, **settings)
            decode(model, cache, prompt(10, seed=3))
            for layer in rocketkv_layers(cache):
                layer.speculative = True
            forward(model, cache, torch.cat((prompt(3, seed=4), prompt(12, seed=5)[:, :drafts]), dim=1))
            if drafts:
                crop(cache, drafts)
            decode(model, cache, prompt(2, seed=6))
            found.append([last_queries(layer.store) for layer in rocketkv_layers(cache)])
    for one, other in zip(*found, strict=True):
        assert one.shape[2] == SMALL["window_size"]
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("drafts", [3, 10])
@pytest.mark.parametrize("fields", [SMALL, MT], ids=["rocketkv", "mt"])
def test_drafts_are_verified_in_a_bounded_cache(fields: dict[str, Any], drafts: int) -> None:
    """Room for all of them is made before: a draft that is rejected evicts nothing."""
    model, repeated = build(), torch.cat([prompt(12, seed=5)] * 8, dim=1)
    settings = {**fields, "decode_capacity": 24}
    with rocketkv.patch(model, **settings):
        expected, _, _ = greedy(model, repeated, 24)
        with pytest.warns(UserWarning, match="drafts are verified"):
            tokens, _, cache = greedy(model, repeated, 80, prompt_lookup_num_tokens=drafts)
    assert tokens.shape[1] == 80
    assert tokens[:, : 24 - drafts].equal(expected[:, : 24 - drafts])
    for layer in rocketkv_layers(cache):
        assert layer.store.stored <= layer.store.capacity == 40 + 24


def test_each_layers_history_is_fetched_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the one before it begins to: tokens decoded since do not make it begin anew."""
    model, fetched = build(num_hidden_layers=3), []
    plain = History._fetch

    def counted(self: History, *args: Any) -> Any:
        fetched.append([layer.history for layer in rocketkv_layers(cache)].index(self))
        return plain(self, *args)

    answers = []
    with rocketkv.patch(model, **AWAY):
        for early in (False, True):
            monkeypatch.setattr(history, "overlaps", lambda device, early=early: early)
            cache = read(model, **AWAY)
            monkeypatch.setattr(History, "_fetch", counted)
            logits = []
            for decoded in (0, 5, 1):
                if decoded:
                    logits.append(decode(model, cache, prompt(decoded, seed=decoded)))
                fetched.clear()
                logits.append(forward(model, cache, prompt(20, seed=7)))
                assert fetched == [0, 1, 2]
                logits.append(decode(model, cache, prompt(1, seed=8)))
            monkeypatch.setattr(History, "_fetch", plain)
            answers.append(torch.cat(logits, dim=1))
    assert answers[0].equal(answers[1])
