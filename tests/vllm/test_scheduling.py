"""Preemption, aborts, samples of one prompt: what the scheduler does to requests, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny
import vllm_case
from rocketkv.vllm.spec import RocketKVManager
from vllm_case import BLOCK, SETTINGS

POOL = 24  # blocks: one prompt of 600 tokens fits, two do not
CHUNK = 32  # of one prompt; a step has several


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt(length, seed=1000 + length + seed)[0].tolist()


@pytest.fixture(scope="module")
def model(models: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(vllm_case.saved("llama", models))


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[vllm_case.Engine]:
    arguments = {
        "num_gpu_blocks_override": POOL,
        "max_model_len": 700,
        "max_num_batched_tokens": 4 * CHUNK - 1,
        "long_prefill_token_threshold": CHUNK,
    }
    with vllm_case.serve(vllm_case.saved("llama", models), SETTINGS, **arguments) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(engine: vllm_case.Engine) -> Iterator[None]:
    """Check that blocks, rows and requests are as they were before."""
    manager = engine.manager
    free, rows = engine.free_blocks, sorted(manager.free_rows)
    yield
    assert engine.free_blocks == free == POOL - 1  # vLLM keeps one, the null block
    assert sorted(manager.free_rows) == rows
    assert not manager.rows
    assert not manager.prompt_ends
    assert not manager.req_to_blocks
    assert len(engine.builder.table.reading) <= 2 * engine.builder.table.rows


def test_blocks_of_a_prompt_are_free_after_its_first_decode_step(engine: vllm_case.Engine) -> None:
    engine.add("a", prompt(600), 5)
    tokens: dict[str, list[int]] = {}
    while len(tokens.get("a", ())) < 1:
        engine.step(tokens)
    assert sum(engine.prompt_blocks().values()) == -(-600 // BLOCK)
    engine.step(tokens)
    assert len(tokens["a"]) == 2
    assert sum(engine.prompt_blocks().values()) == 0
    assert engine.free_blocks == POOL - 1
    engine.run(tokens)


def preempt_all(engine: vllm_case.Engine) -> None:
    """Preempt what runs, as a pool without blocks would."""
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)


def test_pool_that_is_too_small_preempts_and_every_request_ends(engine: vllm_case.Engine, model: Any) -> None:
    preempted: dict[str, int] = {}
    given = {f"r{i}": prompt(560, i) for i in range(5)}
    for name, ids in given.items():
        engine.add(name, ids, 60)
    tokens: dict[str, list[int]] = {}
    at: dict[str, list[int]] = {}
    steps = 0
    while engine.engine.has_unfinished_requests():
        engine.step(tokens)
        steps += 1
        for name, request in engine.scheduler.requests.items():
            key = name.split("-")[0]
            if request.num_preemptions > preempted.get(key, 0):
                preempted[key] = request.num_preemptions
                at.setdefault(key, []).append(request.num_output_tokens)
        if steps in (30, 60, 75):  # decoding requests hold no block, so only prompts are preempted without help
            preempt_all(engine)
    assert sum(preempted.values()) >= 3
    assert sum(count > 0 for counts in at.values() for count in counts) >= 3  # of requests with generated tokens
    for name, ids in given.items():
        expected: list[int] = []
        for done in [*sorted({count for count in at.get(name, ()) if count}), 60]:
            fresh = vllm_case.reference(model, ids + expected, done - len(expected), SETTINGS)
            expected += fresh
        assert tokens[name] == expected, name


def test_abort_in_the_middle_of_a_prompt(engine: vllm_case.Engine, model: Any) -> None:
    tokens: dict[str, list[int]] = {}
    for i in range(20):  # more than there are rows
        engine.add(f"aborted{i}", prompt(600, i), 4)
        engine.step(tokens)
        engine.step(tokens)
        engine.engine.abort_request([f"aborted{i}"])
    ids = prompt(300)
    engine.add("kept", ids, 20)
    engine.add("one token", prompt(250), 1)
    assert engine.run(tokens)["kept"] == vllm_case.reference(model, ids, 20, SETTINGS)


def test_samples_of_one_prompt(engine: vllm_case.Engine, model: Any) -> None:
    ids = prompt(330)
    assert (
        engine.generate([ids], 20, n=2, temperature=1, top_k=1) == [vllm_case.reference(model, ids, 20, SETTINGS)] * 2
    )


def test_a_full_prefix_hit_recomputes_the_observation_window(engine: vllm_case.Engine, model: Any) -> None:
    ids = prompt(10 * BLOCK)
    expected = vllm_case.reference(model, ids, 20, SETTINGS)
    assert engine.generate([ids], 20)[0] == expected
    assert engine.cached_tokens(ids) == 9 * BLOCK
    assert engine.generate([ids], 20)[0] == expected


def test_short_prompts_and_short_chunks(engine: vllm_case.Engine, model: Any) -> None:
    given = [prompt(1), prompt(5), prompt(63), prompt(127), prompt(129), prompt(65)]
    expected = [vllm_case.reference(model, ids, 20, SETTINGS) for ids in given]
    assert engine.generate(given, 20) == expected


class FreesByThePrompt(RocketKVManager):
    """The rule of an early design: blocks are freed when more is computed than the request's own prompt."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: Any = None
    ) -> None:
        end = self.prompt_ends.get(request_id)
        if end is not None and request_id in self.rows and processed_computed_tokens > num_prompt_tokens:
            last = min(end, num_prompt_tokens) // BLOCK
            self._remove_blocks_in_range(request_id, 0, last)


def resumed(engine: vllm_case.Engine, ids: list[int]) -> tuple[list[int], int]:
    """Preempt a request with generated tokens; others come when its recompute has passed the prompt, not its end."""
    tokens: dict[str, list[int]] = {}
    engine.add("a", ids, 300)
    while len(tokens.get("a", ())) < 280:
        engine.step(tokens)
    done = len(tokens["a"])
    preempt_all(engine)
    (request,) = engine.scheduler.requests.values()
    while request.num_computed_tokens <= len(ids):
        engine.step(tokens)
    for i in range(7):
        engine.add(f"other{i}", prompt(100, 50 + i), 2)
    return engine.run(tokens)["a"], done


def test_a_resumed_request_frees_nothing_that_its_recompute_reads(
    engine: vllm_case.Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(250)
    first = vllm_case.reference(model, ids, 280, SETTINGS)
    expected = first + vllm_case.reference(model, ids + first, 20, SETTINGS)
    assert resumed(engine, ids) == (expected, 280)
    monkeypatch.setattr(RocketKVManager, "remove_skipped_blocks", FreesByThePrompt.remove_skipped_blocks)
    found, _ = resumed(engine, ids)
    assert found[:280] == first
    assert found != expected  # chunks of the recompute read blocks that were freed
