"""The ways to generate: each gives the stock model's output within the budget, and plain RocketKV's beyond it."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import rocketkv
from rocketkv.hf import prefill as prefill_module
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.store import KVStore
from tiny import LARGE, SMALL, build, greedy, left_padded, prompt

pytestmark = pytest.mark.integration

PROMPT = prompt(90)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
# The same few tokens again and again, so that prompt lookup finds drafts, right ones among them.
REPEATING = torch.cat([prompt(12, seed=5)] * 8, dim=1)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"num_beams": 3, "do_sample": True},
        {"guidance_scale": 1.5, "negative_prompt_ids": prompt(9, seed=8)},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_early_exit": 1},
    ],
    ids=lambda how: "-".join(how),
)
@pytest.mark.parametrize("padded", [False, True])
def test_within_the_budget_the_stock_output(how: dict[str, Any], padded: bool) -> None:
    speculative = "prompt_lookup_num_tokens" in how or "assistant_early_exit" in how
    if padded and (speculative or "guidance_scale" in how):
        inputs = left_padded([REPEATING])  # one row only, so a mask without padding
    else:
        inputs = left_padded([REPEATING, prompt(41)]) if padded else {"input_ids": REPEATING}
    model = build()

    def output() -> Tensor:
        torch.manual_seed(3)
        return model.generate(**inputs, max_new_tokens=16, **how)

    expected = output()
    with rocketkv.patch(model, **LARGE) as handle:
        assert output().equal(expected)
        assert handle.stats().total("index_bytes") >= 0
    assert output().equal(expected)


def scored(model: Any, sequence: Tensor, prompt_length: int) -> float:
    """Return the mean log-probability of a sequence's new tokens, fed one by one to a hand-written loop."""
    total, ids, cache = 0.0, sequence[None, :prompt_length], None
    with torch.no_grad():
        for token in sequence[prompt_length:]:
            out = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
            cache, ids = out.get(CACHE_ARGUMENT), token.view(1, 1)
            total += float(out.logits[0, -1].log_softmax(-1)[token])
    return total / (len(sequence) - prompt_length)


@pytest.mark.parametrize("method", ["rocketkv", "streaming", "quest"])
def test_beams_keep_to_their_own_cache(method: str) -> None:
    model = build()
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(90, 16)
    with rocketkv.patch(model, method=method, **{**SMALL, "split": split}):
        out = model.generate(
            PROMPT, max_new_tokens=20, num_beams=4, num_return_sequences=4, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        expected = [scored(model, sequence, 90) for sequence in out.sequences]
    assert len(set(map(tuple, out.sequences.tolist()))) == 4
    assert out.sequences_scores.tolist() == pytest.approx(expected, abs=1e-5)


# Where drafts come from does not depend on the method.
@pytest.mark.parametrize(
    ("family", "method", "draft"),
    [
        *product(
            ["llama", "gemma3", "gpt-oss"],
            ["rocketkv"],
            ["prompt lookup", "assistant", "patched assistant", "early exit"],
        ),
        *product(["llama"], ["snapkv", "quest", "streaming"], ["prompt lookup", "patched assistant"]),
    ],
)
def test_verify_steps_give_plain_tokens_and_evict_nothing(
    family: str, method: str, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if draft == "early exit" and family != "llama":
        family = "gemma2"  # transformers itself fails with the others
    model = build(family)
    # Nearly the model itself: most of its drafts are right, not all.
    assistant = build(family)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape) * 0.2)
    how = {
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": assistant},
        "patched assistant": {"assistant_model": assistant},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(96, 16)
    with rocketkv.patch(model, method=method, **{**SMALL, "split": split}):
        if draft == "patched assistant":
            rocketkv.patch(assistant, **SMALL)
        expected, expected_logits, plain = greedy(model, REPEATING, 24)
        evictions = []
        close_prompt = prefill_module.close_prompt_by

        def counted(store: KVStore, *args: Any, **kwargs: Any) -> None:
            evictions.append(store)
            close_prompt(store, *args, **kwargs)

        monkeypatch.setattr(prefill_module, "close_prompt_by", counted)
        forwards: list[int] = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        tokens, logits, cache = greedy(model, REPEATING, 24, **how)
    layers = rocketkv_layers(cache)
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    ours = [store for store in evictions if any(store is layer.store for layer in layers)]
    assert len(ours) == len(layers), "stage 1 runs once a layer, at the end of the prompt"
    assert max(forwards[1:]) > 1, "there was no verify step"
    for layer, other in zip(layers, rocketkv_layers(plain), strict=True):
        kept, expected_kept = (
            found.store.phase.positions[..., : found.store.stored].flatten() for found in (layer, other)
        )
        assert method == "streaming" or kept[kept < 96].equal(expected_kept[expected_kept < 96])


def test_the_handle_has_the_last_cache_to_continue_from() -> None:
    model, new = build(), prompt(12, seed=3)
    with rocketkv.patch(model, **SMALL) as handle:
        with pytest.raises(ValueError, match="there is no cache: no generate of this model has ended"):
            handle.cache  # noqa: B018  # asking is the test
        out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
        expected = out.sequences
        second = torch.cat((expected, new), dim=1)
        wanted = model.generate(second, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]}, **GREEDY)
        del out

        ids = model.generate(PROMPT, **GREEDY)
        assert ids.equal(expected)
        assert isinstance(handle.cache, rocketkv.RocketKVCache)
        taken, first = handle.cache.snapshot(), handle.cache
        assert model.generate(second, **{CACHE_ARGUMENT: handle.cache}, max_new_tokens=12, do_sample=False).equal(
            wanted
        )
        assert handle.cache is first, "the patch keeps what it kept, also when it is passed in"
        handle.cache.rollback(taken)
        assert model.generate(second, **{CACHE_ARGUMENT: handle.cache}, max_new_tokens=12, do_sample=False).equal(
            wanted
        )


def test_the_patch_keeps_one_cache_until_the_next_generation() -> None:
    def living() -> Any:
        gc.collect()
        return None if cache() is None else "alive"

    model, states = build(), list[Any]()

    class Watching(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            states.append(living())
            return scores

    with rocketkv.patch(model, **SMALL) as handle:
        model.generate(PROMPT, max_new_tokens=3)
        cache = weakref.ref(handle.cache)
        assert living() == "alive"
        model.generate(PROMPT, max_new_tokens=3, logits_processor=LogitsProcessorList([Watching()]))
        assert states == [None] * 3, "it is freed before the next prompt is read"
        cache, stats = weakref.ref(handle.cache), handle.stats()
        handle.release()
        assert living() is None
        assert handle.stats() == stats
        # A cache of the caller's, or one that the caller gets back, is not kept.
        mine = rocketkv.RocketKVCache(model.config, **SMALL)
        model.generate(PROMPT, max_new_tokens=3, **{CACHE_ARGUMENT: mine})
        assert handle.cache is mine
        cache = weakref.ref(mine)
        del mine
        assert living() is None
        cache = weakref.ref(greedy(model, PROMPT)[2])
        assert living() is None
        with pytest.raises(ValueError, match="it was yours and you have dropped it"):
            handle.cache  # noqa: B018  # asking is the test
        model.generate(PROMPT, max_new_tokens=3)
        cache = weakref.ref(handle.cache)
        copied = copy.deepcopy(model)  # a copy has ended no generation
    assert living() is None, "unpatch lets go of it"
    with pytest.raises(ValueError, match="there is no cache"):
        handle.cache  # noqa: B018  # asking is the test
    with rocketkv.patch(copied) as handle, pytest.raises(ValueError, match="no generate of this model has ended"):
        handle.stats()
