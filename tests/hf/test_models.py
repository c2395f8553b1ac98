"""Each architecture through the drop-in: exact within the budget, and consistent with itself beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_as_precise
from pairs import pairs
from rocketkv.hf.layer import rocketkv_layers
from tiny import FAMILIES, LARGE, SMALL, TRANSFORMERS, WINDOW, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.integration

ROWS = [prompt(101, seed=1), prompt(64, seed=2), prompt(17, seed=3)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def kept_positions(cache: Any, row: int, padding: int = 0) -> list[list[list[int]]]:
    """Return the sequence positions that each layer and KV head stores for a row, counted from its first token."""
    positions = [layer.store.phase.positions[row] for layer in rocketkv_layers(cache)]
    assert positions
    return [[(head[head >= 0] - padding).tolist() for head in layer] for layer in positions]


# The last chunk of 101 tokens has one.
@pytest.mark.parametrize(("family", "padded", "chunk"), pairs(FAMILIES, [False, True], [None, 25]))
def test_within_the_budget_the_stock_model(family: str, padded: bool, chunk: int | None) -> None:
    model = build(family)
    inputs = left_padded(ROWS) if padded else ROWS[0]
    assert ROWS[0].shape[1] > 2 * WINDOW
    expected, expected_logits, _ = greedy(model, inputs, prefill_chunk_size=chunk)
    with rocketkv.patch(model, **LARGE) as handle:
        tokens, logits, _ = greedy(model, inputs, prefill_chunk_size=chunk)
        stored = [layer.tokens_stored for layer in handle.stats().layers if layer.compressed]
    assert stored == [101 + 11] * len(stored) != []
    assert tokens.equal(expected)
    if (logits - expected_logits).abs().max() > 1e-5:  # on some processors; float64 says which of the two errs
        exact_tokens, exact_logits, _ = greedy(build(family).double(), inputs, prefill_chunk_size=chunk)
        assert exact_tokens.equal(expected)
        assert_as_precise(logits, expected_logits, exact_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_its_rows_alone(family: str) -> None:
    model = build(family)
    longest = ROWS[0].shape[1]
    stock = greedy(model, ROWS[2])
    with rocketkv.patch(model, **SMALL):
        tokens, logits, cache = greedy(model, left_padded(ROWS))
        for i, row in enumerate(ROWS):
            alone, alone_logits, alone_cache = greedy(model, row)
            assert tokens[i : i + 1].equal(alone)
            close(logits[i : i + 1], alone_logits)
            assert kept_positions(cache, i, longest - row.shape[1]) == kept_positions(alone_cache, 0)
    assert not logits[:1].equal(greedy(model, ROWS[0])[1]), "nothing was compressed"
    # 17 tokens and few more are within the budget of 24: the stock model's, in the midst of evicting rows.
    close(logits[2:, :8], stock[1][:, :8])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_is_one_pass(family: str, padded: bool) -> None:
    model = build(family)
    inputs = left_padded(ROWS if padded else ROWS[:1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with rocketkv.patch(model, **SMALL):
        tokens, logits, cache = greedy(model, inputs)
        assert [len(head) for layer in kept_positions(cache, 0) for head in layer] == [40 + 11] * (
            2 * len(rocketkv_layers(cache))
        )

        def same(found: tuple[Tensor, Tensor, Any]) -> None:
            assert found[0].equal(tokens)
            close(found[1], logits)
            for row in range(len(tokens)):
                assert kept_positions(found[2], row) == kept_positions(cache, row)

        for chunk in (25, 40):
            told = rocketkv.RocketKVCache(model.config, prompt_length=101, **SMALL)
            same(hand_written(model, ids, cache=told, mask=mask, chunk=chunk))
            if TRANSFORMERS >= (5,) or not padded:  # version 4 counts padding in the positions of chunks
                same(greedy(model, inputs, prefill_chunk_size=chunk))


@pytest.mark.parametrize("family", FAMILIES)
def test_loops_and_lengths_give_the_same_beginning(family: str) -> None:
    model = build(family)
    with rocketkv.patch(model, **SMALL):
        tokens, logits, cache = greedy(model, ROWS[0], 24)
        short, short_logits, _ = greedy(model, ROWS[0], 6)
        assert short.equal(tokens[:, :6])
        close(short_logits, logits[:, :6])
        by_hand, by_hand_logits, hand_cache = hand_written(model, ROWS[0], 24)
        assert by_hand.equal(tokens)
        close(by_hand_logits, logits)
        assert kept_positions(hand_cache, 0) == kept_positions(cache, 0)
        told = rocketkv.RocketKVCache(model.config, prompt_length=101, **SMALL)
        by_hand, by_hand_logits, _ = hand_written(model, ROWS[0], 24, cache=told)
        assert by_hand.equal(tokens)
        close(by_hand_logits, logits)


@pytest.mark.parametrize("method", sorted(rocketkv.METHODS))
def test_every_method_in_batches_and_chunks(method: str) -> None:
    model = build()
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(101, 16)
    inputs = left_padded(ROWS)
    with rocketkv.patch(model, **{**SMALL, "method": method, "split": split}) as handle:
        tokens, logits, cache = greedy(model, inputs, 30)
        for i, row in enumerate(ROWS):
            alone, alone_logits, alone_cache = greedy(model, row, 30)
            assert tokens[i : i + 1].equal(alone)
            close(logits[i : i + 1], alone_logits)
            assert kept_positions(cache, i, 101 - row.shape[1]) == kept_positions(alone_cache, 0)
        told = rocketkv.RocketKVCache(model.config, handle.config, prompt_length=101)
        chunked = hand_written(model, inputs["input_ids"], 30, cache=told, mask=inputs["attention_mask"], chunk=25)
        assert chunked[0].equal(tokens)
        close(chunked[1], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "qwen3"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    exact = greedy(build(family), ROWS[0], 1)[1]
    model = build(family).to(dtype)
    stock = greedy(model, ROWS[0], 1)[1]
    with rocketkv.patch(model, **SMALL):
        _, logits, cache = greedy(model, left_padded(ROWS))
    assert logits.isfinite().all()
    assert {layer.store.keys.dtype for layer in rocketkv_layers(cache)} == {dtype}
    # The prompt is attended to exactly, so the first logits are as good as the stock model's.
    assert (logits[:1, :1] - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()
