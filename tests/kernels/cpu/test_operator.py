"""The CPU step in static stores: by the operator, as compiled forwards call it, and in a model."""

from __future__ import annotations

import copy

import pytest
import torch

import rocketkv
from close import assert_near
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.static_step import static_step
from static import PADDED, STATIC, own_loop, run_operator, run_static, static_pair
from tiny import SMALL, build, greedy, prompt
from turns import decode

pytest.importorskip("numba", reason="the extra [cpu] is not installed")


@pytest.mark.parametrize("lengths", [None, [60, 31, 7]], ids=["one row", "ragged"])
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "streaming", "full"])
def test_a_static_step_equals_the_reference_in_a_store_that_grows(method: str, lengths: list[int] | None) -> None:
    growing, static, given = static_pair(method, lengths, 25)
    step = static_step(given.query[:, :, 0], static, backend="cpu")
    assert step.workspace
    assert_near(run_operator(step, given), decode(growing, given))
    own, others = static.tensors(), growing.tensors()
    assert own["seq_lens"].equal(others["seq_lens"])
    for name in ("keys", "values", "positions"):
        assert own[name].equal(others[name][:, :, : static.capacity]), name


def test_the_operator_and_the_step_write_the_same_bits_in_bfloat16() -> None:
    _, first, given = static_pair("rocketkv+", [60, 31], 9, torch.bfloat16)
    second = copy.deepcopy(first)
    steps = [static_step(given.query[:, :, 0], store, backend="cpu") for store in (first, second)]
    assert torch.equal(run_operator(steps[0], given), run_static(steps[1], given))


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_models_give_the_same_tokens(family: str) -> None:
    model = build(family)
    with rocketkv.patch(model, **SMALL, backend="torch"):
        tokens, logits, _ = greedy(model, prompt(70), 6)
    with rocketkv.patch(model, **SMALL, backend="cpu") as handle:
        found, found_logits, _ = greedy(model, prompt(70), 6)
        assert handle.stats().workspace_bytes > 0
    assert found.equal(tokens)
    assert_near(found_logits, logits, 2e-5)


def test_a_compiled_step_runs_the_operator_on_the_cpu_step() -> None:
    model = build(num_hidden_layers=1)
    handle = rocketkv.patch(model, **STATIC)
    expected, expected_logits, _ = own_loop(model, PADDED, model, 4)
    found, logits, cache = own_loop(model, PADDED, handle.compile_step(backend="aot_eager"), 4, backend="cpu")
    assert rocketkv_layers(cache)[0].step.workspace
    assert found.equal(expected)
    assert_near(logits, expected_logits, 1e-4)
