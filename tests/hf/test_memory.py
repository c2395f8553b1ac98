"""What lives while a prompt is read and after it: found by a walk of this file's own, not by the library's counting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rope import longrope
from storages import storages, walked
from tiny import COMMON, SETTINGS, build, greedy, left_padded, prompt

LAYERS = 6
LENGTH = 900
PROMPT = prompt(LENGTH)
PADDED = left_padded([PROMPT, prompt(700, seed=2)])
EVICTING = ["rocketkv", "snapkv", "streaming", "stored-topk"]


def during_prefill(model: Any, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[bool]]]:
    """Return, at each decoder layer's first exit, the bytes of the cache and which layers' full keys still live."""
    caches: list[Any] = []
    keys: list[weakref.ref[Any]] = []
    samples: list[tuple[int, list[bool]]] = []
    update = RocketKVLayer.update

    def noted(layer: RocketKVLayer, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys.append(weakref.ref(key.untyped_storage()))
        return update(layer, key, value, *args, **kwargs)

    def sample(*_: Any) -> None:
        if len(samples) < LAYERS:
            samples.append((walked(caches[0]), [key() is not None for key in keys]))

    monkeypatch.setattr(RocketKVLayer, "update", noted)
    hooks = [layer.register_forward_hook(sample) for layer in model.model.layers]
    hooks.append(
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: caches.append(kwargs[CACHE_ARGUMENT]), with_kwargs=True
        )
    )
    run()
    for hook in hooks:
        hook.remove()
    assert len(samples) == LAYERS
    return samples


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", EVICTING)
def test_peak_of_an_unchunked_prefill(
    method: str, dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(num_hidden_layers=LAYERS).to(dtype)
    inputs = PADDED if padded else PROMPT
    batch = 2 if padded else 1
    full = 2 * batch * COMMON["num_key_value_heads"] * LENGTH * COMMON["head_dim"] * dtype.itemsize
    with rocketkv.patch(model, method=method, token_budget=64, **SETTINGS) as handle:
        samples = during_prefill(model, lambda: greedy(model, inputs, 1), monkeypatch)
        compressed = [layer.total_bytes for layer in handle.stats().layers]
    assert max(compressed) < 0.6 * full
    for i, (live, full_keys) in enumerate(samples):
        assert live <= full + sum(compressed[: i + 1])
        # Better than that: what is evicted is gone before the layer's own MLP runs.
        assert live == sum(compressed[: i + 1])
        assert full_keys == [False] * (i + 1)


def test_peak_of_a_model_that_drops_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = longrope(num_hidden_layers=LAYERS)
    with rocketkv.patch(model, token_budget=64, **SETTINGS) as handle:
        samples = during_prefill(model, lambda: greedy(model, PROMPT, 1), monkeypatch)
        compressed = [layer.total_bytes for layer in handle.stats().layers]
    assert [live for live, _ in samples] == [sum(compressed[: i + 1]) for i in range(LAYERS)]
    assert not any(any(full_keys) for _, full_keys in samples)


def test_peak_of_a_hybrid_model(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_types = ["sliding_attention", "full_attention"] * 3
    model = build("gemma3", num_hidden_layers=LAYERS, layer_types=layer_types)
    with rocketkv.patch(model, token_budget=64, **SETTINGS) as handle:
        samples = during_prefill(model, lambda: greedy(model, PROMPT, 1), monkeypatch)
        layers = [layer.total_bytes for layer in handle.stats().layers]
    for i, (live, _) in enumerate(samples):
        # A sliding layer holds its window as a tensor of one integer, also before its first token.
        assert 0 <= live - sum(layers[: i + 1]) <= 3 * 8


@pytest.mark.parametrize("new_tokens", [1, 40])
@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("method", sorted(rocketkv.METHODS))
def test_stats_are_what_a_walk_finds(method: str, dtype: torch.dtype, padded: bool, new_tokens: int) -> None:
    model = build().to(dtype)
    with rocketkv.patch(model, method=method, token_budget=64, **SETTINGS) as handle:
        cache = greedy(model, PADDED if padded else PROMPT, new_tokens)[2]
    assert cache.stats() == handle.stats()
    assert cache.stats().total_bytes == walked(cache)
    for layer, stats in zip(cache.layers, cache.stats().layers, strict=True):
        assert stats.total_bytes == walked(layer)
        assert stats.tokens_seen == LENGTH + new_tokens - 1
        assert stats.tokens_stored == layer.store.stored


@pytest.mark.parametrize("method", sorted(rocketkv.METHODS))
def test_a_cache_is_freed_with_its_last_reference(method: str) -> None:
    model = build()
    with rocketkv.patch(model, method=method, token_budget=64, **SETTINGS):
        cache = greedy(model, PROMPT, 5)[2]
    parts = [
        part for layer in rocketkv_layers(cache) for part in (layer, layer.store, layer.history) if part is not None
    ]
    living = [weakref.ref(part) for part in parts]
    del parts
    gc.collect()
    gc.disable()  # a ring would wait for the collector, with all that it holds
    try:
        del cache
        assert [part() for part in living] == [None] * len(living)
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "cohere2"])
def test_stats_of_hybrid_models(family: str) -> None:
    model = build(family)
    with rocketkv.patch(model, token_budget=64, **SETTINGS):
        cache = greedy(model, PADDED)[2]
    assert [layer.compressed for layer in cache.stats().layers] == [False, True, False, True]
    own = storages(model)  # a layer refers to the model's attention sinks
    assert cache.stats().total_bytes == sum(size for at, size in storages(cache).items() if at not in own)


@pytest.mark.parametrize("told", [True, False])
def test_stats_in_the_midst_of_a_chunked_prompt(told: bool) -> None:
    model = build()
    with rocketkv.patch(model, token_budget=64, **SETTINGS):
        cache = rocketkv.RocketKVCache(
            model.config, prompt_length=LENGTH if told else None, token_budget=64, **SETTINGS
        )
        assert cache.stats().total_bytes == walked(cache) == 0
        for chunk in PROMPT.split(350, dim=1):
            with torch.no_grad():
                model(chunk, **{CACHE_ARGUMENT: cache})
            assert cache.stats().total_bytes == walked(cache)
        with torch.no_grad():
            model(prompt(1), **{CACHE_ARGUMENT: cache})
        assert cache.stats().total_bytes == walked(cache)
        cache.reset()
        assert cache.stats().total_bytes == walked(cache) == 0


def test_stats_outlive_the_cache() -> None:
    model = build()
    with rocketkv.patch(model, token_budget=64, **SETTINGS) as handle:
        cache = greedy(model, PROMPT)[2]
        expected = cache.stats()
        stored = [weakref.ref(layer.store.keys) for layer in rocketkv_layers(cache)]
        del cache
        gc.collect()
        assert not any(key() is not None for key in stored), "something holds on to the cache"
        assert handle.stats() == expected
        # The full cache: 2 layers of keys and values, 2 heads of 16 in float32.
        assert expected.total("full_bytes") == 2 * 2 * 2 * 16 * 4 * (LENGTH + 11)
