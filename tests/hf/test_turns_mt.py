"""RocketKV-MT through models: a conversation is the same in every way of holding it, and each turn sees all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from chat import WAYS, chat, turn
from mt_case import (
    AWAY,
    FAMILIES,
    FIRST,
    LATER,
    LATER_ROWS,
    MT,
    PADDED_FAMILIES,
    PLUS,
    ROWS,
    SECOND,
    SEEN,
    THIRD,
    close,
    conversation,
    decode,
    forward,
    of,
    read,
    same,
    talked,
    turn_of,
)
from pairs import pairs
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import LARGE, PAD, SMALL, build, greedy, left_padded, prompt

SETTINGS = {"rocketkv": SMALL, "mt": MT, "away": AWAY}


def rounded(turns: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the tokens and logits of turns with logits as float32, whose tolerance they are held to."""
    return [(tokens, logits.float()) for tokens, logits in turns]


@pytest.mark.integration
@pytest.mark.parametrize(("name", "family", "padded", "way"), pairs(SETTINGS, FAMILIES, [False, True], WAYS))
def test_three_turns_are_the_same_in_every_way(name: str, family: str, padded: bool, way: str) -> None:
    # In float64: ways round differently, and a rounded score near another one changes a selection or an expert.
    model, fields = build(family).double(), SETTINGS[name]
    model.config._experts_implementation = "eager"  # grouped products take no float64
    with rocketkv.patch(model, **fields):
        expected, cache = conversation(model, padded, "all tokens")
        assert cache.get_seq_length() == SEEN
        found, other = conversation(model, padded, way, **fields)
        same(rounded(found), rounded(expected))
        assert other.get_seq_length() == SEEN
        for layer, its in zip(rocketkv_layers(cache), rocketkv_layers(other), strict=True):
            stored = layer.store.stored
            assert stored == its.store.stored
            assert layer.store.phase.positions[..., :stored].equal(its.store.phase.positions[..., :stored])


@pytest.mark.integration
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_budget_every_turn_is_the_stock_models(family: str, padded: bool) -> None:
    model = build(family)
    first, later = (left_padded(ROWS), LATER_ROWS) if padded else (of(FIRST), LATER)
    expected, _ = chat(model, first, later, "all tokens")
    fields = {**LARGE, "method": "rocketkv-mt"}
    with rocketkv.patch(model, **fields):
        # Every family in every way, half of them with padding.
        for way in ("all tokens", *WAYS[padded::2]):
            same(conversation(model, padded, way, **fields)[0], expected)
        # No cache is kept at all: each turn reads the whole conversation again.
        ids, mask = first["input_ids"], first["attention_mask"]
        for (tokens, logits), new in zip(expected, (*later, None), strict=True):
            found = turn(model, ids, mask, None, "all tokens")
            close(found[1], logits)
            assert found[0].equal(tokens)
            if new is not None:
                given = torch.cat((tokens, new), dim=1)
                ids, mask = torch.cat((ids, given), dim=1), torch.cat((mask, torch.ones_like(given)), dim=1)


@pytest.mark.integration
@pytest.mark.parametrize(("family", "name", "heads"), pairs(PADDED_FAMILIES, ["mt", "away"], [1, 2, 4]))
def test_rows_of_a_padded_batch_are_their_single_runs(family: str, name: str, heads: int) -> None:
    model, fields = build(family, num_key_value_heads=heads), SETTINGS[name]
    with rocketkv.patch(model, **fields):
        answers, cache = chat(model, left_padded(ROWS), LATER_ROWS, "all tokens")
        for i, row in enumerate(ROWS):
            alone, alone_cache = chat(model, of(row), [new[i : i + 1] for new in LATER_ROWS], "all tokens")
            same([(tokens[i : i + 1], logits[i : i + 1]) for tokens, logits in answers], alone)
            for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(alone_cache), strict=True):
                for head, other_head in zip(
                    layer.store.phase.positions[i], other.store.phase.positions[0], strict=True
                ):
                    assert (head[head >= 0] - 90 + row.shape[1]).equal(other_head[other_head >= 0])


@pytest.mark.integration
def test_a_later_turn_sees_what_an_earlier_one_left_out() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        cache = talked(model, **MT)
        for layer in rocketkv_layers(cache):
            before = set(layer.store.phase.positions[0, 0].tolist())
            assert len(before - {-1}) == 40 + 12
            taken = cache.snapshot()
            forward(model, cache, prompt(20, seed=50))
            decode(model, cache, prompt(1))
            after = set(layer.store.phase.positions[0, 0].tolist())
            assert min(after - {-1} - before) < 90 + 12 + 50 + 12 + 35
            cache.rollback(taken)


