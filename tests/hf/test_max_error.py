"""A cache whose layers set their own budgets when the prompt has been read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import rocketkv
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import build, greedy, prompt

LENGTH = 600
SMALL: dict[str, Any] = {"decode_reserve": 20, "window_size": 16, "kernel_size": 5}


def read(model: Any, bound: float) -> rocketkv.RocketKVCache:
    """Return a cache after a prompt."""
    cache = rocketkv.RocketKVCache(model.config, method="rocketkv+", max_error=bound, prompt_length=LENGTH, **SMALL)
    with rocketkv.patch(model, method="rocketkv+", max_error=bound, **SMALL), torch.inference_mode():
        model(prompt(LENGTH), **{CACHE_ARGUMENT: cache})
    return cache


def test_each_layer_has_a_budget_and_says_what_it_expects() -> None:
    model = build()
    loose, strict = (read(model, bound).stats() for bound in (0.95, 0.6))
    for layer in loose.layers:
        assert layer.token_budget is not None
        assert layer.expected_error is not None
        assert 0 < layer.expected_error <= 0.95
        assert layer.tokens_stored < LENGTH
    budgets = [[layer.token_budget or LENGTH for layer in stats.layers] for stats in (loose, strict)]
    assert sum(budgets[0]) < sum(budgets[1])
    assert loose.total_bytes < strict.total_bytes
    assert loose.to_dict()["layers"][0]["expected_error"] == loose.layers[0].expected_error


def test_a_layer_that_must_rank_nearly_all_tokens_is_sparse_within_the_full_caches_bytes() -> None:
    stats = read(build(), 0.3).stats()
    assert any(layer.token_budget is not None for layer in stats.layers)
    for layer in stats.layers:
        if layer.token_budget is not None:
            room = 1 + SMALL["decode_reserve"] / LENGTH
            residual = 512  # at most: sums of values, and factors
            assert layer.key_bytes + layer.value_bytes + layer.index_bytes <= room * layer.full_bytes + residual
            assert layer.step_bytes < layer.dense_step_bytes


def test_where_nothing_is_within_the_bound_all_is_kept_with_one_warning() -> None:
    model = build()
    with pytest.warns(
        UserWarning, match="no budget up to 296 tokens is expected to be within max_error=1e-06"
    ) as given:
        cache = read(model, 1e-6)
    assert len(given) == 1
    assert all(layer.token_budget is None and layer.expected_error == 0 for layer in cache.stats().layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rocketkv.patch(model, method="rocketkv+", max_error=1e-6, **SMALL):
            found, *_ = greedy(model, prompt(LENGTH), 8)
    expected, *_ = greedy(model, prompt(LENGTH), 8)
    assert torch.equal(found, expected)


def test_a_saved_cache_keeps_its_budgets(tmp_path: Path) -> None:
    model = build()
    cache = read(model, 0.9)
    rocketkv.save_cache(cache, tmp_path / "cache.safetensors", model=model, ids=prompt(LENGTH))
    loaded = rocketkv.load_cache(tmp_path / "cache.safetensors", model)
    for own, other in zip(cache.stats().layers, loaded.stats().layers, strict=True):
        assert (own.token_budget, own.expected_error) == (other.token_budget, other.expected_error)


def test_a_second_turn_fits_anew() -> None:
    model = build()
    cache = read(model, 0.9)
    with rocketkv.patch(model, method="rocketkv+", max_error=0.9, **SMALL), torch.inference_mode():
        model(prompt(1), **{CACHE_ARGUMENT: cache})
        cache.begin_turn(LENGTH)
        model(prompt(LENGTH, seed=3), **{CACHE_ARGUMENT: cache})
    assert all(layer.expected_error is not None for layer in cache.stats().layers)
    assert cache.get_seq_length() == 2 * LENGTH + 1
