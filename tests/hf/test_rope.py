"""Rotary embeddings that depend on where, or on how long, a sequence is: they see true positions, evicted or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rocketkv
from rope import ORIGINAL, SHORT, longrope, rope
from tiny import COMMON, LARGE, SMALL, TRANSFORMERS, build, greedy, hand_written, left_padded, prompt, sharpened

pytestmark = pytest.mark.integration


def stablelm() -> Any:
    settings = {**COMMON, "partial_rotary_factor": 0.25}
    return sharpened(transformers.StableLmForCausalLM, transformers.StableLmConfig(**settings))


MODELS = {
    "yarn": lambda: build(max_position_embeddings=256, **rope("yarn", factor=4.0, **ORIGINAL)),
    "linear": lambda: build(max_position_embeddings=256, **rope("linear", factor=4.0)),
    "dynamic": lambda: build(max_position_embeddings=SHORT, **rope("dynamic", factor=4.0)),
    "llama3": lambda: build(
        max_position_embeddings=256,
        **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    ),
    "longrope": longrope,
    "partial": lambda: build("glm4"),
}
if TRANSFORMERS >= (5,):  # before, it has attention of its own
    MODELS["a quarter"] = stablelm


def positions_of(model: Any, run: Any) -> list[Tensor]:
    """Return the position ids that a model's rotary embedding gets while `run` generates."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((kwargs["position_ids"] if "position_ids" in kwargs else args[1]).clone())

    hook = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("length", [50, SHORT, 90])
@pytest.mark.parametrize("variant", MODELS)
def test_within_the_budget_the_stock_model(variant: str, length: int) -> None:
    ids = prompt(length)
    # A model remembers the longest sequence it saw, so each run has its own.
    expected, expected_logits, _ = greedy(MODELS[variant](), ids, 40)
    model = MODELS[variant]()
    with rocketkv.patch(model, **LARGE) as handle:
        tokens, logits, cache = greedy(model, ids, 40)
        assert handle.stats().tokens_seen == length + 39
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == length + 39


def test_scaling_decides_something() -> None:
    """The variants differ, so that a test of them can fail."""
    llama = [greedy(MODELS[variant](), prompt(90), 4)[1] for variant in ("yarn", "linear", "dynamic", "llama3")]
    for i, logits in enumerate(llama):
        for other in llama[:i]:
            assert (logits - other).abs().max() > 0.01


@pytest.mark.parametrize("variant", MODELS)
def test_positions_are_true_after_eviction(variant: str) -> None:
    ids = prompt(50)
    stock = MODELS[variant]()
    expected = positions_of(stock, lambda: greedy(stock, ids, 40))
    model = MODELS[variant]()
    with rocketkv.patch(model, **SMALL) as handle:
        found = positions_of(model, lambda: greedy(model, ids, 40))
        stats = handle.stats()
    assert len(found) == len(expected)
    assert all(position.equal(true) for position, true in zip(found, expected, strict=True))
    assert stats.tokens_seen == 50 + 39
    assert all(layer.tokens_stored < layer.tokens_seen for layer in stats.layers)


def test_positions_of_padded_batches_and_loops() -> None:
    model = build()
    padded = left_padded([prompt(70), prompt(45)])
    runs = [lambda: greedy(model, padded), lambda: hand_written(model, prompt(70))]
    expected = [positions_of(model, run) for run in runs]
    with rocketkv.patch(model, **SMALL):
        for run, true in zip(runs, expected, strict=True):
            found = positions_of(model, run)
            assert len(found) == len(true) == 12
            assert all(position.equal(other) for position, other in zip(found, true, strict=True))
