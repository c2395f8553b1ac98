"""What cannot be compressed: refused by name with the reason, or run exactly as stock with one warning."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import rocketkv
from own_attention import OwnForCausalLM
from rocketkv.hf.attention import rocketkv_attention
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import COMMON, LARGE, SMALL, build, config, greedy, left_padded, prompt

pytestmark = pytest.mark.integration

PROMPT = prompt(90)
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8,
       "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
       "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "intermediate_size": 96, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 4,
          "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "query_pre_attn_scalar": 16}  # fmt: skip

# Class, fields and the reason.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1}, "it is an encoder-decoder"),
    ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                                      "encoder_attention_heads": 2, "decoder_attention_heads": 2},
     "it is an encoder-decoder"),
    ("RwkvForCausalLM", {"context_length": 32}, "no causal attention layers"),
    ("OwnForCausalLM", {}, "it does not use transformers' attention interface"),
    ("DeepseekV3ForCausalLM", MLA, "latent"),
    ("Gemma3nForCausalLM", SHARED, "its layers share keys and values"),
    ("DogeForCausalLM", {}, "it reads the attention mask as a tensor"),
    ("DiffLlamaForCausalLM", {}, "twice|attention interface"),
    ("DoryForCausalLM", {"n_input_layers": 1, "n_output_layers": 0}, "it runs its layers in loops"),
    ("MiniMaxForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 2,
                            "layer_types": ["linear_attention", "full_attention"]}, "it keeps a cache of its own"),
]  # fmt: skip


def refused(name: str, fields: dict[str, Any]) -> Any:
    kind = class_named(name)
    settings = transformers.Gemma3nTextConfig if name == "Gemma3nForCausalLM" else kind.config_class
    return kind(settings(**{**COMMON, **fields})).eval()


def class_named(name: str) -> Any:
    return OwnForCausalLM if name == "OwnForCausalLM" else getattr(transformers, name, None)


# Not every version has every model.
REFUSED = [entry for entry in REFUSED if class_named(entry[0]) is not None]


@pytest.mark.parametrize(("name", "fields", "reason"), REFUSED, ids=[entry[0] for entry in REFUSED])
def test_models_refused_by_name_and_reason(name: str, fields: dict[str, Any], reason: str) -> None:
    model = refused(name, fields)
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"{name} cannot be patched: .*{reason}"):
        rocketkv.patch(model)
    assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before


def test_what_is_no_model() -> None:
    for thing in (nn.Linear(2, 2), "gpt2", None, config("llama")):
        with pytest.raises(TypeError, match="model must be a transformers model or hold one, got"):
            rocketkv.patch(thing)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model must be a transformers model or hold one, got"):
            rocketkv.unpatch(thing)  # type: ignore[arg-type]


def test_a_model_whose_keys_change_behind_its_cache() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        update = rocketkv.RocketKVCache.update

        class Changing(rocketkv.RocketKVCache):
            def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                key, value = update(self, *args, **kwargs)
                return key.clone(), value

        with pytest.raises(ValueError, match="changes keys between its cache and its attention"), torch.no_grad():
            model(PROMPT, **{CACHE_ARGUMENT: Changing(model.config, **SMALL)})
        greedy(model, PROMPT)


def warned_once(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "RocketKV" in str(warning.message)]


@pytest.mark.parametrize("how", ["by name", "an object", "a filled cache", "a loop"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_other_caches_run_as_stock_with_one_warning(family: str, how: str) -> None:
    model = build(family)

    def run(patched: bool = False) -> tuple[Tensor, Tensor]:
        if how == "by name":
            return greedy(model, PROMPT, cache_implementation="static")[:2]
        if how == "an object":
            return greedy(model, PROMPT, **{CACHE_ARGUMENT: StaticCache(config=model.config, max_cache_len=120)})[:2]
        cache = DynamicCache(config=model.config)
        stock = build(family)
        with torch.no_grad():
            stock(PROMPT[:, :60], **{CACHE_ARGUMENT: cache})
        if how == "a filled cache":
            return greedy(model, PROMPT, **{CACHE_ARGUMENT: cache})[:2]
        with torch.no_grad():
            logits = model(PROMPT[:, 60:], **{CACHE_ARGUMENT: cache}).logits
        return logits.argmax(-1), logits

    expected, expected_logits = run()
    found: list[tuple[Tensor, Tensor]] = []
    with rocketkv.patch(model, **SMALL):
        messages = warned_once(lambda: found.extend((run(), run())))
        assert len(messages) == 1
        assert "RocketKV leaves a " in messages[0]
        assert "without compression" in messages[0]
        for tokens, logits in found:
            assert tokens.equal(expected)
            torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
        # The next plain generation is compressed again.
        assert not greedy(model, PROMPT)[1].equal(expected_logits)


@pytest.mark.parametrize("kind", ["offloaded", "quantized"])
def test_caches_that_need_more_than_a_cpu_are_left_to_transformers(kind: str) -> None:
    model = build()

    def outcome() -> Any:
        try:
            return greedy(model, PROMPT, cache_implementation=kind)[0].tolist()
        except (AssertionError, ImportError, RuntimeError) as error:
            return str(error)

    expected = outcome()
    with rocketkv.patch(model, **SMALL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert outcome() == expected


@pytest.mark.parametrize("name", ["position_bias", "sinks"])
def test_what_changes_the_weights_and_is_not_known_is_refused(name: str) -> None:
    query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    module = build().model.layers[0].self_attn
    with pytest.raises(ValueError, match=f"LlamaAttention gives its attention '{name}'"):
        rocketkv_attention(module, query, key, key, None, **{name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_either_name(name: str) -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        expected, logits, _ = greedy(model, PROMPT)
        renamed = name == "past_key_values" and CACHE_ARGUMENT == "cache"
        with pytest.warns(FutureWarning, match="past_key_values") if renamed else contextlib.nullcontext():
            tokens, found, cache = greedy(model, PROMPT, **{name: RocketKVCache(model.config, **SMALL)})
            again = model.model(PROMPT, **{name: RocketKVCache(model.config, **SMALL)})
        assert tokens.equal(expected)
        assert found.equal(logits)
        assert again.get(CACHE_ARGUMENT).get_seq_length() == PROMPT.shape[1]
        assert cache.get_seq_length() == PROMPT.shape[1] + 11


def test_continuous_batching_is_refused() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([PROMPT[0].tolist()])
        with pytest.raises(ValueError, match="continuous batching"):
            model.init_continuous_batching()
        query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
        with pytest.raises(ValueError, match="continuous batching"):
            rocketkv_attention(model.model.layers[0].self_attn, query, key, key, None, cache=object())
    assert "generate_batch" not in model.__dict__
    assert "init_continuous_batching" not in model.__dict__


def test_attention_weights_are_refused() -> None:
    model = build(attn_implementation="eager")
    with rocketkv.patch(model, **SMALL):
        with pytest.raises(ValueError, match="output_attentions=True asks for attention weights"):
            model(PROMPT, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions=True asks for attention weights"):
            greedy(model, PROMPT, output_attentions=True)
        greedy(model, PROMPT)
    assert model(PROMPT, output_attentions=True).attentions[0].shape == (1, 4, 90, 90)


@pytest.mark.parametrize("chunk", [None, 30])
def test_a_row_of_only_padding(chunk: int | None) -> None:
    model = build()
    inputs = left_padded([PROMPT, prompt(50), prompt(20)])
    inputs["attention_mask"][1] = 0
    with rocketkv.patch(model, **SMALL):
        with pytest.raises(ValueError, match="at least one token, but row 1 is only padding"):
            greedy(model, inputs, prefill_chunk_size=chunk)
        with pytest.raises(ValueError, match="at least one token, but row 1 is only padding"):
            model(**inputs)
        greedy(model, left_padded([PROMPT, prompt(50)]))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_queries_and_keys(kind: torch.dtype) -> None:
    model = build()
    seen = torch.ones(90, 90, dtype=torch.bool).tril()[None, None]
    seen[..., 10:20] = False
    seen = seen | torch.eye(90, dtype=torch.bool)
    mask = seen if kind == torch.bool else torch.zeros(1, 1, 90, 90).masked_fill(~seen, torch.finfo(kind).min)
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=mask, use_cache=False).logits
        with rocketkv.patch(model, **SMALL):
            with pytest.raises(ValueError, match=r"needs the 2D attention_mask .* shape \(1, 1, 90, 90\)"):
                model(PROMPT, attention_mask=mask)
            # Without a cache there is nothing to compress, and any mask will do.
            found = model(PROMPT, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_cache_of_ours_without_a_patched_model() -> None:
    model = build()
    cache = rocketkv.RocketKVCache(model.config, **SMALL)
    with pytest.raises(ValueError, match=r"not patched.* call rocketkv\.patch\(model\)"):
        greedy(model, PROMPT, **{CACHE_ARGUMENT: cache})
    with rocketkv.patch(model, **SMALL):
        _, _, cache = greedy(model, PROMPT)
    with pytest.raises(ValueError, match="not patched"), torch.no_grad():
        model(prompt(1), **{CACHE_ARGUMENT: cache})


def test_fields_of_a_cache() -> None:
    settings = rocketkv.RocketKVConfig(**SMALL)
    replaced = rocketkv.RocketKVCache(config("llama"), settings, token_budget=64)
    assert replaced.config == dataclasses.replace(settings, token_budget=64)
    message = r"there is no setting 'budget'\. Did you mean 'token_budget'\?"
    with pytest.raises(TypeError, match=message):
        rocketkv.RocketKVCache(config("llama"), budget=64)
    with pytest.raises(TypeError, match=message):
        rocketkv.patch(build(), settings, budget=64)
    with pytest.raises(TypeError, match=r"there is no setting 'zzz'\. RocketKVConfig lists them"):
        rocketkv.patch(build(), zzz=64)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        rocketkv.RocketKVCache(config("llama"), kernel_size=4)
    split = rocketkv.BudgetSplit(token_budget=24, channels=32, top_k=12)
    model = build()
    with rocketkv.patch(model, split=split), pytest.raises(ValueError, match=r"split\.channels must be at most"):
        greedy(model, PROMPT)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23, 24, 25, 39, 40, 41])
def test_short_prompts_are_no_error(length: int) -> None:
    """Around the window, the budget and the share of stage 1."""
    model = build()
    ids = prompt(length)
    expected = greedy(model, ids)
    with rocketkv.patch(model, **LARGE):
        tokens, logits, _ = greedy(model, ids)
        assert tokens.equal(expected[0])
        torch.testing.assert_close(logits, expected[1], atol=1e-5, rtol=0)
        rocketkv.patch(model, **SMALL)
        _, logits, cache = greedy(model, ids)
    exact = max(1, min(12, 24 - length + 1))
    torch.testing.assert_close(logits[:, :exact], expected[1][:, :exact], atol=1e-5, rtol=0)
    assert cache.stats().layers[0].tokens_stored == min(length, 40) + 11
