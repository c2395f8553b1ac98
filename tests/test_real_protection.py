"""SmolLM2 with the rules of a system message before a long text: protected, they are stored and read to the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import rocketkv
from rocketkv import backend
from rocketkv.cache import rocketkv_layers
from rocketkv.eval.models import load_smollm2
from rocketkv.eval.needle import prose
from rocketkv.models import CACHE_ARGUMENT

pytestmark = pytest.mark.real_model

RULES = """1. Begin every answer with the word Certainly.
2. Answer in English only.
3. Never mention the weather.
4. Keep every answer under forty words.
5. End every answer with the word Regards."""
TEXT_TOKENS, TAIL, NEW_TOKENS = 4096, 64, 24  # the tail: more than the observation window
FIELDS: dict[str, Any] = {"token_budget": 256}


def conversation(tokenizer: Any) -> Tensor:
    """Return [1, n] ids: five rules, some 4K tokens of other text, and a question."""
    ids = tokenizer(prose(3, TEXT_TOKENS // 8), verbose=False).input_ids
    while len(ids) < TEXT_TOKENS:
        ids += tokenizer(prose(len(ids), TEXT_TOKENS // 8), verbose=False).input_ids
    chat = [
        {"role": "system", "content": RULES},
        {"role": "user", "content": f"{tokenizer.decode(ids[:TEXT_TOKENS])}\n\nWhat is this text about?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids


def greedy_after(model: Any, tail: Tensor, cache: Any) -> list[int]:
    found, given = [], tail
    for _ in range(NEW_TOKENS):
        logits = model(given, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits
        given = logits[:, -1:].argmax(-1)
        found.append(int(given))
    return found


def agreement(found: list[int], expected: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))


@torch.inference_mode()
def test_the_rules_are_kept_and_read_and_the_answer_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_smollm2()
    ids = conversation(tokenizer)
    # Nothing is evicted before a prompt's end: all arms share what comes before the tail.
    with rocketkv.patch(model, tokenizer=tokenizer, **FIELDS, protect="system") as handle:
        protected = rocketkv.RocketKVCache(model.config, handle.config, prompt_length=ids.shape[1])
        model(ids[:, :-TAIL], **{CACHE_ARGUMENT: protected}, use_cache=True, logits_to_keep=1)
    full, plain = DynamicCache(config=model.config), copy.deepcopy(protected)
    for place, layer in enumerate(rocketkv_layers(plain)):
        assert layer.keys is not None
        assert layer.values is not None
        full.update(layer.keys, layer.values, place)
        layer.config, layer.store.marks, layer.prompt_ids = rocketkv.RocketKVConfig(**FIELDS), None, None
    expected = greedy_after(model, ids[:, -TAIL:], full)
    with rocketkv.patch(model, **FIELDS):
        without = greedy_after(model, ids[:, -TAIL:], plain)
    read: list[Tensor | None] = []
    attend = backend.attend

    def recorded(query: Any, keys: Any, values: Any, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        read.append(positions)
        return attend(query, keys, values, positions, **kwargs)

    monkeypatch.setattr(backend, "attend", recorded)
    with rocketkv.patch(model, tokenizer=tokenizer, **FIELDS, protect="system"):
        found = greedy_after(model, ids[:, -TAIL:], protected)
    [mark] = rocketkv_layers(protected)[0].store.marks or ()
    [(_, stop)] = mark.protected
    assert tokenizer.decode(ids[0, :stop]).endswith(f"{RULES}<|im_end|>\n<|im_start|>user\n")
    layers = rocketkv_layers(protected)
    for layer in layers:
        assert layer.store.positions is not None
        assert (layer.store.positions[:, :, :stop] == torch.arange(stop)).all()
    assert len(read) == len(layers) * (NEW_TOKENS - 1)
    for slots in read:
        assert slots is not None
        assert ((slots < stop).sum(-1) == stop).all(), "every step reads all of them"
    assert agreement(found, expected) >= agreement(without, expected)
