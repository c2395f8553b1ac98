"""Protected spans and fair shares through models: stored in every layer, read at every step, in all uses of a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import rocketkv
from chatml import CHATML, ids_of, tokenizer_of
from close import assert_near
from protection_case import RANGES, SPAN, kept_by
from rocketkv.budget import BudgetSplit
from rocketkv.core import decode as core_decode
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.chat import chat_marks
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.protection import RowMarks
from static import PADDED, PROMPT
from tiny import LARGE, SMALL, SPLIT, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly")

WORDS = "The harbour was quiet. "


@pytest.fixture
def read_slots(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What each decode step of each layer reads of its store: slots [B, Hkv, k], or None for all."""
    seen: list[Tensor | None] = []
    attend = core_decode.attend

    def recorded(
        query: Any, keys: Any, values: Any, params: Any, positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        seen.append(None if positions is None else positions.clone())
        return attend(query, keys, values, params, positions, **kwargs)

    monkeypatch.setattr(core_decode, "attend", recorded)
    return seen


def assert_protected(cache: Any, span: list[set[int]], slots: list[Tensor | None]) -> None:
    """Assert that every layer stores the protected positions of each row first, and that every step read those."""
    count = max(map(len, span))
    for layer in rocketkv_layers(cache):
        for b, own in enumerate(span):
            for g in range(layer.store.decoding.buffers.seq_lens.shape[1]):
                assert set(kept_by(layer.store, b, g)[: len(own)]) == own
    ranked = [each for each in slots if each is not None]
    assert ranked, "stage 2 chose"
    for chosen in ranked:
        for slot in range(count):
            assert (chosen == slot).any(-1).all()


@pytest.mark.integration
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv-mt"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stored_in_every_layer_and_read_at_every_step(
    family: str, method: str, read_slots: list[Tensor | None]
) -> None:
    model = build(family)
    fields = {**SMALL, "method": method}
    with rocketkv.patch(model, **fields):
        plain = greedy(model, PROMPT, 1)[2]
    with rocketkv.patch(model, **fields, protect=RANGES) as handle:
        read_slots.clear()
        *_, cache = greedy(model, PROMPT, 30)
        assert handle.stats().layers[-1].tokens_stored == 40 + 13 + 29
    assert_protected(cache, [SPAN], read_slots)
    for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(plain), strict=True):
        for g in range(2):
            assert set(kept_by(layer.store, 0, g)) >= set(kept_by(other.store, 0, g))


@pytest.mark.integration
@pytest.mark.parametrize("decode_capacity", [None, 24])
def test_a_padded_batch_is_its_rows_alone(decode_capacity: int | None, read_slots: list[Tensor | None]) -> None:
    model = build()
    with rocketkv.patch(model, **SMALL, protect=RANGES, decode_capacity=decode_capacity):
        found, logits, cache = greedy(model, PADDED, 40)
        skipped = (PADDED["attention_mask"] == 0).sum(-1).tolist()
        span = [{skip + i for i in SPAN if skip + i < 90} for skip in skipped]
        if decode_capacity is None:
            assert_protected(cache, span, read_slots)
        # Rows with fewer protected tokens than the longest have its split: alone they would have their own.
        for b in (0, 1):
            own = PADDED["input_ids"][b : b + 1, skipped[b] :]
            alone, alone_logits, _ = greedy(model, own, 40)
            assert alone.equal(found[b : b + 1])
            torch.testing.assert_close(alone_logits[0], logits[b], atol=1e-4, rtol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("told", [True, False])
def test_chunks_mark_the_same(told: bool) -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build(vocab_size=len(tokenizer))
    ids = torch.tensor([chat_ids(tokenizer, 6)])
    fields = {**SMALL, "protect": "system", "fair_shares": True}
    with rocketkv.patch(model, tokenizer=tokenizer, **fields):
        expected = hand_written(model, ids, 12)
        for chunk in (1, 7, 50):
            cache = RocketKVCache(model.config, prompt_length=ids.shape[1] if told else None, **fields)
            found = hand_written(model, ids, 12, cache=cache, chunk=chunk) if told or chunk > 1 else expected
            assert found[0].equal(expected[0])
            for layer, other in zip(rocketkv_layers(found[2]), rocketkv_layers(expected[2]), strict=True):
                assert layer.store.marks == other.store.marks
                assert layer.store.phase.positions is not None
                assert other.store.phase.positions is not None
                assert layer.store.phase.positions.equal(other.store.phase.positions)
        assert layer.store.marks == (RowMarks(*marks_of(tokenizer, ids[0].tolist())),)


def chat_ids(tokenizer: Any, repeats: int) -> list[int]:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": WORDS * repeats},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": WORDS},
    ]
    return ids_of(tokenizer, chat)


