"""What stands around a model: pipelines, streamers, PEFT, accelerate, and inputs that are not token ids."""

from __future__ import annotations

import threading
from typing import Any

import accelerate
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

import rocketkv
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import LARGE, SMALL, VOCABULARY, build, greedy, left_padded, prompt

pytestmark = pytest.mark.integration

PROMPT = prompt(90)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose words are w3, w4, ... of the tiny vocabulary."""
    names = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")


def text(ids: Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.flatten().tolist())


def words(ids: Tensor) -> str:
    """Return what the tokenizer makes of ids."""
    return tokenizer().decode(ids.flatten(), skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(batch_size: int) -> None:
    model = build()
    texts = [text(PROMPT), text(prompt(60, seed=2)), text(prompt(31, seed=4))]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")

    def run() -> list[str]:
        outputs = pipe(texts, max_new_tokens=12, do_sample=False, return_full_text=False, batch_size=batch_size)
        return [output[0]["generated_text"].strip() for output in outputs]

    stock = run()
    with rocketkv.patch(model, **LARGE) as handle:
        assert run() == stock
        rocketkv.patch(model, **SMALL)
        compressed = run()
        assert compressed == [words(greedy(model, tokenizer()(t, return_tensors="pt").input_ids)[0]) for t in texts]
        assert compressed[0] != stock[0]
        assert handle.stats().tokens_seen > 0
    assert run() == stock


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.received.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_streamers() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL) as handle:
        expected = greedy(model, PROMPT)[0][0]
        recorder = Recorder()
        model.generate(PROMPT, max_new_tokens=12, do_sample=False, streamer=recorder)
        assert recorder.ended
        assert torch.cat(recorder.received).equal(torch.cat((PROMPT[0], expected)))
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True)
        given = {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=given)
        thread.start()
        streamed = "".join(streamer).split()
        thread.join()
        assert streamed == words(expected).split()
        assert handle.stats().tokens_seen == handle.cache.get_seq_length() == 90 + 11


def test_input_embeddings() -> None:
    model = build()
    rows = [PROMPT, prompt(60, seed=2)]
    padded = left_padded(rows)
    embedded = {"inputs_embeds": model.get_input_embeddings()(padded["input_ids"]).detach()}
    with rocketkv.patch(model, **SMALL):
        expected, expected_logits, cache = greedy(model, padded)
        tokens, logits, embedded_cache = greedy(model, {**embedded, "attention_mask": padded["attention_mask"]})
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    for layer, other in zip(rocketkv_layers(embedded_cache), rocketkv_layers(cache), strict=True):
        assert layer.store.phase.positions.equal(other.store.phase.positions)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_cache_nothing_is_compressed(family: str, padded: bool) -> None:
    model = build(family)
    inputs = left_padded([PROMPT, prompt(60, seed=2)]) if padded else PROMPT
    expected, expected_logits, _ = greedy(model, inputs, use_cache=False)
    with rocketkv.patch(model, **SMALL) as handle:
        tokens, logits, cache = greedy(model, inputs, use_cache=False)
        assert cache is None
        with pytest.raises(ValueError, match="the last generate of this model had no RocketKVCache"):
            handle.stats()
        with torch.no_grad():
            assert model(PROMPT, use_cache=False).get(CACHE_ARGUMENT) is None
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("inner", [False, True])
def test_peft_model(inner: bool) -> None:
    def lora() -> Any:
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        return wrapped.eval()

    wrapped, merged = lora(), lora().merge_and_unload()
    stock = greedy(wrapped, PROMPT)
    with rocketkv.patch(merged, **SMALL):
        expected, expected_logits, _ = greedy(merged, PROMPT)
    with rocketkv.patch(wrapped.base_model.model if inner else wrapped, **SMALL) as handle:
        tokens, logits, _ = greedy(wrapped, PROMPT)
        assert handle.stats().layers[0].tokens_stored < 90
        with wrapped.disable_adapter():
            plain = greedy(wrapped, PROMPT)[0]
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert not plain.equal(tokens)
    assert greedy(wrapped, PROMPT)[1].equal(stock[1])


# Transformers 4 says so of every offloaded model.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type different")
@pytest.mark.parametrize("offloaded", [False, True])
def test_accelerate_hooks(offloaded: bool) -> None:
    expected = build()
    with rocketkv.patch(expected, **SMALL):
        tokens, logits, _ = greedy(expected, PROMPT)
    model = build()
    if offloaded:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    stock = greedy(model, PROMPT)
    with rocketkv.patch(model, **SMALL) as handle:
        found, found_logits, _ = greedy(model, PROMPT)
        assert handle.stats().layers[0].tokens_stored < 90
    assert found.equal(tokens)
    assert found_logits.equal(logits)
    assert greedy(model, PROMPT)[1].equal(stock[1])
