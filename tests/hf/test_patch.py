"""Patching and unpatching: what changes on a model, that all of it is undone, and that nothing else is touched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

import rocketkv
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import LARGE, SMALL, TRANSFORMERS, build, config, greedy, left_padded, prompt, sharpened

pytestmark = pytest.mark.integration

PROMPT = prompt(90)
PADDED = left_padded([PROMPT, prompt(50, seed=2)])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def snapshot(model: nn.Module) -> Any:
    """Return everything that hangs on a model: attributes and hooks of each module, configurations, weights."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in module.__dict__.items() if not key.startswith("__")}
        modules[name] = {
            # Containers by content, everything else by identity.
            key: dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else id(value)
            for key, value in attributes.items()
        }
    state = {name: (id(tensor), tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    return modules, copy.deepcopy(model.config.to_dict()), dict(model.config.__dict__), state


def assert_as_before(model: nn.Module, before: Any) -> None:
    modules, settings, attributes, state = snapshot(model)
    assert modules == before[0]
    assert settings == before[1]
    assert attributes == before[2]
    assert list(state) == list(before[3])
    for name, (identity, pointer, tensor) in state.items():
        assert (identity, pointer) == before[3][name][:2]
        assert tensor.equal(before[3][name][2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "phi3"])
def test_unpatch_leaves_the_model_as_it_was(family: str) -> None:
    model = build(family)
    before = snapshot(model)
    expected = greedy(model, PADDED)[1]
    implementation = model.config._attn_implementation
    handle = rocketkv.patch(model, **SMALL)
    assert model.config._attn_implementation == "rocketkv"
    greedy(model, PADDED)
    rocketkv.unpatch(model)
    assert model.config._attn_implementation == implementation
    assert_as_before(model, before)
    assert greedy(model, PADDED)[1].equal(expected)
    assert handle.stats().tokens_seen == 90 + 11
    rocketkv.unpatch(model)
    assert_as_before(model, before)


def test_warming_up_runs_both_stages_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    handle = rocketkv.patch(model, **SMALL)
    expected = greedy(model, PADDED)[1]
    stats, ran = handle.stats(), []
    for name in ("end_prompt", "decode"):
        method = getattr(RocketKVLayer, name)

        def noted(layer: RocketKVLayer, *args: Any, name: str = name, method: Any = method) -> Any:
            result = method(layer, *args)
            ran.append((name, layer.number, layer.store.seen, layer.store.stored < layer.store.seen))
            return result

        monkeypatch.setattr(RocketKVLayer, name, noted)
    state = torch.get_rng_state()
    handle.warm_up(200, batch_size=2)
    assert ran == [(name, i, 200 + n, True) for n, name in enumerate(("end_prompt", "decode")) for i in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.stats() is stats
    assert greedy(model, PADDED)[1].equal(expected)
    with pytest.raises(ValueError, match="prompt_length must be at least 1, got 0"):
        handle.warm_up(0)


def test_patching_again_changes_the_settings() -> None:
    model = build()
    before = snapshot(model)
    handle = rocketkv.patch(model, **LARGE)
    hooks = len(model.model._forward_pre_hooks)
    stock = greedy(model, PROMPT)
    again = rocketkv.patch(model, rocketkv.RocketKVConfig(**SMALL))
    assert len(model.model._forward_pre_hooks) == hooks
    assert handle.config == again.config == rocketkv.RocketKVConfig(**SMALL)
    compressed = greedy(model, PROMPT)
    assert not compressed[1].equal(stock[1])
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        rocketkv.patch(model, kernel_size=4)
    assert handle.config == rocketkv.RocketKVConfig(**SMALL)
    assert greedy(model, PROMPT)[1].equal(compressed[1])
    with again:
        pass
    assert handle.config == rocketkv.RocketKVConfig(**LARGE)  # as it was before the second patch
    rocketkv.unpatch(model)
    assert_as_before(model, before)


def test_a_config_and_fields_together() -> None:
    model = build()
    settings = rocketkv.RocketKVConfig(**SMALL)
    with rocketkv.patch(model, config=settings) as handle:
        assert handle.config == settings
    with rocketkv.patch(model, config=settings, method="snapkv") as handle:
        assert handle.config == dataclasses.replace(settings, method="snapkv")
    with rocketkv.patch(model, settings, method="snapkv") as handle:
        assert handle.config == dataclasses.replace(settings, method="snapkv")
    with pytest.raises(TypeError, match="config must be a RocketKVConfig or None, got dict"):
        rocketkv.patch(model, {"token_budget": 64})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="budget"):
        rocketkv.patch(model, budget=64)


class Raising(LogitsProcessor):
    """Fails at the third token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 90 + 2:
            raise RuntimeError("no more tokens")
        return scores


@pytest.mark.parametrize("place", ["logits processor", "layer", "attention output", "context"])
def test_an_exception_leaves_the_model_usable(place: str) -> None:
    model = build()
    before = snapshot(model)
    with rocketkv.patch(model, **SMALL):
        expected = greedy(model, PROMPT)
    handle = rocketkv.patch(model, **SMALL)
    if place == "logits processor":
        with pytest.raises(RuntimeError, match="no more tokens"):
            greedy(model, PROMPT, logits_processor=LogitsProcessorList([Raising()]))
    elif place == "context":
        with pytest.raises(RuntimeError, match="mine"), handle:
            raise RuntimeError("mine")
        assert_as_before(model, before)
        handle = rocketkv.patch(model, **SMALL)
    else:
        layer = model.model.layers[1]
        calls: list[int] = []

        def fail(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("broken layer")

        hook = (layer if place == "layer" else layer.self_attn.o_proj).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken layer"):
            greedy(model, PROMPT)
        hook.remove()
    tokens, logits, _ = greedy(model, PROMPT)
    assert tokens.equal(expected[0])
    assert logits.equal(expected[1])
    assert handle.stats().tokens_seen == 90 + 11
    rocketkv.unpatch(model)
    assert_as_before(model, before)


def test_a_cache_goes_on_after_an_interrupted_step() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        with torch.no_grad():
            model(PROMPT, **{CACHE_ARGUMENT: cache})
            copied = copy.deepcopy(cache)
            hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(prompt(1), **{CACHE_ARGUMENT: cache})
            hook.remove()
            cache.crop(90)
            found = model(prompt(1), **{CACHE_ARGUMENT: cache}).logits
            expected = model(prompt(1), **{CACHE_ARGUMENT: copied}).logits
    close(found, expected)


def test_a_forward_that_fails_between_cache_and_attention() -> None:
    class Failing(rocketkv.RocketKVCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            handed = super().update(*args, **kwargs)
            if args[2] == 1:  # the first full-attention layer
                raise RuntimeError("out of memory")
            return handed

    model = build("gemma3")
    with rocketkv.patch(model, **SMALL):
        expected = greedy(model, PROMPT)[1]
        with pytest.raises(RuntimeError, match="out of memory"):
            greedy(model, PROMPT, **{CACHE_ARGUMENT: Failing(model.config, **SMALL)})
        assert greedy(model, PROMPT)[1].equal(expected)


def test_a_refused_model_is_not_touched() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    ).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be patched"):
        rocketkv.patch(model)
    assert_as_before(model, before)
    llama = build()
    before = snapshot(llama)
    with pytest.raises(ValueError, match="token_budget must be at least"):
        rocketkv.patch(llama, token_budget=1)
    assert_as_before(llama, before)


def test_part_of_a_patched_model_is_refused() -> None:
    model = build()
    before = snapshot(model)
    for first, second in ((model, model.model), (model.model, model)):
        rocketkv.patch(first, **SMALL)
        with pytest.raises(ValueError, match="patched already"):
            rocketkv.patch(second, **SMALL)
        rocketkv.unpatch(first)
        assert_as_before(model, before)


def test_a_generate_of_ones_own_stays() -> None:
    model = build()
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(rocketkv_layers(kwargs.get(CACHE_ARGUMENT))))
        return LlamaForCausalLM.generate(model, *args, **kwargs)

    model.generate = mine
    with rocketkv.patch(model, **SMALL):
        greedy(model, PROMPT)
    assert model.generate is mine
    assert calls == [2]


def test_a_wrapper_put_on_generate_since_stays_and_runs_the_models_own() -> None:
    model, calls = build(), list[int]()
    stock = greedy(model, PROMPT)[1]
    handle = rocketkv.patch(model, **SMALL)
    compressed, patched = greedy(model, PROMPT)[1], model.generate

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return patched(*args, **kwargs)

    model.generate = wrapper
    assert greedy(model, PROMPT)[1].equal(compressed)
    rocketkv.unpatch(model)
    assert model.generate is wrapper
    assert greedy(model, PROMPT)[1].equal(stock)
    with rocketkv.patch(model, **SMALL) as again:
        assert greedy(model, PROMPT)[1].equal(compressed)
        assert again.stats().tokens_seen == 90 + 11
    assert model.generate is wrapper
    assert greedy(model, PROMPT)[1].equal(stock)
    assert calls == [1] * 4
    assert handle.stats().tokens_seen == 90 + 11


def test_a_wrapper_round_a_generate_of_ones_own_ends_there() -> None:
    model, calls = build(), list[str]()

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append("mine")
        return LlamaForCausalLM.generate(model, *args, **kwargs)

    model.generate = mine
    rocketkv.patch(model, **SMALL)
    patched = model.generate
    model.generate = lambda *args, **kwargs: (calls.append("wrapper"), patched(*args, **kwargs))[1]
    rocketkv.unpatch(model)
    greedy(model, PROMPT)
    assert calls == ["wrapper", "mine"]


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_of_ones_own_comes_back(name: str) -> None:
    model = build()
    if not hasattr(model, name):
        pytest.skip(f"this transformers has no {name}")

    def mine(*args: Any, **kwargs: Any) -> str:
        return "mine"

    setattr(model, name, mine)
    before = snapshot(model)
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match="continuous batching"):
        getattr(model, name)()
    assert_as_before(model, before)
    assert getattr(model, name)() == "mine"
    # One that came since stays.
    rocketkv.patch(model, **SMALL)
    later = functools.partial(mine)
    setattr(model, name, later)
    rocketkv.unpatch(model)
    assert getattr(model, name) is later


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["copy", "pickle"])  # fmt: skip
def test_copies_of_a_patched_model(clone: Any) -> None:
    model = build("gemma3")
    stock = greedy(model, PROMPT)
    rocketkv.patch(model, **SMALL)
    expected = greedy(model, PROMPT)
    cloned = clone(model)
    rocketkv.unpatch(model)
    assert greedy(model, PROMPT)[1].equal(stock[1])
    assert greedy(cloned, PROMPT)[1].equal(expected[1])
    with torch.no_grad():
        cloned.lm_head.weight.zero_()
    assert not greedy(cloned, PROMPT)[1].any()
    assert greedy(model, PROMPT)[1].equal(stock[1])
    rocketkv.unpatch(cloned)
    assert "generate" not in cloned.__dict__
    assert cloned.config._attn_implementation == "sdpa"
    assert not cloned.model._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_models_that_share_a_config(family: str) -> None:
    shared = config(family)
    kind = type(build(family))
    model, other = sharpened(kind, shared, seed=0), sharpened(kind, shared, seed=1)
    assert model.config is other.config
    before = snapshot(model), snapshot(other)
    stock = greedy(model, PADDED), greedy(other, PADDED)
    with rocketkv.patch(model, **SMALL):
        compressed = greedy(model, PADDED)
        assert greedy(other, PADDED)[1].equal(stock[1][1])
    rocketkv.patch(model, **SMALL)
    rocketkv.patch(other, **SMALL)
    assert greedy(model, PADDED)[1].equal(compressed[1])
    both = greedy(other, PADDED)
    rocketkv.unpatch(model)
    assert greedy(model, PADDED)[1].equal(stock[0][1])
    assert greedy(other, PADDED)[1].equal(both[1])
    rocketkv.unpatch(other)
    for patched, then in zip((model, other), before, strict=True):
        assert_as_before(patched, then)


def test_what_is_set_on_a_patched_models_config_stays() -> None:
    model = build()
    given = model.config
    with rocketkv.patch(model, **SMALL):
        model.config.use_cache = False
        model.config.my_note = "mine"
    assert model.config is given
    assert model.config.use_cache is False
    assert model.config.my_note == "mine"
    assert model.config._attn_implementation == "sdpa"


def test_saving_a_patched_model(tmp_path: Path) -> None:
    model = build("gemma3")
    model.save_pretrained(tmp_path / "stock")
    with rocketkv.patch(model, **SMALL):
        greedy(model, PROMPT)
        model.save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "stock").iterdir()):
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "patched").iterdir())) == len(list((tmp_path / "stock").iterdir()))
    loaded = type(model).from_pretrained(tmp_path / "patched")
    close(greedy(loaded, PROMPT)[1], greedy(model, PROMPT)[1])


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    inputs = left_padded([prompt(70), prompt(50, seed=2)])
    # A first token is predicted by padding, of which nobody promises anything.
    known = inputs["attention_mask"].cumsum(-1) > 1
    labels = inputs["input_ids"].masked_fill(~known, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("mode", ["train", "checkpointing", "eval"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_gradients_are_the_stock_models(family: str, mode: str) -> None:
    model = build(family)
    model.train(mode != "eval")
    if mode == "checkpointing":
        enable = "activation_checkpointing_enable" if TRANSFORMERS >= (5, 20) else "gradient_checkpointing_enable"
        getattr(model, enable)()
    expected = gradients(model)
    with rocketkv.patch(model, **SMALL):
        found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * max(1.0, largest), rtol=0)


def test_a_patch_that_transformers_refuses_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = snapshot(model)

    def refusing(self: Any, implementation: str) -> None:
        self.config._attn_implementation_internal = implementation
        raise ValueError("not this one")

    with monkeypatch.context() as changed:
        changed.setattr(type(model.model), "set_attn_implementation", refusing)
        with pytest.raises(ValueError, match="not this one"):
            rocketkv.patch(model, **SMALL)
    assert_as_before(model, before)
    with rocketkv.patch(model, **SMALL):
        assert greedy(model, PROMPT)[0].shape == (1, 12)
