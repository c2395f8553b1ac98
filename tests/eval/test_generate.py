"""The decode loop: against `generate`, with padded rows, rolled back, and after a shared prefill."""

from __future__ import annotations

import pytest
import torch

import rocketkv
from rocketkv.eval.generate import DecodeLoop, alternating_generate
from rocketkv.eval.methods import Compressed, Full, Method
from rocketkv.eval.prefill import read_prompt, start
from tiny import SMALL, build, greedy, prompt

METHODS: dict[str, Method] = {"full": Full(), "rocketkv": Compressed(rocketkv.RocketKVConfig(**SMALL))}


@pytest.mark.parametrize("name", METHODS)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model, method, ids = build(), METHODS[name], prompt(120)
    with method.attached(model):
        expected, *_ = greedy(model, ids, 12)
        loop = DecodeLoop(model=model, cache=method.new_cache(model, 120))
        loop.prefill(ids)
        before = loop.snapshot()
        assert list(loop.greedy(12)) == expected[0].tolist()
        assert (loop.seen, len(loop.seconds), len(loop.processor_seconds)) == (131, 12, 12)
        for _ in range(2):
            loop.rollback(before)
            assert list(loop.greedy(12)) == expected[0].tolist()
            assert loop.seen == 131
    end = expected[0, 3].item()
    with method.attached(model):
        loop = DecodeLoop(model=model, cache=method.new_cache(model, 120))
        loop.prefill(ids)
        assert list(loop.greedy(12, {end})) == expected[0].tolist()[: expected[0].tolist().index(end)]


@pytest.mark.parametrize("name", METHODS)
def test_padded_rows_are_each_row_alone(name: str) -> None:
    model, method = build(), METHODS[name]
    rows = [[prompt(count, seed=count)[0].tolist() for count in counts] for counts in ((110, 120), (5, 9))]
    read = read_prompt(model, rows[0])
    with method.attached(model):
        for shared in (False, True):
            if shared:
                batch = start(model, method, read)
            else:
                batch = DecodeLoop(model=model, cache=method.new_cache(model, 120))
                batch.prefill(rows[0])
            first, second = batch.logits, batch.prefill(rows[1])
            third = batch.step(batch.token)
            for row in range(2):
                alone = DecodeLoop(model=model, cache=method.new_cache(model, len(rows[0][row])))
                logits = [alone.prefill([turn[row]])[0] for turn in rows]
                logits.append(alone.step(alone.token)[0])
                found = torch.stack([first[row], second[row], third[row]])
                torch.testing.assert_close(found, torch.stack(logits), atol=1e-4, rtol=0)


def test_a_generation_needs_a_step_to_time() -> None:
    with pytest.raises(ValueError, match=r"new_tokens must be at least 2, .* got 1"):
        alternating_generate(build(), None, "", {}, new_tokens=1)  # type: ignore[arg-type]  # it is not read
