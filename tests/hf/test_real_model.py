"""SmolLM2-135M-Instruct through the drop-in: the stock model within the budget; beyond it, needles and kept rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline
from transformers.cache_utils import Cache, DynamicCache

import rocketkv
from chat import WAYS, chat
from rocketkv.core import decode as core_decode
from rocketkv.eval.tasks.needle import found, needle_grid
from rocketkv.eval.tasks.text import prose
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.loading import load_smollm2
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import greedy, left_padded

pytestmark = pytest.mark.real_model

LARGE = {"token_budget": 1024}
SPLIT = rocketkv.BudgetSplit(token_budget=64, kept_tokens=96, page_size=2, channels=24, top_k=32)
STORY = (
    "The harbour master counted the boats each morning. {} of them lay at the north quay, the rest were out at sea. "
    "He wrote the number down, drank his coffee, and looked at the clouds above the lighthouse. "
)
QUESTION = "How many boats lay at the north quay? Answer:"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_smollm2()


def ids_of(tokenizer: Any, repeats: int) -> Tensor:
    text = "".join(STORY.format(count) for count in range(7, 7 + repeats)) + QUESTION
    return tokenizer(text, return_tensors="pt").input_ids


def close(found: Tensor, expected: Tensor) -> None:
    """Assert that logits agree to 1e-5 of the largest, which is some 30 here."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def answers(model: Any, inputs: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
    """Generate twelve tokens, whatever the model thinks of stopping."""
    return greedy(model, inputs, 12, min_new_tokens=12, **kwargs)


@pytest.mark.integration
def test_within_the_budget_the_stock_model(smollm2: Any) -> None:
    model, tokenizer = smollm2
    inputs = left_padded([ids_of(tokenizer, 3), ids_of(tokenizer, 1)])
    expected, expected_logits, _ = answers(model, inputs)
    with rocketkv.patch(model, **LARGE) as handle:
        tokens, logits, _ = answers(model, inputs)
        chunked = answers(model, inputs["input_ids"][:1], prefill_chunk_size=50)
        assert handle.stats().layers[0].tokens_stored == inputs["input_ids"].shape[1] + 11
    assert tokens.equal(expected)
    close(logits, expected_logits)
    assert chunked[0].equal(expected[:1])
    assert answers(model, inputs)[1].equal(expected_logits)


def test_a_left_padded_batch_is_its_rows_alone(smollm2: Any) -> None:
    model, tokenizer = smollm2
    rows = [ids_of(tokenizer, 5), ids_of(tokenizer, 3)]
    stock = answers(model, rows[0])[1]
    with rocketkv.patch(model, token_budget=64, split=SPLIT, decode_reserve=32):
        tokens, logits, cache = answers(model, left_padded(rows))
        assert {layer.store.stored for layer in rocketkv_layers(cache)} == {96 + 11}
        for i, row in enumerate(rows):
            alone, alone_logits, _ = answers(model, row)
            assert tokens[i : i + 1].equal(alone)
            close(logits[i : i + 1], alone_logits)
    assert (logits[:1] - stock)[:, 1:].abs().max() > 0.01


