"""Ablation: rebuilt stores against the model's own prefill, equal bytes, floors, errors, resumption, the command."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval_case
from ablation_case import BUDGET, CASE, PROMPT, SETTINGS, STEPS, captured, step_at, windows
from rocketkv import METHODS, RocketKVConfig, patch
from rocketkv.core.eviction import prompt_scores
from rocketkv.eval.progress import Progress
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.models import CACHE_ARGUMENT
from studies.ablation import run as ablation_run
from studies.ablation import steps as ablation_steps
from studies.ablation.arms import ARMS, BY_NAME, FULL
from studies.ablation.capture import Layer, Settings, joined_heads, multi_query
from studies.ablation.fit import WIDEST_WINDOW, Arm, Case, extra_bytes_of, fitted_split, mean_bytes, target_bytes
from studies.ablation.report import document, ratio, tables
from studies.ablation.run import ArmLayer, divergences, measure, run_arm, run_steps
from studies.ablation.steps import random_ranks, unpooled_ties
from studies.texts import made_texts
from tiny import build


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def layers(model: Any) -> list[Layer]:
    return captured(model)


@pytest.fixture(scope="module")
def stock(model: Any) -> Tensor:
    """Return the stock model's log-probabilities of the steps, [m, B, vocabulary]."""
    with torch.no_grad():
        ids = torch.tensor([window.ids for window in windows()])
        return model(ids, use_cache=False).logits[:, PROMPT:].log_softmax(-1).transpose(0, 1)


def own_logits(model: Any, config: RocketKVConfig) -> Tensor:
    """Return the logits of the steps after a patched model's own prefill, [m, B, vocabulary]."""
    ids = torch.tensor([window.ids for window in windows()])
    cache = RocketKVCache(model.config, config, prompt_length=PROMPT)
    with patch(model, config), torch.inference_mode():
        model(ids[:, :PROMPT], **{CACHE_ARGUMENT: cache})
        steps = [model(token, **{CACHE_ARGUMENT: cache}).logits[:, -1] for token in ids[:, PROMPT:].split(1, dim=1)]
    return torch.stack(steps)


@pytest.mark.parametrize("method", [name for name in sorted(METHODS) if not METHODS[name].multi_turn])
def test_rebuilt_stores_step_as_after_the_models_own_prefill(model: Any, layers: list[Layer], method: str) -> None:
    split = METHODS[method].split(PROMPT, BUDGET, 16, 128)
    stage_1_kernel_size = RocketKVConfig(method=method).stage_1_kernel_size
    arm = Arm(name=method, what="", split=lambda _: split, fitted=None, kernel_size=stage_1_kernel_size)
    with torch.inference_mode():
        made = [ArmLayer(arm, split, layer, PROMPT) for layer in layers]
        for one, layer in zip(made, layers, strict=True):
            ablation_run.replay(one, layer, PROMPT)  # which must leave no trace
        found = torch.stack(list(run_steps(model, made, windows(), PROMPT)))
    expected = own_logits(model, RocketKVConfig(method=method, token_budget=BUDGET))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_full_is_the_stock_model(model: Any, layers: list[Layer], stock: Tensor) -> None:
    record = run_arm(model, layers, windows(), SETTINGS, FULL, BUDGET, stock)
    assert record["kl"] is not None
    assert all(abs(value) < 1e-9 for value in record["kl"])
    assert record["agreement"] == [1, 1]
    assert max(error for text in record["errors"] for layer in text for error in layer) < 1e-5
    assert record["stored"] == PROMPT
    assert record["step_bytes"] == pytest.approx(4 * 16 * (PROMPT + (STEPS + 1) / 2))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_reads_as_many_bytes(model: Any, layers: list[Layer], stock: Tensor, arm: Arm) -> None:
    record = run_arm(model, layers, windows(), SETTINGS, arm, BUDGET, stock)
    if arm.fitted is not None:
        assert record["step_bytes"] == pytest.approx(target_bytes(CASE), rel=0.02)
    elif arm.name.endswith(":floor"):
        # Everything that is stored, and the tokens of the steps, the step's own among them.
        assert record["step_bytes"] == 4 * 16 * (record["stored"] + (STEPS + 1) / 2)
    assert record["kl"] is not None
    assert all(value > 1e-6 for value in record["kl"])


@pytest.mark.parametrize("budget", [64, 128, 256, 512])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bytes_are_equal_at_every_budget(budget: int, head_dim: int) -> None:
    case = Case(prompt=4096, steps=64, head_dim=head_dim, budget=budget, group=3)
    for arm in ARMS:
        if arm.name == "snapkv" and budget == 64:  # its window alone reads more
            with pytest.raises(ValueError, match="must be at least 33"):
                fitted_split(arm, case)
        elif arm.fitted is not None:
            split = fitted_split(arm, case)
            read = mean_bytes(split, case) + extra_bytes_of(arm, split, case)
            assert read == pytest.approx(target_bytes(case), rel=0.02), arm.name


