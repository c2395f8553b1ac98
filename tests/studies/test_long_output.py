"""The benchmark of long outputs, on a tiny model: what it compares, counts and writes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rocketkv
from rocketkv.eval.generate import DecodeLoop
from rocketkv.hf.cache import rocketkv_layers
from studies import long_output, questions
from studies.long_output import Settings
from tiny import build, prompt

SETTINGS = Settings(
    prompt=100, new_tokens=130, capacities=(64, 96), budget=72, speed_tokens=1010, speed_capacity=64, texts=2
)


@pytest.mark.parametrize("method", long_output.METHODS)
def test_nothing_differs_before_the_capacity_and_something_after(method: str) -> None:
    rows = long_output.divergence(build(), prompt(100, rows=2), 2, method, SETTINGS)
    assert [(row["capacity"], row["kind"]) for row in rows] == [
        (capacity, kind) for capacity in (64, 96) for kind in ("evict", "random")
    ]
    for row in rows:
        assert abs(row["kl_before"]) < 1e-5
        assert row["kl"] > 1e-3
        assert row["kl"] == pytest.approx(sum(row["kl_by_text"]) / 2)
        assert row["steps"] == 130 - row["capacity"]
        assert 0 <= row["agreement"] < 1
    # At twice the window only the window stays: nothing is left to choose.
    assert rows[0]["kl"] == rows[1]["kl"]
    assert rows[2]["kl"] != rows[3]["kl"]
    table = long_output.markdown({"settings": asdict(SETTINGS), "divergence": rows})
    assert f"| `{method}` | 96 | {rows[2]['kl']:.4f} | {rows[3]['kl']:.4f} |" in table


def test_the_end_token_is_never_drawn() -> None:
    logprobs = torch.tensor([[0.0, 5.0, 0.0], [1.0, 9.0, 1.0]]).log_softmax(-1)
    drawn = [long_output.sampled(logprobs.clone(), 1, torch.Generator().manual_seed(i)) for i in range(20)]
    assert set(torch.cat(drawn).flatten().tolist()) == {0, 2}


def test_steps_are_timed_and_the_cache_keeps_its_size() -> None:
    found = long_output.speed(build(num_hidden_layers=1), prompt(100), SETTINGS)
    assert found["tokens"] == 1010
    assert len(found["cache_bytes"]) == 1
    assert found["tokens_stored"] <= 100 + 64
    for clock in ("clock", "processor"):
        assert found[clock]["ratio"] > 0
    assert "1010 tokens, decode capacity 64" in long_output.markdown({"settings": asdict(SETTINGS), "speed": found})


def test_a_question_is_answered_alike_rolled_back_and_anew() -> None:
    model, config = build(), rocketkv.RocketKVConfig(token_budget=176)
    context, *asked = (prompt(count, seed=seed)[0].tolist() for count, seed in ((300, 1), (7, 5), (4, 6)))
    with rocketkv.patch(model, config), torch.inference_mode():
        cache = questions.read(model, config, context)
        snapshot = cache.snapshot()
        for question in asked:
            found = questions.answer(model, cache, question, 6)
            assert found == questions.answer(model, questions.read(model, config, context), question, 6)
            cache.rollback(snapshot)
    assert cache.get_seq_length() == 300


def test_random_eviction_keeps_the_window_and_others_by_chance() -> None:
    model, config = build(), rocketkv.RocketKVConfig(token_budget=72, decode_capacity=96)
    ids = prompt(100)
    positions = []
    for kind in ("random", "random", "evict"):
        cache = long_output.new_cache(model, config, 100, kind=kind)
        loop = DecodeLoop(model=model, cache=cache)
        with rocketkv.patch(model, config):
            loop.prefill(ids)
            for token in prompt(97, seed=9).split(1, dim=1):
                loop.step(token)
        store = rocketkv_layers(cache)[0].store
        positions.append(store.decoding.positions[0, 0, : store.stored].tolist())
    by_chance, again, ranked = positions
    assert by_chance == again != ranked
    assert len(by_chance) == len(ranked)
    assert by_chance[-33:] == ranked[-33:] == list(range(164, 197))  # the observation window and the new token


def test_parts_of_a_study_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def divergence(model: Any, prompts: Any, end: int, method: str, settings: Settings) -> list[dict[str, Any]]:
        if method in measured:
            raise KeyboardInterrupt
        measured.append(method)
        return [{"method": method}]

    monkeypatch.setattr(long_output, "prompts_of", lambda *_: None)
    monkeypatch.setattr(long_output, "divergence", divergence)
    tokenizer: Any = SimpleNamespace(eos_token_id=2)
    for methods in (("snapkv",), ("snapkv", "rocketkv")):
        settings = Settings(parts=("divergence",), methods=methods)
        result = long_output.study(None, tokenizer, settings, tmp_path)  # type: ignore[arg-type]  # no part runs it
        assert [row["method"] for row in result["divergence"]] == list(methods)
    assert measured == ["snapkv", "rocketkv"]
