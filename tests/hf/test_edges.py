"""Uses that are legal and easily forgotten: gradients, inference mode, other caches, drafts, failures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rocketkv
from rocketkv.core.attention import AttentionParams
from rocketkv.core.eviction import prompt_scores
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import LARGE, PAD, SMALL, build, greedy, hand_written, prompt

pytestmark = pytest.mark.integration


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_gradients_in_eval_mode_are_the_stock_models(name: str) -> None:
    model, ids = build(name), prompt(40)
    expected = gradients(model, ids)
    with rocketkv.patch(model, **SMALL):
        found = gradients(model, ids)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_a_dynamic_cache_asked_for_by_name_is_compressed(where: str) -> None:
    model, ids = build(), prompt(90)
    with rocketkv.patch(model, **SMALL) as handle:
        expected = greedy(model, ids)
        if where == "argument":
            found = greedy(model, ids, cache_implementation="dynamic")
        else:
            model.generation_config.cache_implementation = "dynamic"
            found = greedy(model, ids)
        assert handle.stats().layers[0].tokens_stored == 40 + 11
    assert found[0].equal(expected[0])


def test_stats_are_those_of_the_last_generate_only() -> None:
    model, ids = build(), prompt(40)
    with rocketkv.patch(model, **SMALL) as handle:
        greedy(model, ids)
        assert handle.stats().tokens_seen == 40 + 11
        with pytest.warns(UserWarning, match="StaticCache"):
            greedy(model, ids, cache_implementation="static")
        with pytest.raises(ValueError, match="no RocketKVCache"):
            handle.stats()


def test_an_attention_implementation_set_in_between_is_refused() -> None:
    model, ids = build(), prompt(30)
    with rocketkv.patch(model, **SMALL):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=r"set to 'sdpa'; call rocketkv\.unpatch"):
            greedy(model, ids)
    assert greedy(model, ids)[0].shape == (1, 12)


def test_a_patched_assistant_may_take_tokens_back() -> None:
    model, assistant, ids = build(), build(seed=1), prompt(90)
    expected = greedy(model, ids, 30)
    with rocketkv.patch(assistant, **SMALL):
        found = greedy(model, ids, 30, assistant_model=assistant)
    assert found[0].equal(expected[0])


def test_streaming_rolls_while_drafts_are_taken_back() -> None:
    model, ids = build(), torch.cat([prompt(30)] * 3, dim=1)
    fields: dict[str, Any] = {"method": "streaming", "token_budget": 24, "decode_reserve": 4, "window_size": 4}
    with rocketkv.patch(model, **fields):
        expected = greedy(model, ids, 150)
        found = greedy(model, ids, 150, prompt_lookup_num_tokens=5)
    assert found[0].equal(expected[0])


def test_the_prompts_last_tokens_may_be_cropped_and_come_again() -> None:
    model, ids = build(), prompt(90)
    with rocketkv.patch(model, **SMALL), torch.no_grad():
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        model(ids, **{CACHE_ARGUMENT: cache})
        kept = copy.deepcopy(cache)
        cache.crop(-5 if hasattr(cache, "get_query_offset") else 85)
        assert cache.get_seq_length() == 85
        for layer, whole in zip(cache.layers, kept.layers, strict=True):
            assert layer.store.phase.positions[..., :35].equal(whole.store.phase.positions[..., :35])
        for token in ids[0, 85:]:
            model(token.view(1, 1), **{CACHE_ARGUMENT: cache})
        for layer, whole in zip(cache.layers, kept.layers, strict=True):
            assert layer.store.phase.positions.equal(whole.store.phase.positions)
        # Deeper layers differ: these tokens were decoded, those of the prompt attended to everything.
        torch.testing.assert_close(cache.layers[0].keys, kept.layers[0].keys)


def test_a_prompt_that_waits_does_not_keep_a_fused_projection_alive() -> None:
    model = build("phi3", num_attention_heads=16)
    with rocketkv.patch(model, **LARGE), torch.no_grad():
        stats = model(prompt(200), use_cache=True).get(CACHE_ARGUMENT).stats()
    assert stats.total("key_bytes") + stats.total("value_bytes") == stats.total("full_bytes")


def test_a_row_that_ends_with_padding_is_refused_where_it_would_rank_tokens() -> None:
    model = build()
    ids = torch.cat([prompt(100), nn.functional.pad(prompt(70, seed=5), (0, 30), value=PAD)])
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match="row 1 ends with padding; pad on the left"):
        model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=2)


def test_the_longest_row_sets_the_split_over_padded_turns() -> None:
    model = build()
    fields = {"token_budget": 24, "decode_reserve": 8, "window_size": 4, "kernel_size": 7}
    first, second = torch.zeros(2, 100, dtype=torch.int64), torch.zeros(2, 80, dtype=torch.int64)
    for turn, lengths in ((first, (100, 20)), (second, (5, 80))):
        for row, length in enumerate(lengths):
            turn[row, -length:] = 1
    mask = torch.cat([first, second], dim=1)
    ids = prompt(180, rows=2)
    with rocketkv.patch(model, **fields), torch.no_grad():
        cache = rocketkv.RocketKVCache(model.config, prompt_length=100, **fields)
        model(ids[:, :100], attention_mask=first, **{CACHE_ARGUMENT: cache})
        cache.begin_turn()
        model(ids[:, 100:], attention_mask=mask, **{CACHE_ARGUMENT: cache})
        model(ids[:, :1], attention_mask=nn.functional.pad(mask, (0, 1), value=1), **{CACHE_ARGUMENT: cache})
    expected = rocketkv.RocketKVConfig(**fields).split_for(105, model.config.head_dim)
    assert cache.layers[0].store.split == expected


def test_a_failed_generate_leaves_a_cache_that_loops_can_use() -> None:
    model, ids = build(), prompt(60)
    with rocketkv.patch(model, **SMALL):
        expected = hand_written(model, ids, 6)
        cache = rocketkv.RocketKVCache(model.config, **SMALL)
        with pytest.raises(ValueError, match="bogus"):
            model.generate(prompt(90), **{CACHE_ARGUMENT: cache}, bogus=1)
        found = hand_written(model, ids, 6, cache=cache)
    assert found[0].equal(expected[0])
    assert cache.layers[0].store.stored == 40 + 5


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_inference_mode_and_no_grad_mix_within_a_prompt(first: Any) -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        with first():
            cache = model(prompt(60), use_cache=True).get(CACHE_ARGUMENT)
            cache.crop(-5 if hasattr(cache, "get_query_offset") else 55)
        with torch.no_grad():
            model(prompt(8), **{CACHE_ARGUMENT: cache})
            model(prompt(1), **{CACHE_ARGUMENT: cache})
        with torch.inference_mode():
            assert model(prompt(1), **{CACHE_ARGUMENT: cache}).logits.isfinite().all()


def test_autocast_leaves_scores_in_float32() -> None:
    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 90, 16)
    params = AttentionParams(0.25)
    expected = prompt_scores(query, key, params, kernel_size=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompt_scores(query, key, params, kernel_size=7).equal(expected)