def test_an_arm_of_other_bytes_is_refused(model: Any, layers: list[Layer], stock: Tensor) -> None:
    arm = replace(BY_NAME["rocketkv+"], split=lambda case: FULL.split(case), fitted="kept_tokens", name="all")
    record = run_arm(model, layers, windows(), SETTINGS, FULL, BUDGET, stock)
    with pytest.raises(ValueError, match="times the bytes"):
        ablation_run.check_bytes(arm, record)


def outputs(layers: list[Layer], arm: Arm, split: Any) -> Tensor:
    made = ArmLayer(arm, split, layers[0], PROMPT)
    return made.step_of(*step_at(layers[0], 0), layers[0].params)


def test_steps_of_the_ablation_agree_with_the_librarys_where_they_must(layers: list[Layer]) -> None:
    split = fitted_split(BY_NAME["rocketkv+"], CASE)
    own = outputs(layers, BY_NAME["rocketkv+"], split)
    one = replace(BY_NAME["rocketkv+:segments-8"], step=functools.partial(ablation_steps.segments_step, segments=1))
    torch.testing.assert_close(outputs(layers, one, split), own, atol=1e-5, rtol=0)
    # Where all is chosen nothing is left over, and the sketch has no say.
    everything = replace(split, token_budget=split.kept_tokens, top_k=split.kept_tokens)
    dense = outputs(layers, BY_NAME["rocketkv+:floor"], replace(split, top_k=None, sketch_bits=None, residual=False))
    for name in ("sketch-mass", "ends", "segments-8"):
        found = outputs(layers, BY_NAME[f"rocketkv+:{name}"], replace(everything, token_budget=split.kept_tokens or 0))
        torch.testing.assert_close(found, dense, atol=0.1, rtol=0)


def test_evicted_tokens_of_equal_keys_and_values_count_as_they_would(layers: list[Layer]) -> None:
    arm = BY_NAME["rocketkv+:evicted-variance"]
    split = fitted_split(arm, CASE)
    layer = layers[0]
    own = ArmLayer(arm, split, layer, PROMPT)
    gone = torch.ones(*layer.key.shape[:2], PROMPT, dtype=torch.bool)
    gone.scatter_(2, own.store.decoding.positions[:, :, : own.store.stored].long(), False)
    key, value = layer.key.clone(), layer.value.clone()
    key[:, :, :PROMPT][gone] = 0.25
    value[:, :, :PROMPT][gone] = 0.5
    made = ArmLayer(arm, split, replace(layer, key=key, value=value), PROMPT)
    prompt_part = (layer.query, layer.key[:, :, :PROMPT], layer.value[:, :, :PROMPT])
    state = ablation_steps.evicted_summary(*prompt_part, own.store, layer.params, runs=3)
    assert state.tokens.sum(2).eq(PROMPT - own.store.stored).all()
    if torch.equal(made.store.decoding.positions[:, :, :40], own.store.decoding.positions[:, :, :40]):
        assert made.state.variance.abs().max() < 1e-6
    torch.testing.assert_close((state.tokens * state.value).sum(2)[0, 0], layer.value[0, 0, :PROMPT][gone[0, 0]].sum(0))


def test_a_calibrated_residual_is_the_librarys_where_factors_are_one(layers: list[Layer]) -> None:
    arm = BY_NAME["rocketkv+:calibrated"]
    split, layer = fitted_split(BY_NAME["rocketkv+"], CASE), layers[0]
    made = ArmLayer(arm, split, layer, PROMPT)
    made.state = made.state._replace(factor=torch.ones_like(made.state.factor))
    token = step_at(layer, 0)
    own = outputs(layers, BY_NAME["rocketkv+"], split)
    torch.testing.assert_close(made.step_of(*token, layer.params), own, atol=1e-5, rtol=0)


def test_a_learned_value_is_what_attention_misses(layers: list[Layer]) -> None:
    arm, layer = BY_NAME["rocketkv+:learned"], layers[0]
    value = torch.full_like(layer.value, 0.5)
    made = ArmLayer(arm, fitted_split(arm, CASE), replace(layer, value=value), PROMPT)
    torch.testing.assert_close(made.state.value, torch.full_like(made.state.value, 0.5))
    assert arm.extra_tokens(3) == 1