def marks_of(tokenizer: Any, ids: list[int]) -> tuple[Any, tuple[int, ...]]:
    marks = chat_marks(tokenizer)
    return marks.system(ids), marks.messages(ids)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv-mt", "snapkv"])
def test_still_protected_in_a_second_turn(method: str, read_slots: list[Tensor | None]) -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build(vocab_size=len(tokenizer))
    first = torch.tensor([chat_ids(tokenizer, 5)])
    more = "<|im_end|>\n<|im_start|>user\n" + WORDS * 4 + "<|im_end|>\n<|im_start|>assistant\n"
    later = torch.tensor([tokenizer(more, add_special_tokens=False)["input_ids"]])
    [(_, stop)], begins = marks_of(tokenizer, first[0].tolist())
    split = SPLIT if method != "snapkv" else BudgetSplit(token_budget=40, kept_tokens=40)
    fields = {**SMALL, "split": split, "method": method, "protect": "system", "fair_shares": True}
    with rocketkv.patch(model, tokenizer=tokenizer, **fields) as handle:
        tokens_, _, cache = greedy(model, first, 10)
        assert cache.layers[0].store.marks == (RowMarks(((0, stop),), begins),)
        whole = torch.cat((first, tokens_, later), dim=1)
        read_slots.clear()
        greedy(model, whole, 12, **{CACHE_ARGUMENT: cache})
        assert handle.stats().tokens_seen == whole.shape[1] + 11
    [marks] = cache.layers[0].store.marks
    assert marks.protected == ((0, stop),)
    assert marks.messages[: len(begins)] == begins
    assert [at for at in marks.messages if at >= first.shape[1]] == [
        first.shape[1] + 10 + at for at in chat_marks(tokenizer).messages(later[0].tolist())
    ]
    for layer in rocketkv_layers(cache):
        for g in range(2):
            assert kept_by(layer.store, 0, g)[:stop] == list(range(stop))
    if method != "snapkv":
        assert_protected(cache, [set(range(stop))], read_slots)


@pytest.mark.integration
def test_rows_of_a_cache_take_their_marks_along() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL, protect=RANGES):
        for change, rows in (
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
        ):
            assert_rows_go_along(model, change, rows)


def assert_rows_go_along(model: Any, change: Callable[[Any], Any], rows: list[int]) -> None:
    """Assert that a second turn of changed rows is that of the rows as they were."""
    found, _, cache = greedy(model, PADDED, 5)
    [*before] = cache.layers[0].store.marks
    change(cache)
    assert list(cache.layers[0].store.marks) == [before[row] for row in rows]
    mask = torch.cat((PADDED["attention_mask"], torch.ones(3, 5 + 9, dtype=torch.long)), dim=1)[rows]
    new = torch.cat((PADDED["input_ids"], found, prompt(9, rows=3, seed=4)), dim=1)[rows]
    greedy(model, {"input_ids": new, "attention_mask": mask}, 5, **{CACHE_ARGUMENT: cache})
    for i, row in enumerate(rows):
        skip = int((PADDED["attention_mask"][row] == 0).sum())
        span = {skip + at for at in SPAN if skip + at < 90}
        for layer in rocketkv_layers(cache):
            assert set(kept_by(layer.store, i, 0)[: len(span)]) == span


