"""Several generations at once: threads, models and caches in one process never meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import SMALL, build, greedy, left_padded, prompt

pytestmark = pytest.mark.integration


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run functions in a thread each, started together, and return what they return."""
    barrier = threading.Barrier(len(jobs))
    results: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:  # noqa: BLE001  # raised again below
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_threads_on_one_patched_model(family: str) -> None:
    model = build(family)
    prompts: list[Any] = [prompt(100), left_padded([prompt(60, seed=2), prompt(35, seed=3)]), prompt(25, seed=4)]
    with rocketkv.patch(model, **SMALL) as handle:

        def job(inputs: Any) -> Callable[[], tuple[Tensor, dict[str, Any]]]:
            def run() -> tuple[Tensor, dict[str, Any]]:
                _, logits, cache = greedy(model, inputs, 30)
                return logits, cache.stats().to_dict()

            return run

        alone = [job(inputs)() for inputs in prompts]
        for _ in range(3):
            for (logits, stats), (expected, expected_stats) in zip(at_once(*map(job, prompts)), alone, strict=True):
                assert logits.equal(expected)
                assert stats == expected_stats
            assert handle.stats().to_dict() in [stats for _, stats in alone]  # the last one to end wins


def test_threads_between_cache_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of one thread hands its keys over just when the same layer of the other does."""
    model = build("gemma3")
    prompts = [prompt(90), prompt(60, seed=2)]
    barrier = threading.Barrier(2)
    update = RocketKVLayer.update

    def together(layer: RocketKVLayer, *args: Any, **kwargs: Any) -> Any:
        handed = update(layer, *args, **kwargs)
        barrier.wait(timeout=60)
        return handed

    with rocketkv.patch(model, **SMALL):
        alone = [greedy(model, inputs)[1] for inputs in prompts]
        monkeypatch.setattr(RocketKVLayer, "update", together)
        found = at_once(lambda: greedy(model, prompts[0])[1], lambda: greedy(model, prompts[1])[1])
    assert found[0].equal(alone[0])
    assert found[1].equal(alone[1])


def test_two_patched_models() -> None:
    first, second = build("llama", seed=0), build("gpt-oss", seed=1)
    rocketkv.patch(first, **SMALL)
    rocketkv.patch(second, method="snapkv", token_budget=40, window_size=8, kernel_size=7)
    inputs = prompt(90)
    alone = greedy(first, inputs, 30)[1], greedy(second, inputs, 30)[1]
    for _ in range(3):
        found = at_once(lambda: greedy(first, inputs, 30)[1], lambda: greedy(second, inputs, 30)[1])
        assert found[0].equal(alone[0])
        assert found[1].equal(alone[1])


def test_a_patched_and_an_unpatched_model_in_threads() -> None:
    patched, stock = build(), build()
    inputs = left_padded([prompt(90), prompt(50)])
    expected = greedy(stock, inputs, 30)[1]
    with rocketkv.patch(patched, **SMALL):
        compressed = greedy(patched, inputs, 30)[1]
        found = at_once(lambda: greedy(patched, inputs, 30)[1], lambda: greedy(stock, inputs, 30)[1])
    assert found[0].equal(compressed)
    assert found[1].equal(expected)


def test_two_caches_in_turn() -> None:
    model = build()
    prompts, tokens = [prompt(90), prompt(60, seed=2)], prompt(20, seed=3)

    def steps(order: list[int]) -> list[Tensor]:
        """Feed both prompts, then the same tokens to each cache, in an order; return the logits by cache."""
        caches = [rocketkv.RocketKVCache(model.config, **SMALL) for _ in prompts]
        fed, logits = [0, 0], [[], []]  # type: ignore[var-annotated]
        with torch.no_grad():
            for cache, ids in zip(caches, prompts, strict=True):
                model(ids, **{CACHE_ARGUMENT: cache})
            for i in order:
                token = tokens[:, fed[i] : fed[i] + 1]
                logits[i].append(model(token, **{CACHE_ARGUMENT: caches[i]}).logits)
                fed[i] += 1
        return [torch.cat(found, dim=1) for found in logits]

    with rocketkv.patch(model, **SMALL):
        apart = steps([0] * 20 + [1] * 20)
        mixed = steps([0, 1, 1, 0, 0, 0, 1, 1] * 5)
    assert mixed[0].equal(apart[0])
    assert mixed[1].equal(apart[1])


def test_stats_and_cache_are_those_of_the_last_generation_in_any_thread() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL) as handle:

        def elsewhere() -> Any:
            tokens = model.generate(prompt(50), max_new_tokens=12)
            assert tokens.shape == (1, 62)
            return handle.cache

        with pytest.raises(ValueError, match="no generate of this model has ended"):
            handle.stats()
        greedy(model, prompt(90))
        assert handle.stats().tokens_seen == 90 + 11
        (cache,) = at_once(elsewhere)
        assert handle.cache is cache
        assert handle.stats() == cache.stats()
        assert handle.stats().tokens_seen == 50 + 11
