"""The benchmark of long outputs, on a tiny model: what it compares, counts and writes."""

from __future__ import annotations

import pytest
import torch

import rocketkv
from studies import long_output, questions
from studies.long_output import Settings
from tiny import build, prompt

SETTINGS = Settings(
    prompt=100, new_tokens=130, capacities=(64, 96), budget=72, speed_tokens=1010, speed_capacity=64, texts=2
)


@pytest.mark.parametrize("method", long_output.METHODS)
def test_nothing_differs_before_the_capacity_and_something_after(method: str) -> None:
    rows = long_output.divergence(build(), prompt(100, rows=2), 2, method, SETTINGS)
    assert [(row["capacity"], row["when_full"]) for row in rows] == [
        (capacity, kind) for capacity in (64, 96) for kind in ("evict", "evict-random")
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
    table = long_output.markdown({"settings": long_output.asdict(SETTINGS), "divergence": rows})
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
    assert "1010 tokens, decode capacity 64" in long_output.markdown(
        {"settings": long_output.asdict(SETTINGS), "speed": found}
    )


def test_a_question_is_answered_alike_rolled_back_and_anew() -> None:
    model, config = build(), rocketkv.RocketKVConfig(token_budget=176)
    context, asked = prompt(300), [prompt(7, seed=5), prompt(4, seed=6)]
    with rocketkv.patch(model, config), torch.inference_mode():
        cache = questions.read(model, config, context)
        snapshot = cache.snapshot()
        for question in asked:
            found = questions.answer(model, cache, question, 6)
            assert found == questions.answer(model, questions.read(model, config, context), question, 6)
            cache.rollback(snapshot)
    assert cache.get_seq_length() == 300
