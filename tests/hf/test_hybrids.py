"""Models of which only some layers attend to everything: those are compressed, and all others stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import rocketkv
from hybrids import LINEAR, linear
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from tiny import COMMON, LARGE, SMALL, TRANSFORMERS, build, greedy, left_padded, prompt, sharpened

pytestmark = pytest.mark.integration

ROWS = [prompt(101, seed=1), prompt(64, seed=2)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


if TRANSFORMERS >= (5, 8):

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("name", LINEAR)
    def test_linear_layers_stay_as_they_are(name: str, padded: bool) -> None:
        model = linear(name)
        inputs = left_padded(ROWS) if padded else ROWS[0]
        expected, expected_logits, stock = greedy(model, inputs)
        with rocketkv.patch(model, **LARGE):
            tokens, logits, cache = greedy(model, inputs)
        assert tokens.equal(expected)
        close(logits, expected_logits)
        for layer, other in zip(cache.layers, stock.layers, strict=True):
            full = type(other) is transformers.cache_utils.DynamicLayer
            assert type(layer) is (RocketKVLayer if full else type(other))
        assert len(rocketkv_layers(cache)) == 2

    @pytest.mark.parametrize("name", LINEAR)
    def test_full_layers_among_linear_ones_are_compressed(name: str) -> None:
        model = linear(name)

        def batch_and_alone() -> tuple[Tensor, Tensor, Any]:
            _, logits, cache = greedy(model, left_padded(ROWS))
            return logits, torch.cat([greedy(model, row)[1] for row in ROWS]), cache

        stock, stock_alone, _ = batch_and_alone()
        with rocketkv.patch(model, **SMALL) as handle:
            logits, alone, cache = batch_and_alone()
            assert [layer.tokens_stored for layer in handle.stats().layers if layer.compressed] == [40 + 11] * 2
        # The states of linear layers are sums in another order where there is padding, also in the stock model.
        assert (logits - alone).abs().max() < 1e-5 + 2 * (stock - stock_alone).abs().max()
        assert (logits - stock).abs().max() > 1e-3
        states = [layer for layer in cache.stats().layers if not layer.compressed]
        assert all(layer.other_bytes > 0 and layer.key_bytes == 0 for layer in states)

else:

    @pytest.mark.parametrize("name", LINEAR)
    def test_linear_hybrids_are_refused(name: str) -> None:
        model = linear(name)
        expected = greedy(model, ROWS[0])[1]
        with pytest.raises(ValueError, match=f"{name}ForCausalLM cannot be patched: "):
            rocketkv.patch(model)
        assert greedy(model, ROWS[0])[1].equal(expected)


def falcon_h1() -> PreTrainedModel:
    settings = transformers.FalconH1Config(**COMMON, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    return sharpened(transformers.FalconH1ForCausalLM, settings)


def test_layers_that_are_both() -> None:
    model = falcon_h1()
    if TRANSFORMERS < (5, 8):
        with pytest.raises(ValueError, match=r"FalconH1ForCausalLM cannot be patched: .* cache of its own kind"):
            rocketkv.patch(model)
        return
    expected = greedy(model, left_padded(ROWS))[1]
    with pytest.warns(UserWarning, match="FalconH1ForCausalLM has no layer of full attention alone"):
        rocketkv.patch(model, **SMALL)
    close(greedy(model, left_padded(ROWS))[1], expected)


@pytest.mark.parametrize("length", [15, 101])  # shorter and longer than the window of 24
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss", "cohere2"])
def test_sliding_layers_stay_as_they_are(family: str, length: int) -> None:
    model = build(family)
    inputs = left_padded([prompt(length), prompt(length - 8, seed=2)])
    _, expected, stock = greedy(model, inputs)
    with rocketkv.patch(model, **LARGE):
        _, logits, cache = greedy(model, inputs)
    close(logits, expected)
    for i, (layer, other) in enumerate(zip(cache.layers, stock.layers, strict=True)):
        assert type(layer) is (RocketKVLayer if i % 2 else type(other))
        if not i % 2:
            close(layer.keys[1, :, -12:], other.keys[1, :, -12:])
            close(layer.values[1, :, -12:], other.values[1, :, -12:])


def test_a_model_of_sliding_layers_only() -> None:
    model = build("mistral", sliding_window=24)
    expected, expected_logits, _ = greedy(model, left_padded(ROWS))
    with pytest.warns(UserWarning, match="MistralForCausalLM has no layer of full attention alone"):
        handle = rocketkv.patch(model, **SMALL)
    tokens, logits, _ = greedy(model, left_padded(ROWS))
    assert tokens.equal(expected)
    close(logits, expected_logits)
    assert not any(layer.compressed for layer in handle.stats().layers)
    rocketkv.unpatch(model)
    assert greedy(model, left_padded(ROWS))[1].equal(expected_logits)


def test_chunked_attention() -> None:
    settings = {
        **COMMON,
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0] * 2,
        "attention_chunk_size": 32,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    }
    model = sharpened(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**settings))
    expected, expected_logits, _ = greedy(model, left_padded(ROWS))
    with rocketkv.patch(model, **LARGE) as handle:
        tokens, logits, _ = greedy(model, left_padded(ROWS))
        assert [layer.compressed for layer in handle.stats().layers] == [False, True] * 2
    assert tokens.equal(expected)
    close(logits, expected_logits)


def vision_model() -> PreTrainedModel:
    """Build a Gemma 3 that reads images: four tokens each, which see each other in both directions."""
    text = build("gemma3").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    settings = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95, boi_token_index=93,
        eoi_token_index=94, image_token_id=95,
    )  # fmt: skip
    return sharpened(transformers.Gemma3ForConditionalGeneration, settings)


def test_a_vision_model() -> None:
    model = vision_model()
    ids = prompt(101).clamp(max=92)
    ids[:, 30:34] = 95
    pictures = torch.randn(1, 3, 28, 28)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == 95).long(),
        "pixel_values": pictures,
    }
    vision = model.model.vision_tower
    implementation = model.config._attn_implementation, vision.config._attn_implementation
    expected, expected_logits, _ = greedy(model, inputs)
    with rocketkv.patch(model, **LARGE) as handle:
        tokens, logits, _ = greedy(model, inputs)
        assert vision.config._attn_implementation == implementation[1]
        assert [layer.compressed for layer in handle.stats().layers] == [False, True] * 2
        rocketkv.patch(model, **SMALL)
        compressed = greedy(model, inputs)
        assert {layer.store.stored for layer in rocketkv_layers(compressed[2])} == {40 + 11}
    assert tokens.equal(expected)
    close(logits, expected_logits)
    # The prompt is read in full, image and all, whatever is kept of it.
    close(compressed[1][:, 0], expected_logits[:, 0])
    assert (model.config._attn_implementation, vision.config._attn_implementation) == implementation
    assert greedy(model, inputs)[1].equal(expected_logits)