def test_ranks(layers: list[Layer]) -> None:
    window, keys = layers[0].query[:, :, 32:WIDEST_WINDOW], layers[0].key[:, :, :PROMPT]
    ranked = functools.partial(prompt_scores, window, keys, layers[0].params)
    pooled, own = ranked(kernel_size=63), ranked(kernel_size=1)
    found = ranked(kernel_size=63, ops=unpooled_ties(keys, 0))
    order = found[0, 0, :-32].argsort(descending=True)
    pairs = list(zip(pooled[0, 0][order].tolist(), own[0, 0][order].tolist(), strict=True))
    assert pairs == sorted(pairs, reverse=True)
    assert found[..., -32:].isinf().all()
    first, again, other = (ranked(kernel_size=63, ops=random_ranks(keys, number)) for number in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[0, 0, :-32].unique().numel() == PROMPT - 32  # not pooled


def test_joined_heads_are_wider_and_exact(layers: list[Layer]) -> None:
    joined = joined_heads(layers, 2)
    assert [layer.key.shape[-1] for layer in joined] == [32, 32]
    with torch.inference_mode():
        split = fitted_split(FULL, replace(CASE, head_dim=32))
        found = ablation_run.replay(ArmLayer(FULL, split, joined[0], PROMPT), joined[0], PROMPT)
    assert max(error for text in found for error in text) < 1e-5
    # Across layers too, where they have a single head left.
    assert len(joined_heads(layers, 3)) == 1


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 3, 64), (4, 4, 64), (3, 1, 16)])
def test_multi_query_layers_are_of_the_same_function(heads: int, kv_heads: int, width: int) -> None:
    model = build(hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    own = captured(model)
    wide = [multi_query(layer) for layer in own]
    case = replace(CASE, head_dim=width, group=heads)
    split = fitted_split(FULL, case)
    made = ArmLayer(FULL, split, wide[0], PROMPT)
    outs = [made.step_of(*step_at(wide[0], step), wide[0].params) for step in range(STEPS)]
    torch.testing.assert_close(torch.stack(outs, 1), own[0].out, atol=1e-5, rtol=0)
    assert wide[0].key.shape == (2, 1, PROMPT + STEPS, width)
    assert wide[0].key.norm(dim=2).min() > 1
    with torch.inference_mode():
        full = [ArmLayer(FULL, split, layer, PROMPT) for layer in own]
        expected = torch.stack(list(run_steps(model, full, windows(), PROMPT))).log_softmax(-1)
    record = run_arm(model, wide, windows(), SETTINGS, FULL, BUDGET, expected)
    assert record["kl"] is not None
    assert all(abs(value) < 1e-8 for value in record["kl"])
    assert {len(layer) for text in record["errors"] for layer in text} == {1}
    for name in ("rocketkv", "rocketkv+"):
        record = run_arm(model, wide, windows(), SETTINGS, BY_NAME[name], BUDGET, expected)
        assert record["kl"] is not None
        assert all(value > 1e-6 for value in record["kl"])
        assert record["target_bytes"] == target_bytes(case)


def test_multi_query_layers_are_not_joined() -> None:
    with pytest.raises(ValueError, match="joined must be 1"):
        Settings(model="tiny", joined=2, multi_query=True)


def test_kl_of_known_distributions() -> None:
    full = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25]]).log()
    kl, agreement = divergences(full, iter([other + 3]))
    assert kl == pytest.approx([0.25 * 0.6931472])
    assert agreement == [0]


def run_all(model: Any, folder: Path) -> dict[str, Any]:
    arms = [BY_NAME["rocketkv"], BY_NAME["rocketkv+"]]
    with Progress("", total=1) as progress:
        records = measure(model, windows(), SETTINGS, arms, [BUDGET], folder, progress)
    return {"settings": asdict(SETTINGS), **document(windows(), records)}


def test_an_interrupted_run_goes_on_where_it_was(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_all(model, tmp_path / "whole")
    names: list[str] = []

    def stopping(*args: Any) -> Any:
        if "stop" in names:
            raise KeyboardInterrupt
        names.extend([args[4].name, "stop"])
        return run_arm(*args)

    monkeypatch.setattr(ablation_run, "run_arm", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_all(model, tmp_path / "stopped")
    names.remove("stop")
    assert run_all(model, tmp_path / "stopped") == whole
    assert names == ["rocketkv", "rocketkv+", "stop"]
    # Done: the model is not even run.
    monkeypatch.setattr(ablation_run, "capture", None)
    assert run_all(model, tmp_path / "stopped") == whole


def test_the_document_and_its_table(model: Any, tmp_path: Path) -> None:
    result = run_all(model, tmp_path)
    assert json.loads(json.dumps(result["arms"], allow_nan=False)) == result["arms"]
    first, second = result["arms"]
    assert first["kl_ratio"] == first["error_ratio"] == 1
    assert second["kl_ratio"] == pytest.approx(second["mean_kl"] / first["mean_kl"])
    rows = [line.split(" | ") for line in tables(result).splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `rocketkv`", "| `rocketkv+`"]
    assert rows[1][5] == f"{second['mean_kl']:.4f}"


def test_ratios_are_of_the_same_texts() -> None:
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2, [2, 2])
    value, interval = ratio([1.0, 1.0], [1.0, 3.0])
    assert value == 0.5
    assert interval == pytest.approx([1 / 3, 1])
    with pytest.raises(ValueError, match="same samples"):
        ratio([1.0], [1.0, 2.0])


def test_facts_are_said_again_at_the_end() -> None:
    tokenizer = eval_case.tokenizer()
    said = tokenizer.decode(made_texts(tokenizer, 4000, 0, ["facts"])[0].ids)
    numbers = [word for word in said.split() if len(word) == 7 and word.isdecimal()]
    # The beginning is cut off, so that some facts are said at the end alone.
    assert [numbers.count(number) for number in set(numbers)].count(2) >= 4
