"""`rocketkv.plan` against what a generation really allocates, and against figures worked out by hand."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, Qwen3NextConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import rocketkv
import rocketkv.hf.plan
from own_attention import OwnConfig, OwnForCausalLM
from rocketkv.hf.plan import Plan, plan
from rocketkv.options import DTYPES
from rocketkv.state.stats import LayerStats
from tiny import FAMILIES, WINDOW, build, config, prompt

pytestmark = pytest.mark.integration

CONTEXT, BATCH, RESERVE = 331, 2, 40
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


def allocated(name: str, dtype: str, budget: int, method: str) -> list[LayerStats]:
    """Generate one token and return what is live at the end of the prompt."""
    model = build(name).to(getattr(torch, dtype))
    with rocketkv.patch(model, method=method, token_budget=budget, decode_reserve=RESERVE) as handle:
        model.generate(prompt(CONTEXT, rows=BATCH), max_new_tokens=1, do_sample=False)
        return list(handle.stats().layers)


def planned(name: str, dtype: str, budget: int, method: str) -> list[LayerStats]:
    made = plan(
        config(name),
        context=CONTEXT,
        token_budget=budget,
        batch=BATCH,
        method=method,
        decode_reserve=RESERVE,
        dtype=dtype,
    )
    return list(made.cache.layers)


@pytest.mark.parametrize("budget", [48, 2 * CONTEXT])
@pytest.mark.parametrize("method", rocketkv.METHODS)
def test_every_method_allocates_what_was_planned(method: str, budget: int) -> None:
    expected = allocated("llama", "float32", budget, method)
    assert len(expected) == 2
    assert planned("llama", "float32", budget, method) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_allocates_what_was_planned(dtype: str) -> None:
    assert planned("llama", dtype, 48, "rocketkv") == allocated("llama", dtype, 48, "rocketkv")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_allocates_what_was_planned(family: str) -> None:
    # A sliding layer is a slice of the prompt's tensors until the first decode step, so its bytes are not live ones. It
    # also holds a scalar, the window, which is no memory to plan.
    expected, found = (
        [layer if layer.compressed else replace(layer, key_bytes=0, value_bytes=0, other_bytes=0) for layer in layers]
        for layers in (allocated(family, "float32", 48, "rocketkv"), planned(family, "float32", 48, "rocketkv"))
    )
    assert any(layer.compressed for layer in expected)
    assert found == expected


def test_the_example_holds() -> None:
    found = doctest.testmod(rocketkv.hf.plan)
    assert found.attempted
    assert not found.failed


def test_llama_8b_by_hand() -> None:
    made = plan(LLAMA_8B, context=131072, token_budget=512, method="rocketkv")
    found = made.to_dict()
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    assert found["step"]["weight_bytes"] == 2 * (32 * layer + 4096 + 128256 * 4096) == 15_009_849_344
    assert found["memory"]["full_bytes"] == 131072 * 131072
    assert found["step"]["dense_bytes"] == 131072 * (131072 + 1)  # the step's own token too
    # The official program's split at 131072 + 128 tokens; 2890 + 128 slots are 1006 pages of 3, 8 tiles of 128.
    assert found["split"] == {
        "token_budget": 512,
        "kept_tokens": 2890,
        "page_size": 3,
        "channels": 65,
        "sketch_bits": None,
        "top_k": 256,
        "sinks": None,
        "oracle": False,
        "protected": 0,
        "residual": False,
        "by_largest": False,
        "calibrated": False,
        "value_aware": False,
        "pool_offset": 0,
    }
    heads = 32 * 8
    assert found["memory"]["key_bytes"] == found["memory"]["value_bytes"] == heads * 3018 * 128 * 2
    assert found["memory"]["index_bytes"] == heads * 8 * 256 * 128 * 2
    assert found["memory"]["other_bytes"] == heads * (3018 + 1) * 4
    # A step scores 964 pages on 65 channels (8 tiles of 128 where whole ones are read) and attends to 256 tokens.
    assert found["step"]["nominal_compressed_bytes"] == heads * 2 * (964 * 65 + 256 * 256)
    assert found["step"]["compressed_bytes"] == heads * 2 * (8 * 128 * 65 + 256 * 256)
    nominal = found["step"]["nominal_dense_bytes"] / found["step"]["nominal_compressed_bytes"]
    assert nominal == pytest.approx(131072 / 512, rel=0.03)
    assert found["ceilings"]["attention"] == pytest.approx(254.0, abs=0.1)
    weights, dense = 15_009_849_344, 131072 * 131073
    compressed = found["step"]["compressed_bytes"]
    assert found["ceilings"]["end_to_end"] == (weights + dense) / (weights + compressed)


def test_a_batch_multiplies_the_cache_and_not_the_weights() -> None:
    one, eight = (plan(LLAMA_8B, context=32768, token_budget=1024, batch=batch) for batch in (1, 8))
    assert eight.weight_bytes == one.weight_bytes
    assert eight.cache.total_bytes == 8 * one.cache.total_bytes
    assert eight.attention_ceiling == one.attention_ceiling
    assert one.end_to_end_ceiling < eight.end_to_end_ceiling < eight.attention_ceiling


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt-oss"])
def test_the_embedding_counts_only_where_the_output_shares_it(family: str) -> None:
    untied, tied = (build(family, tie_word_embeddings=tie) for tie in (False, True))
    embedding = untied.get_input_embeddings().weight.numel()
    for model, looked_up in ((untied, embedding), (tied, 0)):
        stored = sum(parameter.numel() for parameter in model.parameters())
        # Two rows that choose two of four experts each may read all four.
        made = plan(model.config, context=64, token_budget=48, batch=2, dtype="float32")
        assert made.weight_bytes == 4 * (stored - looked_up)


def test_experts_that_no_row_can_choose_do_not_count() -> None:
    made = config("qwen3-moe")
    per_expert = made.num_hidden_layers * 3 * made.hidden_size * made.moe_intermediate_size
    one, two, many = (plan(made, context=64, token_budget=48, batch=batch, dtype="float32") for batch in (1, 2, 9))
    assert two.weight_bytes - one.weight_bytes == 4 * 2 * per_expert
    assert many.weight_bytes == two.weight_bytes
    assert "2 of 4 experts" in one.notes[0]
    assert "4 of 4 experts" in many.notes[0]


def test_sliding_layers_hold_their_window_in_both_arms() -> None:
    made = plan(config("gemma2"), context=CONTEXT, token_budget=48, dtype="float32")
    assert made.layer_kinds == {"compressed": 2, "kept": 2, "without_kv": 0}
    window = 2 * (WINDOW - 1) * (16 + 16) * 4  # KV heads, tokens, elements of K and V, bytes
    kept = [layer for layer in made.cache.layers if not layer.compressed]
    assert [(layer.total_bytes, layer.full_bytes, layer.step_bytes, layer.dense_step_bytes) for layer in kept] == [
        (window,) * 4
    ] * 2


def test_linear_layers_hold_no_keys_and_values() -> None:
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    hybrid = Qwen3NextConfig(**fields)
    if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        # Before linear layers had a place in the dynamic cache, such models brought a cache of their own.
        with pytest.raises(ValueError, match="Qwen3NextForCausalLM cannot be patched"):
            plan(hybrid, context=CONTEXT, token_budget=48)
        return
    made = plan(hybrid, context=CONTEXT, token_budget=48)
    assert made.layer_kinds == {"compressed": 1, "kept": 0, "without_kv": 3}
    assert [layer.full_bytes > 0 for layer in made.cache.layers] == [False, False, False, True]


@pytest.mark.parametrize(("context", "method"), [(40, "rocketkv"), (5000, "full")])
def test_nothing_to_gain_is_a_ceiling_of_one(context: int, method: str) -> None:
    made = plan(config("llama"), context=context, token_budget=48, method=method)
    assert made.attention_ceiling == made.end_to_end_ceiling == 1


def test_the_configuration_stays_as_it_was() -> None:
    given = config("llama")
    before, random_state = repr(vars(given)), torch.get_rng_state()
    plan(given, context=CONTEXT, token_budget=48)
    assert repr(vars(given)) == before
    assert torch.get_rng_state().equal(random_state)


def test_text_and_json_say_the_same() -> None:
    made = plan(config("gpt-oss"), context=5000, token_budget=48)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    text = str(made)
    assert "2 layers compressed, 2 kept as they are" in text
    assert f"attention {made.attention_ceiling:.2f}x" in text
    assert f"end to end, weights included, {made.end_to_end_ceiling:.2f}x" in text
    assert "not measurements" in text
    assert "2 of 4 experts" in text
    assert "gives the model 4096 positions, fewer than" in text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"context": 0}, ValueError, "context must be at least 1, got 0"),
        ({"batch": -1}, ValueError, "batch must be at least 1, got -1"),
        ({"context": 1.5}, TypeError, "context must be an int, got 1.5"),
        ({"batch": True}, TypeError, "batch must be an int, got True"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"token_budget": 0}, ValueError, "token_budget must be at least 1"),
        ({"method": "rocketvk"}, ValueError, "Did you mean 'rocketkv'"),
        ({"decode_reserve": 0}, ValueError, "decode_reserve must be at least 1"),
    ],
)
def test_impossible_figures_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    def made() -> Plan:
        return plan(config("llama"), **{"context": 100, "token_budget": 48, **fields})

    with pytest.raises(error, match=message):
        made()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("T5Config", "T5Config is not the configuration of a causal language model"),
        ("OwnConfig", "OwnForCausalLM cannot be patched: it does not use transformers' attention interface"),
        ("DeepseekV3Config", "DeepseekV3ForCausalLM cannot be patched: .*latent"),
    ],
)
def test_models_that_cannot_be_compressed_are_refused(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, OwnConfig, OwnForCausalLM)
    settings = OwnConfig if kind == "OwnConfig" else getattr(transformers, kind)
    with pytest.raises(ValueError, match=message):
        plan(settings(num_hidden_layers=2), context=100, token_budget=48)