@pytest.mark.integration
def test_a_crop_of_an_open_prompt_takes_its_ids_back() -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build(vocab_size=len(tokenizer))
    ids = torch.tensor([chat_ids(tokenizer, 5)])
    fields = {**SMALL, "protect": "system", "fair_shares": True}
    with rocketkv.patch(model, tokenizer=tokenizer, **fields), torch.no_grad():
        expected = hand_written(model, ids, 8)
        cache = RocketKVCache(model.config, prompt_length=ids.shape[1], **fields)
        model(torch.cat((ids[:, :50], prompt(9)), dim=1), **{CACHE_ARGUMENT: cache}, use_cache=True)
        cache.crop(50)
        found = hand_written(model, ids[:, 50:], 8, cache=cache)
    assert found[0].equal(expected[0])
    assert cache.layers[0].store.marks == expected[2].layers[0].store.marks


@pytest.mark.integration
@pytest.mark.parametrize("decode_capacity", [None, 40])
def test_saved_and_loaded(decode_capacity: int | None, tmp_path: Path, read_slots: list[Tensor | None]) -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build(vocab_size=len(tokenizer))
    ids = torch.tensor([chat_ids(tokenizer, 5)])
    fields = {**SMALL, "protect": "system", "fair_shares": True, "decode_capacity": decode_capacity}
    path = tmp_path / "cache.safetensors"
    more = torch.cat((ids, prompt(20, seed=4)), dim=1)
    with rocketkv.patch(model, tokenizer=tokenizer, **fields):
        cache = RocketKVCache(model.config, prompt_length=ids.shape[1], **fields)
        with torch.no_grad():
            model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
        rocketkv.save_cache(cache, path, model=model, ids=ids)
        loaded = rocketkv.load_cache(path, model)
        assert loaded.layers[0].store.marks == cache.layers[0].store.marks
        assert loaded.layers[0].store.split == cache.layers[0].store.split
        expected, found = (greedy(model, more, 12, **{CACHE_ARGUMENT: each})[0] for each in (cache, loaded))
        assert found.equal(expected)
        assert loaded.layers[1].store.marks == cache.layers[1].store.marks


@pytest.mark.integration
def test_beams_keep_what_is_protected() -> None:
    model = build()
    arguments = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    with rocketkv.patch(model, **SMALL, protect=RANGES):
        out = model.generate(**PADDED, **arguments)
    for b, skip in enumerate((PADDED["attention_mask"] == 0).sum(-1).repeat_interleave(3).tolist()):
        span = {skip + i for i in SPAN if skip + i < 90}
        for layer in rocketkv_layers(out[CACHE_ARGUMENT]):
            assert set(kept_by(layer.store, b, 0)[: len(span)]) == span


@pytest.mark.integration
def test_the_kernels_give_the_same_tokens() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    model = build(num_hidden_layers=1)
    inputs = left_padded([prompt(70), prompt(31, seed=3)])
    with rocketkv.patch(model, **SMALL, protect=((3, 9),), backend="torch"):
        expected, logits, plain = greedy(model, inputs, 4)
    with rocketkv.patch(model, **SMALL, protect=((3, 9),), backend="triton"):
        found, found_logits, cache = greedy(model, inputs, 4)
    assert found.equal(expected)
    torch.testing.assert_close(found_logits, logits, atol=1e-4, rtol=1e-4)
    for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(plain), strict=True):
        stored = layer.store.stored
        assert layer.store.phase.positions is not None
        assert other.store.phase.positions is not None
        assert layer.store.phase.positions[:, :, :stored].equal(other.store.phase.positions[:, :, :stored])


@pytest.mark.integration
def test_what_mt_filters_can_be_cropped_where_the_protected_are_first() -> None:
    model = build()
    for protect, allowed in ((((0, 9),), True), (RANGES, False)):
        with rocketkv.patch(model, **SMALL, method="rocketkv-mt", protect=protect):
            *_, cache = greedy(model, PROMPT, 5)
            if not allowed:
                with pytest.raises(ValueError, match="Crop to 82 or more"):
                    cache.crop(60)
                continue
            cache.crop(60)
            for layer in rocketkv_layers(cache):
                for g in range(2):
                    kept = kept_by(layer.store, 0, g)
                    assert kept == sorted(kept)
                    assert max(kept) < 60