@pytest.mark.integration
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_prompt_of_one_token_begins_a_turn_when_told(fields: dict[str, Any]) -> None:
    model, one = build(), prompt(1, seed=60)
    with rocketkv.patch(model, **fields):
        cache = talked(model, **fields)
        taken = cache.snapshot()
        decoded = forward(model, cache, one)
        cache.rollback(taken)
        # The same token as the first of a longer prompt: it attends to all there is.
        dense = forward(model, cache, torch.cat((one, SECOND), dim=1))[:, :1]
        found = []
        for length in (None, 1):
            cache.rollback(taken)
            cache.begin_turn(length)
            found.append(turn_of(model, cache, one, 12))
            for layer in rocketkv_layers(cache):
                assert layer.store.stored == 40 + 12
                assert layer.store.decoding.prompt_end == SEEN + 2
        cache.rollback(taken)
        cache.begin_turn()
        ids = torch.cat((prompt(SEEN + 1, seed=70), one), dim=1)  # what the cache has seen is not read again
        found.append(greedy(model, of(ids), 13, **{CACHE_ARGUMENT: cache})[1])
    close(found[0][:, :1], dense)
    assert (found[0][:, :1] - decoded).abs().max() > 0.01
    assert found[1].equal(found[0])
    close(found[2], found[0])


@pytest.mark.integration
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_turn_in_chunks_of_one_token_when_its_length_is_told(fields: dict[str, Any]) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        cache = talked(model, **fields)
        whole = copy.deepcopy(cache)
        expected = turn_of(model, whole, THIRD)
        cache.begin_turn(35)
        found = [forward(model, cache, part) for part in THIRD.split([1, 1, 20, 12, 1], dim=1)]
        found.append(decode(model, cache, expected[:, 34:-1].argmax(-1)))
    close(torch.cat(found, dim=1), expected)


@pytest.mark.integration
# By pages: a draft's forward rounds otherwise than one token's, by which a sketch's scale may be another 16-bit number.
@pytest.mark.parametrize(
    ("family", "history_device", "draft"),
    pairs(["llama", "gemma2"], [None, "cpu"], ["prompt lookup", "assistant", "early exit"]),
)
def test_drafts_are_no_turn_and_leave_nothing_behind(family: str, history_device: str | None, draft: str) -> None:
    model, assistant, fields = build(family), build(family), {**MT, "history_device": history_device}
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape) * 0.2)
    how: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": assistant},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    first, second = torch.cat([prompt(12, seed=5)] * 8, dim=1), torch.cat([prompt(9, seed=6)] * 4, dim=1)
    with rocketkv.patch(model, **fields):
        (expected, later), plain = chat(model, of(first), [second], "all tokens", count=24)
        tokens, logits, cache = greedy(model, first, 24, **how)
        assert tokens.equal(expected[0])
        close(logits, expected[1])
        # Assisted decoding of transformers itself takes no cache of an earlier turn: it reads everything again onto it.
        ids = torch.cat((first, tokens, second), dim=1)
        tokens, logits, cache = turn(model, ids, torch.ones_like(ids), cache, "all tokens", 24)
        assert tokens.equal(later[0])
        close(logits, later[1])
        assert cache.get_seq_length() == plain.get_seq_length() == 96 + 24 + 36 + 23


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_static_caches_hold_the_same_conversation(fields: dict[str, Any], padded: bool) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        expected, _ = conversation(model, padded, "all tokens")
    static = {**fields, "decode_capacity": 16}
    with rocketkv.patch(model, **static):
        for way in ("all tokens", *WAYS)[padded::2]:
            found, cache = conversation(model, padded, way, **static)
            assert all(layer.step is not None for layer in rocketkv_layers(cache))
            same(found, expected)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_sixteen_bits_away_is_the_same(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    with rocketkv.patch(model, **PLUS):
        expected, _ = chat(model, of(FIRST), LATER, "all tokens")
    with rocketkv.patch(model, **AWAY):
        found, cache = chat(model, of(FIRST), LATER, "all tokens")
    for (tokens, logits), (other, other_logits) in zip(found, expected, strict=True):
        assert tokens.equal(other)
        assert logits.equal(other_logits)
    for layer in rocketkv_layers(cache):
        assert layer.store.keys.dtype == layer.history.keys.dtype == torch.bfloat16


@pytest.mark.integration
def test_generate_again_goes_on_where_it_stopped() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        expected, expected_logits, _ = greedy(model, FIRST, 24)
        tokens, _, cache = greedy(model, FIRST, 10)
        found, logits, _ = greedy(model, torch.cat((FIRST, tokens), dim=1), 14, **{CACHE_ARGUMENT: cache})
    assert found.equal(expected[:, 10:])
    close(logits, expected_logits[:, 10:])


@pytest.mark.integration
def test_padding_of_a_first_prompt_is_never_seen_in_a_later_turn() -> None:
    """What a padded slot holds changes nothing, in the filter and in dense attention over the history alike."""
    model = build()
    context = left_padded(ROWS)
    mask = context["attention_mask"]
    spoilt = {**context, "input_ids": torch.where(mask == 0, 17, context["input_ids"])}
    assert (context["input_ids"] == PAD).any()
    with rocketkv.patch(model, **MT):
        outs = []
        for each in (context, spoilt):
            cache = read(model, each, **MT)
            outs.append([turn_of(model, cache, new, mask=mask) for new in LATER_ROWS])
    for found, expected in zip(*outs, strict=True):
        close(found, expected)