@pytest.fixture
def conversation(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return a first prompt, and those of two more turns; no answer ends by itself."""
    model, tokenizer = smollm2
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    first = left_padded([ids_of(tokenizer, 3)])
    later = ["\n\nWho wrote the number down, and what did he drink? Answer:", "\n\n" + STORY.format(99) + QUESTION]
    return first, [tokenizer(text, return_tensors="pt").input_ids for text in later]


# Every method in every way is what tiny models are for.
@pytest.mark.parametrize(("method", "ways"), [("rocketkv", WAYS[::2]), ("rocketkv-mt", WAYS[1::2])])
def test_three_turns_are_the_same_in_every_way(
    method: str, ways: list[str], smollm2: Any, conversation: tuple[dict[str, Tensor], list[Tensor]]
) -> None:
    model, _ = smollm2
    with rocketkv.patch(model, method=method, token_budget=64, split=SPLIT, decode_reserve=32):
        expected, cache = chat(model, *conversation, "all tokens", count=4)
        assert {layer.store.stored for layer in rocketkv_layers(cache)} == {96 + 3}
        for way in ways:
            for (tokens, logits), (other, other_logits) in zip(
                chat(model, *conversation, way, count=4)[0], expected, strict=True
            ):
                assert tokens.equal(other)
                close(logits, other_logits)


def test_within_the_budget_every_turn_is_the_stock_models(
    smollm2: Any, conversation: tuple[dict[str, Tensor], list[Tensor]]
) -> None:
    model, _ = smollm2
    expected, _ = chat(model, *conversation, "all tokens", count=4)
    with rocketkv.patch(model, method="rocketkv-mt", **LARGE):
        found, cache = chat(model, *conversation, "all tokens", count=4)
    for (tokens, logits), (other, other_logits) in zip(found, expected, strict=True):
        assert tokens.equal(other)
        close(logits, other_logits)
    assert cache.stats().total("history_bytes") > 0


@pytest.mark.integration
def test_chat_pipeline(smollm2: Any) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def answer() -> str:
        message: str = pipe(chat, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
        return message

    expected = answer()
    assert "Paris" in expected
    with rocketkv.patch(model, **LARGE):
        assert answer() == expected


# Needles at the beginning and in the middle; `make evidence` asks for more.
ASKED = (0, 8)  # neither within the window of the last 256 tokens
ARMS: dict[str, rocketkv.RocketKVConfig | None] = {
    "full cache": None,
    "rocketkv 256": rocketkv.RocketKVConfig(token_budget=256),
    "streaming 256": rocketkv.RocketKVConfig(method="streaming", token_budget=256),
}
TAIL = 64  # tokens of a prompt that every arm reads for itself: more than the observation window


@pytest.fixture(scope="module")
def right(smollm2: Any) -> dict[str, list[bool]]:
    """Ask each arm for the needles.

    Nothing is evicted before a prompt's end, whatever the method: what comes before the tail is read once for all.
    """
    model, tokenizer = smollm2
    prompts = needle_grid(tokenizer, tokens=2048, count=20, seed=1)
    answers: dict[str, list[bool]] = {name: [] for name in ARMS}
    for prompt in (prompts[i] for i in ASKED):
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        with rocketkv.patch(model, ARMS["rocketkv 256"]) as handle, torch.inference_mode():
            head = rocketkv.RocketKVCache(model.config, handle.config, prompt_length=ids.shape[1])
            model(ids[:, :-TAIL], **{CACHE_ARGUMENT: head}, use_cache=True, logits_to_keep=1)
        for name in answers:
            text = tokenizer.decode(continued(model, ids, head, ARMS[name]))
            answers[name].append(found(prompt.answer, text))
    return answers


def continued(model: Any, ids: Tensor, head: rocketkv.RocketKVCache, config: rocketkv.RocketKVConfig | None) -> Tensor:
    """Generate twelve tokens after a prompt that `head` holds but for its tail, by a method, or the stock model."""
    cache: Cache
    if config is None:
        cache = DynamicCache(config=model.config)
        for place, layer in enumerate(head.layers):
            cache.update(layer.keys, layer.values, place)
        return greedy(model, ids, 12, min_new_tokens=12, **{CACHE_ARGUMENT: cache})[0][0]
    cache = copy.deepcopy(head)
    for layer in rocketkv_layers(cache):
        layer.config = config
    with rocketkv.patch(model, config):
        tokens = greedy(model, ids, 12, min_new_tokens=12, **{CACHE_ARGUMENT: cache})[0][0]
    assert cache.get_seq_length() == ids.shape[1] + 11
    assert {layer.store.closed for layer in rocketkv_layers(cache)} == {True}
    return tokens


def test_the_full_cache_finds_the_needles(right: dict[str, list[bool]]) -> None:
    assert right["full cache"] == [True] * len(ASKED)


def test_rocketkv_loses_none(right: dict[str, list[bool]]) -> None:
    assert right["rocketkv 256"] == right["full cache"]


def test_a_window_alone_does_not_find_them(right: dict[str, list[bool]]) -> None:
    assert not any(right["streaming 256"])


RULES = """1. Begin every answer with the word Certainly.
2. Answer in English only.
3. Never mention the weather.
4. Keep every answer under forty words.
5. End every answer with the word Regards."""
TEXT_TOKENS, NEW_TOKENS = 2048, 24
FIELDS: dict[str, Any] = {"method": "rocketkv", "token_budget": 256}


def ruled_conversation(tokenizer: Any) -> Tensor:
    """Return [1, n] ids: five rules, some 2K tokens of other text, and a question."""
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
def test_the_rules_are_kept_and_read_and_the_answer_is_nearer(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = smollm2
    ids = ruled_conversation(tokenizer)
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
    attend = core_decode.attend

    def recorded(
        query: Any, keys: Any, values: Any, params: Any, positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        read.append(positions)
        return attend(query, keys, values, params, positions, **kwargs)

    monkeypatch.setattr(core_decode, "attend", recorded)
    with rocketkv.patch(model, tokenizer=tokenizer, **FIELDS, protect="system"):
        found = greedy_after(model, ids[:, -TAIL:], protected)
    [mark] = rocketkv_layers(protected)[0].store.marks or ()
    [(_, stop)] = mark.protected
    assert tokenizer.decode(ids[0, :stop]).endswith(f"{RULES}<|im_end|>\n<|im_start|>user\n")
    layers = rocketkv_layers(protected)
    for layer in layers:
        assert layer.store.phase.positions is not None
        assert (layer.store.phase.positions[:, :, :stop] == torch.arange(stop)).all()
    assert len(read) == len(layers) * (NEW_TOKENS - 1)
    for slots in read:
        assert slots is not None
        assert ((slots < stop).sum(-1) == stop).all(), "every step reads all of them"
    assert agreement(found, expected) >= agreement(without, expected)