@pytest.mark.integration
def test_messages_that_cannot_be_found_are_refused() -> None:
    model = build()
    for fields, message in (
        ({"protect": "system"}, "protect='system' finds messages by the chat template: give patch"),
        ({"fair_shares": True}, "fair_shares=True finds messages"),
    ):
        with pytest.raises(ValueError, match=message):
            rocketkv.patch(model, **SMALL, **fields)
        with pytest.raises(ValueError, match="tokenizer has no chat template"):
            rocketkv.patch(model, tokenizer=tokenizer_of(None), **SMALL, **fields)
    cache = RocketKVCache(model.config, **SMALL, protect="system")
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match="tokenizer=tokenizer"):
        greedy(model, PROMPT, 3, **{CACHE_ARGUMENT: cache})
    tokenizer = tokenizer_of(CHATML)
    with rocketkv.patch(model, tokenizer=tokenizer, **SMALL, protect="system"):
        embeddings = model.get_input_embeddings()(PROMPT)
        with pytest.raises(ValueError, match="cannot be found in inputs_embeds"):
            model(inputs_embeds=embeddings, **{CACHE_ARGUMENT: DynamicCache(config=model.config)})
    # A tokenizer that was given beside other settings serves caches of one's own.
    model = build(vocab_size=len(tokenizer))
    ids = torch.tensor([chat_ids(tokenizer, 5)])
    with rocketkv.patch(model, tokenizer=tokenizer, **SMALL):
        cache = RocketKVCache(model.config, **SMALL, protect="system")
        greedy(model, ids, 3, **{CACHE_ARGUMENT: cache})
        assert cache.layers[0].store.marks[0].protected == marks_of(tokenizer, ids[0].tolist())[0]


@pytest.mark.integration
def test_ranges_of_embeddings_are_protected() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL, protect=RANGES):
        expected, _, cache = greedy(model, PROMPT, 6)
        out = model.generate(
            inputs_embeds=model.get_input_embeddings()(PROMPT),
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=6,
            do_sample=False,
        )
    assert out[:, -6:].equal(expected)
    assert set(kept_by(cache.layers[0].store, 0, 0)[:13]) == SPAN


@pytest.mark.integration
def test_without_marks_nothing_changes() -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        expected, logits, _ = greedy(model, PROMPT, 12)
    with rocketkv.patch(model, **SMALL, protect=((200, 300),)):  # behind the prompt
        found, found_logits, cache = greedy(model, PROMPT, 12)
    assert found.equal(expected)
    assert found_logits.equal(logits)
    assert isinstance(cache.layers[0], RocketKVLayer)
    assert cache.layers[0].store.split == SPLIT


def test_a_prompt_whose_first_tokens_are_protected_can_be_cropped() -> None:
    model = build()
    with rocketkv.patch(model, **LARGE, protect=((0, 5),)), torch.no_grad():
        cache = rocketkv.RocketKVCache(model.config, **LARGE, protect=((0, 5),), prompt_length=30)
        model(prompt(30), **{CACHE_ARGUMENT: cache})
        cache.crop(20)
        cache.begin_turn()
        found = model(prompt(3, seed=5), **{CACHE_ARGUMENT: cache}).logits
    expected = model(torch.cat((prompt(30)[:, :20], prompt(3, seed=5)), dim=1)).logits[:, -3:]
    assert_near(found, expected, 1e-5)


@pytest.mark.integration
def test_a_row_without_a_system_message_is_told() -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build(vocab_size=len(tokenizer))
    asked = torch.tensor([[5, *chat_ids(tokenizer, 5)]])  # as behind a second beginning-of-text token
    with rocketkv.patch(model, tokenizer=tokenizer, **SMALL, protect="system"):
        with pytest.warns(UserWarning, match="found no system message at the beginning of row 0: nothing"):
            greedy(model, asked, 3)
        greedy(model, torch.tensor([chat_ids(tokenizer, 5)]), 3)
