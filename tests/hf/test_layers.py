"""Exceptions by layer: layers that keep a full cache, and layers with budgets of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

import rocketkv
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from static import compiling, inputs_of, own_loop
from tiny import LARGE, SETTINGS, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.integration

PROMPT = prompt(90)
PADDED = left_padded([PROMPT, prompt(50, seed=2)])
TINY: dict[str, Any] = {**SETTINGS, "token_budget": 24}
WHOLE = 4096  # a budget that every prompt here fits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("inputs", [PROMPT, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "rocketkv-mt", "quest", "streaming"])
def test_a_skipped_layer_is_a_layer_with_room_for_everything(method: str, inputs: Any) -> None:
    model = build(num_hidden_layers=3)
    stock = greedy(model, inputs)[1]
    with rocketkv.patch(model, **TINY, method=method, layer_budgets={0: WHOLE, -1: WHOLE}):
        expected, logits, _ = greedy(model, inputs)
    with rocketkv.patch(model, **TINY, method=method, skip_layers=(0, -1)) as handle:
        found, found_logits, cache = greedy(model, inputs)
        assert type(cache.layers[0]) is type(cache.layers[2]) is DynamicLayer
        assert [layer.compressed for layer in handle.stats().layers] == [False, True, False]
        assert [layer.tokens_seen for layer in handle.stats().layers] == [101] * 3
        assert handle.stats().layers[0].tokens_stored == 101
        # The cache of a loop, and one that the user made.
        close(hand_written(model, PROMPT)[1], greedy(model, PROMPT)[1])
        theirs = DynamicCache(config=model.config)
        assert greedy(model, inputs, **{CACHE_ARGUMENT: theirs})[0].equal(expected)
        assert len(rocketkv_layers(theirs)) == 1
    assert found.equal(expected)
    close(found_logits, logits)
    assert not torch.allclose(logits, stock, atol=1e-2)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "rocketkv-mt"])
def test_budgets_by_layer(method: str) -> None:
    model = build(num_hidden_layers=3)
    with rocketkv.patch(model, **TINY, method=method):
        expected = greedy(model, PADDED)[1]
    with rocketkv.patch(
        model, **{**TINY, "token_budget": WHOLE}, method=method, layer_budgets=dict.fromkeys(range(3), 24)
    ):
        assert greedy(model, PADDED)[1].equal(expected)
    with rocketkv.patch(model, **TINY, method=method, layer_budgets={1: 40}):
        cache = greedy(model, PADDED)[2]
    assert [layer.store.split.token_budget for layer in cache.layers] == [24, 40, 24]
    assert [layer.config.token_budget for layer in cache.layers] == [24, 40, 24]
    assert cache.config.layer_budgets == ((1, 40),)


HOW: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 4},
    {"prefill_chunk_size": 32},
    {"do_sample": True, "num_return_sequences": 2},
]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(how))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_within_the_budget_the_stock_output(family: str, how: dict[str, Any]) -> None:
    model = build(family)  # of four layers, in hybrids, the second and the last attend to everything
    ids = torch.cat([prompt(12, seed=5)] * 8, dim=1)
    skipped = (0,) if family == "llama" else (1,)

    def output() -> Tensor:
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=16, **how)

    expected = output()
    with rocketkv.patch(model, **LARGE, skip_layers=skipped):
        assert output().equal(expected)
    with rocketkv.patch(model, **LARGE, layer_budgets={-1: 300}):
        assert output().equal(expected)


def test_layers_that_are_not_there_or_not_compressed_are_refused() -> None:
    model = build("gemma3")
    for fields, message in (
        ({"skip_layers": (4,)}, "skip_layers names layer 4, but the model has layers 0 to 3"),
        ({"layer_budgets": {0: 64}}, "layer 0, a DynamicSlidingWindowLayer that is not compressed"),
        ({"skip_layers": (1, 3)}, "skip_layers leaves no layer to compress"),
        ({"skip_layers": (1,), "layer_budgets": {-3: 64}}, "name layer 1 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            RocketKVCache(model.config, **TINY, **fields)
        with rocketkv.patch(model, **TINY, **fields), pytest.raises(ValueError, match=message):
            greedy(model, PROMPT)
    # A sliding-window layer is never compressed, so to skip it is nothing.
    assert len(rocketkv_layers(RocketKVCache(model.config, **TINY, skip_layers=(0, 1)))) == 1
    # A cache that was filled before stays as it is, with a warning.
    filled = greedy(model, PROMPT)[2]
    ids = torch.cat((PROMPT, prompt(13)), dim=1)
    with rocketkv.patch(model, **TINY, layer_budgets={1: 64}), pytest.warns(UserWarning, match="as it is"):
        greedy(model, ids, **{CACHE_ARGUMENT: filled})


FIELDS: list[dict[str, Any]] = [{"skip_layers": [0]}, {"layer_budgets": {0: 40, -1: 30}}]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields))
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "rocketkv-mt"])
def test_snapshots_copies_crops_and_files(method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, given = build(num_hidden_layers=3), {**TINY, "method": method, **fields}
    ids, path = prompt(12, seed=8), tmp_path / "cache.safetensors"

    def decode(cache: Any) -> Tensor:
        return torch.cat([model(token, **{CACHE_ARGUMENT: cache}).logits for token in ids.split(1, dim=1)], dim=1)

    with rocketkv.patch(model, **given), torch.no_grad():
        cache = RocketKVCache(model.config, prompt_length=90, **given)
        model(PROMPT, **{CACHE_ARGUMENT: cache})
        rocketkv.save_cache(cache, path, model=model, ids=PROMPT)
        taken, copied = cache.snapshot(), copy.deepcopy(cache)
        expected = decode(cache)
        assert decode(copied).equal(expected)
        cache.rollback(taken)
        assert decode(cache).equal(expected)
        cache.crop(-12)
        close(decode(cache), expected)
        loaded = rocketkv.load_cache(path, model)
        assert loaded.config == cache.config == rocketkv.RocketKVConfig(**given)
        assert decode(loaded).equal(expected)
    differs = pytest.raises(ValueError, match=r"settings\.(skip_layers|layer_budgets) is ")
    with rocketkv.patch(model, **{**given, "skip_layers": (1,), "layer_budgets": ()}), differs:
        rocketkv.load_cache(path, model)


@pytest.mark.parametrize("rows", ["one", "padded"])
def test_static_steps_with_budgets_by_layer(rows: str) -> None:
    model = build(num_hidden_layers=3)
    fields: dict[str, Any] = {"split": None, **TINY, "method": "rocketkv", "layer_budgets": {1: 50}}
    with rocketkv.patch(model, **TINY, method="rocketkv", decode_capacity=16, layer_budgets={1: 50}):
        torch._dynamo.reset()
        growing, _, _ = own_loop(model, inputs_of(rows), model, 8, **fields, decode_capacity=None)
        static, _, cache = own_loop(model, inputs_of(rows), model, 8, **fields)
        compiled = greedy(model, inputs_of(rows), 8, compile_config=compiling("eager"))[0]
        torch._dynamo.reset()
    assert static.equal(growing)
    assert compiled.equal(growing)
    assert len({layer.store.capacity for layer in rocketkv_layers(cache)}) == 2


def test_reports_and_audits_name_the_layers() -> None:
    model, reports = build(num_hidden_layers=3), list[Any]()
    fields = {**TINY, "method": "rocketkv+", "skip_layers": (1,), "audit_every": 2}
    with rocketkv.patch(model, **fields, on_step=reports.append) as handle:
        greedy(model, PROMPT)
    assert all(list(report.missed) == [0, 2] for report in reports)
    assert {audit.layer for audit in handle.stats().audits} == {0, 2}
    assert [missed is None for missed in handle.stats().missed] == [False, True, False]


def test_kernels_work_in_buffers_of_each_budgets_own() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    model = build(num_hidden_layers=3)
    with rocketkv.patch(model, **TINY, layer_budgets={1: 50}, backend="torch"):
        expected = greedy(model, PROMPT, 4)[0]
    with rocketkv.patch(model, **TINY, layer_budgets={1: 50}, backend="triton"):
        found, _, cache = greedy(model, PROMPT, 4)
    assert found.equal(expected)
    first, second, third = rocketkv_layers(cache)
    assert first.workspaces is third.workspaces
    assert first.workspaces is not second.workspaces
