"""RocketKV-MT through models: every way of holding a conversation, and what one may do to its cache in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat import WAYS, chat, turn
from test_hf_memory import walked
from tiny import LARGE, PAD, SKETCH_SPLIT, SMALL, TRANSFORMERS, build, greedy, left_padded, prompt
from torch import Tensor

import rocketkv
from rocketkv.budget import MULTI_TURN
from rocketkv.cache import RocketKVCache, rocketkv_layers
from rocketkv.models import CACHE_ARGUMENT

# What older releases give a cache is tested over all of them in test_hf_models.py and test_hf_turns.py.
OLDER = TRANSFORMERS < (5, 0)
FAMILIES = ["llama", "gemma3"] if OLDER else ["llama", "gemma2", "gemma3", "gpt-oss"]
PADDED_FAMILIES = ["llama"] if OLDER else ["llama", "gemma3", "gpt-oss", "qwen3"]

MT: dict[str, Any] = {**SMALL, "method": "rocketkv-mt"}
# The other index on the way, for what is done to a history owes nothing to the one that a turn decodes by.
PLUS: dict[str, Any] = {**MT, "method": "rocketkv-mt+", "split": SKETCH_SPLIT}
AWAY: dict[str, Any] = {**PLUS, "history_device": "cpu"}
FIRST, SECOND, THIRD = prompt(90), prompt(50, seed=7), prompt(35, seed=8)
LATER = (SECOND, THIRD)
ROWS = [FIRST, prompt(41), prompt(15, seed=9)]
LATER_ROWS = (prompt(50, rows=3, seed=7), prompt(35, rows=3, seed=8))
SEEN = 90 + 12 + 50 + 12 + 35 + 11


def close(found: Tensor, expected: Tensor) -> None:
    """Assert that logits agree to 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    """Assert that every turn has the same tokens and, to rounding, the same logits."""
    for (tokens, logits), (other_tokens, other_logits) in zip(found, expected, strict=True):
        close(logits, other_logits)
        assert tokens.equal(other_tokens)


def forward(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits [B, n, V] of token ids [B, n], after those that the cache has seen."""
    given: dict[str, Tensor] = {}
    if mask is not None:
        seen = cache.get_seq_length()
        mask = torch.cat((mask, mask.new_ones(len(mask), seen + ids.shape[1])), dim=1)[:, : seen + ids.shape[1]]
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]}
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **given).logits
    return logits


def decode(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.cat([forward(model, cache, token, mask) for token in ids.split(1, dim=1)], dim=1)


def turn_of(model: Any, cache: Any, ids: Tensor, count: int = 8, mask: Tensor | None = None) -> Tensor:
    """Return the logits of another prompt, and of greedy tokens after it."""
    logits = [forward(model, cache, ids, mask)]
    for _ in range(count):
        logits.append(forward(model, cache, logits[-1][:, -1:].argmax(-1), mask))
    return torch.cat(logits, dim=1)


def read(model: Any, context: dict[str, Tensor], told: bool = True, **fields: Any) -> RocketKVCache:
    """Return a cache that has seen a first prompt."""
    length = context["input_ids"].shape[1]
    cache = RocketKVCache(model.config, prompt_length=length if told else None, **fields)
    forward(model, cache, context["input_ids"], context["attention_mask"])
    return cache


def talked(model: Any, told: bool = True, **fields: Any) -> RocketKVCache:
    """Return a cache after three turns, of 90, 50 and 35 tokens, with 12 decoded after each."""
    cache = read(model, of(FIRST), told, **fields)
    for number, new in enumerate((None, *LATER)):
        if new is not None:
            forward(model, cache, new)
        decode(model, cache, prompt(12, seed=30 + number))
    return cache


def conversation(model: Any, padded: bool, way: str, **fields: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Hold three turns in one way with a model patched with `fields`; return what `chat` does."""
    first, later = (left_padded(ROWS), LATER_ROWS) if padded else (of(FIRST), LATER)
    told = way == "loop in chunks" and padded  # its first chunk has rows of nothing but padding
    own = RocketKVCache(model.config, prompt_length=90, **fields) if told else None
    return chat(model, first, later, way, cache=own)


@pytest.mark.integration
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [SMALL, MT, AWAY], ids=["rocketkv", "mt", "away"])
def test_three_turns_are_the_same_in_every_way(fields: dict[str, Any], family: str, padded: bool) -> None:
    model = build(family)
    with rocketkv.patch(model, **fields):
        expected, cache = conversation(model, padded, "all tokens")
        assert cache.get_seq_length() == SEEN
        for way in WAYS:
            found, other = conversation(model, padded, way, **fields)
            same(found, expected)
            assert other.get_seq_length() == SEEN
            for layer, its in zip(rocketkv_layers(cache), rocketkv_layers(other), strict=True):
                stored = layer.store.stored
                assert stored == its.store.stored
                assert layer.store.positions[..., :stored].equal(its.store.positions[..., :stored])


@pytest.mark.integration
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_budget_every_turn_is_the_stock_models(family: str, padded: bool) -> None:
    model = build(family)
    first, later = (left_padded(ROWS), LATER_ROWS) if padded else (of(FIRST), LATER)
    expected, _ = chat(model, first, later, "all tokens")
    fields = {**LARGE, "method": "rocketkv-mt"}
    with rocketkv.patch(model, **fields):
        for way in ("all tokens", *WAYS):
            same(conversation(model, padded, way, **fields)[0], expected)
        # No cache is kept at all: each turn reads the whole conversation again.
        ids, mask = first["input_ids"], first["attention_mask"]
        for (tokens, logits), new in zip(expected, (*later, None), strict=True):
            found = turn(model, ids, mask, None, "all tokens")
            close(found[1], logits)
            assert found[0].equal(tokens)
            if new is not None:
                given = torch.cat((tokens, new), dim=1)
                ids, mask = torch.cat((ids, given), dim=1), torch.cat((mask, torch.ones_like(given)), dim=1)


@pytest.mark.integration
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_rows_of_a_padded_batch_are_their_single_runs(family: str, fields: dict[str, Any], heads: int) -> None:
    model = build(family, num_key_value_heads=heads)
    with rocketkv.patch(model, **fields):
        answers, cache = chat(model, left_padded(ROWS), LATER_ROWS, "all tokens")
        for i, row in enumerate(ROWS):
            alone, alone_cache = chat(model, of(row), [new[i : i + 1] for new in LATER_ROWS], "all tokens")
            same([(tokens[i : i + 1], logits[i : i + 1]) for tokens, logits in answers], alone)
            for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(alone_cache), strict=True):
                for head, other_head in zip(layer.store.positions[i], other.store.positions[0], strict=True):
                    assert (head[head >= 0] - 90 + row.shape[1]).equal(other_head[other_head >= 0])


@pytest.mark.integration
def test_a_later_turn_sees_what_an_earlier_one_left_out() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        cache = talked(model, **MT)
        for layer in rocketkv_layers(cache):
            before = set(layer.store.positions[0, 0].tolist())
            assert len(before - {-1}) == 40 + 12
            taken = cache.snapshot()
            forward(model, cache, prompt(20, seed=50))
            decode(model, cache, prompt(1))
            after = set(layer.store.positions[0, 0].tolist())
            assert min(after - {-1} - before) < 90 + 12 + 50 + 12 + 35
            cache.rollback(taken)


@pytest.mark.integration
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_prompt_of_one_token_begins_a_turn_when_told(fields: dict[str, Any]) -> None:
    model, one = build(), prompt(1, seed=60)
    with rocketkv.patch(model, **fields):
        cache = talked(model, **fields)
        taken = cache.snapshot()
        decoded = forward(model, cache, one)
        cache.rollback(taken)
        # The same token as the first of a longer prompt: it attends to all there is.
        dense = forward(model, cache, torch.cat((one, SECOND), dim=1))[:, :1]
        found = []
        for length in (None, 1):
            cache.rollback(taken)
            cache.begin_turn(length)
            found.append(turn_of(model, cache, one, 12))
            for layer in rocketkv_layers(cache):
                assert layer.store.stored == 40 + 12
                assert layer.store._prompt_end == SEEN + 2
        cache.rollback(taken)
        cache.begin_turn()
        ids = torch.cat((prompt(SEEN + 1, seed=70), one), dim=1)  # what the cache has seen is not read again
        found.append(greedy(model, of(ids), 13, **{CACHE_ARGUMENT: cache})[1])
    close(found[0][:, :1], dense)
    assert (found[0][:, :1] - decoded).abs().max() > 0.01
    assert found[1].equal(found[0])
    close(found[2], found[0])


@pytest.mark.integration
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_turn_in_chunks_of_one_token_when_its_length_is_told(fields: dict[str, Any]) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        cache = talked(model, **fields)
        whole = copy.deepcopy(cache)
        expected = turn_of(model, whole, THIRD)
        cache.begin_turn(35)
        found = [forward(model, cache, part) for part in THIRD.split([1, 1, 20, 12, 1], dim=1)]
        found.append(decode(model, cache, expected[:, 34:-1].argmax(-1)))
    close(torch.cat(found, dim=1), expected)


@pytest.mark.integration
@pytest.mark.parametrize("draft", ["prompt lookup", "assistant", "early exit"])
# By pages: a draft's forward rounds otherwise than one token's, by which a sketch's scale may be another 16-bit number.
@pytest.mark.parametrize("fields", [MT, {**MT, "history_device": "cpu"}], ids=["mt", "away"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafts_are_no_turn_and_leave_nothing_behind(family: str, fields: dict[str, Any], draft: str) -> None:
    model, assistant = build(family), build(family)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape) * 0.2)
    how: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": assistant},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    first, second = torch.cat([prompt(12, seed=5)] * 8, dim=1), torch.cat([prompt(9, seed=6)] * 4, dim=1)
    with rocketkv.patch(model, **fields):
        (expected, later), plain = chat(model, of(first), [second], "all tokens", count=24)
        tokens, logits, cache = greedy(model, first, 24, **how)
        assert tokens.equal(expected[0])
        close(logits, expected[1])
        # Assisted decoding of transformers itself takes no cache of an earlier turn: it reads everything again onto it.
        ids = torch.cat((first, tokens, second), dim=1)
        tokens, logits, cache = turn(model, ids, torch.ones_like(ids), cache, "all tokens", 24)
        assert tokens.equal(later[0])
        close(logits, later[1])
        assert cache.get_seq_length() == plain.get_seq_length() == 96 + 24 + 36 + 23


# In the first prompt, an answer, the second prompt, the next answer, and the last prompt.
@pytest.mark.parametrize("length", [1, 60, 90, 97, 102, 130, 152, 155, 164, 180, 199, 205])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_turn_after_a_crop_is_as_if_nothing_had_been_there(fields: dict[str, Any], told: bool, length: int) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        cache = talked(model, told, **fields)
        cache.crop(length if TRANSFORMERS < (5, 16) else length - cache.get_seq_length())
        assert cache.get_seq_length() == length
        straight = RocketKVCache(model.config, **fields)
        left = length
        for number, new in enumerate((FIRST, *LATER)):
            if left:
                forward(model, straight, new[:, :left])
                left = max(0, left - new.shape[1])
            if left:
                decode(model, straight, prompt(12, seed=30 + number)[:, :left])
                left = max(0, left - 12)
        new = prompt(21, seed=51)
        for other in (cache, straight):
            other.begin_turn()
        close(turn_of(model, cache, new), turn_of(model, straight, new))
        # And once more, over what the crop has left and what came after it.
        close(turn_of(model, cache, THIRD), turn_of(model, straight, THIRD))


@pytest.mark.integration
@pytest.mark.parametrize("removed", [5, 35, 60, 150])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_a_crop_within_an_open_prompt(fields: dict[str, Any], removed: int) -> None:
    """A prompt of which nobody has said where it ends is open until a token is decoded."""
    model, new = build(), prompt(21, seed=51)
    with rocketkv.patch(model, **fields):
        cache = talked(model, **fields)
        taken = cache.snapshot()
        expected = turn_of(model, copy.deepcopy(cache), new)
        forward(model, cache, SECOND)
        length = cache.get_seq_length() - removed
        cropped = copy.deepcopy(cache)
        for each in (cache, cropped):
            each.crop(length if TRANSFORMERS < (5, 16) else -removed)
            assert each.get_seq_length() == length
        found = turn_of(model, cache, THIRD)
        assert found.equal(turn_of(model, cropped, THIRD))
        straight = talked(model, **fields)
        if removed < 50:
            forward(model, straight, SECOND[:, : 50 - removed])
        else:
            straight.crop(length if TRANSFORMERS < (5, 16) else 50 - removed)
            straight.begin_turn()
        close(found, turn_of(model, straight, THIRD))
        # What was cropped is there for the snapshot from before.
        cache.rollback(taken)
        assert turn_of(model, cache, new).equal(expected)


Step = tuple[str, Tensor]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [MT, AWAY, {**MT, "decode_capacity": 40}], ids=["mt", "away", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_snapshots_come_back_in_any_order(family: str, fields: dict[str, Any], padded: bool) -> None:
    model, choose = build(family), random.Random(int(padded))
    rows = 3 if padded else 1
    context = left_padded(ROWS) if padded else of(FIRST)
    mask = context["attention_mask"]

    def take(cache: Any, step: Step) -> Tensor:
        kind, ids = step
        if kind == "crop":
            length = int(ids)
            cache.crop(length if TRANSFORMERS < (5, 16) else length - cache.get_seq_length())
            cache.begin_turn()  # from here on a straight run would have another filter
            return forward(model, cache, prompt(4, rows=rows, seed=9), mask)
        if kind == "turn":
            cache.begin_turn(ids.shape[1])
        return (decode if kind == "decode" else forward)(model, cache, ids, mask)

    with rocketkv.patch(model, **fields):
        cache = read(model, context, **fields)
        taken: list[tuple[Any, list[Step]]] = [(cache.snapshot(), [])]
        path: list[Step] = []
        for number in range(14):
            kinds = ["decode", "turn", "chunk"]
            if family == "llama" and cache.get_seq_length() > 91:
                kinds.append("crop")
            kind = choose.choice(kinds)
            length = choose.randint(91, cache.get_seq_length() - 1) if kind == "crop" else choose.randint(2, 12)
            ids = torch.tensor(length) if kind == "crop" else prompt(length, rows=rows, seed=100 + number)
            path = [*path, (kind, ids)]
            take(cache, path[-1])
            taken.append((cache.snapshot(), path))
            if choose.random() < 0.7:
                back, path = choose.choice(taken)
                cache.rollback(back)
        for back, path in choose.sample(taken, 6):
            cache.rollback(back)
            straight = read(model, context, **fields)
            for step in path:
                take(straight, step)
            assert cache.get_seq_length() == straight.get_seq_length()
            for probe in (("decode", prompt(3, rows=rows, seed=80)), ("turn", prompt(9, rows=rows, seed=81)),
                          ("decode", prompt(3, rows=rows, seed=82))):  # fmt: skip
                assert take(cache, probe).equal(take(straight, probe))


@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_copy_goes_on_alike_and_apart(family: str, told: bool, fields: dict[str, Any]) -> None:
    model = build(family)
    with rocketkv.patch(model, **fields):
        caches = [talked(model, told, **fields)]
        forward(model, caches[0], prompt(7, seed=5))  # in the middle of a prompt, too
        caches.append(copy.deepcopy(caches[0]))
        turn_of(model, copy.deepcopy(caches[0]), prompt(30, seed=91))
        expected = talked(model, told, **fields)
        forward(model, expected, prompt(7, seed=5))
        logits = torch.cat((turn_of(model, expected, THIRD), turn_of(model, expected, SECOND)), dim=1)
        for cache in caches:
            assert torch.cat((turn_of(model, cache, THIRD), turn_of(model, cache, SECOND)), dim=1).equal(logits)


ROW_OPERATIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
@pytest.mark.parametrize("when", ["decoding", "in a prompt"])
@pytest.mark.parametrize("padded", [False, True])
# In batches of another size keys differ in their last bits, which a sketch may round to another scale.
@pytest.mark.parametrize("fields", [MT, {**MT, "history_device": "cpu"}], ids=["mt", "away"])
def test_row_operations_between_turns(fields: dict[str, Any], padded: bool, when: str, operation: str) -> None:
    model = build()
    operate, order = ROW_OPERATIONS[operation]
    context = left_padded(ROWS) if padded else of(prompt(90, rows=3))
    mask = context["attention_mask"]
    tokens, second = prompt(15, rows=3, seed=11), prompt(20, rows=3, seed=12)
    with rocketkv.patch(model, **fields):
        found = []
        for rows in (range(3), order):
            cache = read(model, context, **fields)
            decode(model, cache, tokens, mask)
            if when == "in a prompt":
                forward(model, cache, prompt(9, rows=3, seed=13), mask)
            if rows is order:
                operate(cache)
            own = [tensor[list(rows)] for tensor in (second, tokens, mask)]
            steps = [forward(model, cache, own[0], own[2]), decode(model, cache, own[1], own[2]),
                     forward(model, cache, own[0], own[2]), decode(model, cache, own[1], own[2])]  # fmt: skip
            found.append(torch.cat(steps, dim=1))
    close(found[1], found[0][order])


@pytest.mark.integration
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_beams_of_a_later_turn(fields: dict[str, Any]) -> None:
    model = build()
    how: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 15}
    how |= {"return_dict_in_generate": True, "output_scores": True}
    with rocketkv.patch(model, **fields):
        out = model.generate(FIRST, **how)
        best = out.sequences
        cache = out.get(CACHE_ARGUMENT)
        # The cache has a row a beam; a second prompt follows each.
        new = prompt(30, rows=4, seed=12)
        assert len(set(map(tuple, best.tolist()))) == 4
        found = turn_of(model, cache, new)
        history = rocketkv_layers(cache)[0].history
        assert history.seen == 90 + 14 + 30
        # Which beam a row is, its keys tell: replayed alone, it gives that row's logits.
        matched = set()
        for beam in best[:, 90:104]:
            alone = read(model, of(FIRST), **fields)
            decode(model, alone, beam[None])
            taken = alone.snapshot()
            turn_of(model, alone, new[:1])
            keys, others = (rocketkv_layers(each)[1].history.keys[:, :, :104] for each in (alone, cache))
            rows = [row for row in range(4) if torch.allclose(keys[0], others[row], atol=1e-5)]
            for row in rows:
                alone.rollback(taken)
                close(found[row : row + 1], turn_of(model, alone, new[row : row + 1]))
            matched.update(rows)
    assert matched


@pytest.mark.integration
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_a_saved_conversation_goes_on(family: str, fields: dict[str, Any], padded: bool, tmp_path: Path) -> None:
    model, path = build(family), tmp_path / "cache.safetensors"
    first, later = (left_padded(ROWS), LATER_ROWS) if padded else (of(FIRST), LATER)
    with rocketkv.patch(model, **fields):
        expected, _ = chat(model, first, later, "all tokens")
        ids, mask = first["input_ids"], first["attention_mask"]
        answers, cache = chat(model, first, [], "all tokens")
        for new in later:
            given = torch.cat((answers[-1][0], new), dim=1)
            ids, mask = torch.cat((ids, given), dim=1), torch.cat((mask, torch.ones_like(given)), dim=1)
            rocketkv.save_cache(cache, path, model=model, ids=ids, attention_mask=mask)
            stats = cache.stats()
            cache = rocketkv.load_cache(path, model)
            assert cache.stats().total("history_bytes") <= stats.total("history_bytes")
            saved = rocketkv.load_inputs(path)
            assert saved["input_ids"].equal(ids)
            tokens, logits, cache = turn(model, saved["input_ids"], saved["attention_mask"], cache, "all tokens")
            answers.append((tokens, logits))
        for (tokens, logits), (other, other_logits) in zip(answers, expected, strict=True):
            assert tokens.equal(other)
            assert logits.equal(other_logits)
        other_fields = {name: value for name, value in fields.items() if name != "history_device"}
    differs = pytest.raises(ValueError, match=r"settings\.(method|history_device) is ")
    with rocketkv.patch(model, **{**other_fields, "method": "rocketkv"}), differs:
        rocketkv.load_cache(path, model)


@pytest.mark.integration
def test_decoding_goes_on_from_a_saved_turn(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "cache"
    with rocketkv.patch(model, **MT):
        cache = talked(model, **MT)
        rocketkv.save_cache(cache, path, model=model)
        loaded = rocketkv.load_cache(path, model)
        assert loaded.stats().total("index_bytes") == cache.stats().total("index_bytes")
        late = prompt(40, seed=3)  # beyond the room that there is
        assert decode(model, loaded, late).equal(decode(model, cache, late))
        assert turn_of(model, loaded, SECOND).equal(turn_of(model, cache, SECOND))


@pytest.mark.parametrize("padded", [False, True])
def test_bytes_beside_the_model_are_those_of_plain_rocketkv(padded: bool) -> None:
    model = build("gemma3")
    context = left_padded(ROWS) if padded else of(FIRST)
    caches = {}
    for name, fields in (("plain", SMALL), ("mt", MT), ("away", {**MT, "history_device": "cpu"})):
        with rocketkv.patch(model, **fields):
            caches[name] = read(model, context, **fields)
    stats = {name: cache.stats() for name, cache in caches.items()}
    plain, away = stats["plain"], stats["away"]
    history = away.total("history_bytes")
    assert away.total_bytes - history <= plain.total_bytes
    assert away.total("index_bytes") == plain.total("index_bytes") > 0
    for name in ("mt", "away"):
        # Two layers of keys and values, and where there is padding the positions.
        rows = 3 if padded else 1
        expected = 2 * (2 * rows * 2 * 90 * 16 * 4) + 2 * (rows * 90 * 4 if padded else 0)
        assert stats[name].total("history_bytes") == expected
        assert stats[name].total_bytes == walked(caches[name])
    assert plain.total("history_bytes") == 0
    assert plain.total_bytes == walked(caches["plain"])
    assert {layer.history_device for layer in away.layers} == {None, "cpu"}
    assert away.bytes_by_device() == {"cpu": away.total_bytes}
    assert away.to_dict()["history_bytes"] == history


@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_nothing_lives_twice_through_the_turns(fields: dict[str, Any]) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        cache = read(model, of(FIRST), **fields)
        for number in range(6):
            decode(model, cache, prompt(12, seed=number))
            assert cache.stats().total_bytes == walked(cache)
            forward(model, cache, prompt(30, seed=number))
            assert cache.stats().total_bytes == walked(cache)
            decode(model, cache, prompt(1, seed=number))
        seen = cache.get_seq_length()
        assert seen == 90 + 6 * 43
        for layer in cache.stats().layers:
            whole = 2 * 2 * seen * 16 * 4
            assert whole <= layer.history_bytes + 2 * 2 * 13 * 16 * 4
            assert layer.history_bytes <= 1.6 * whole


@pytest.mark.parametrize("method", sorted(rocketkv.METHODS.keys() - MULTI_TURN))
def test_a_history_device_is_for_methods_with_a_history(method: str) -> None:
    with pytest.raises(ValueError, match="history_device='cpu' is for methods that keep a history, rocketkv-mt, "):
        rocketkv.RocketKVConfig(method=method, history_device="cpu")
    with pytest.raises(TypeError, match="history_device must be the name of a device"):
        rocketkv.RocketKVConfig(method="rocketkv-mt", history_device=torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [MT, AWAY], ids=["mt", "away"])
def test_static_caches_hold_the_same_conversation(fields: dict[str, Any], padded: bool) -> None:
    model = build()
    with rocketkv.patch(model, **fields):
        expected, _ = conversation(model, padded, "all tokens")
    static = {**fields, "decode_capacity": 16}
    with rocketkv.patch(model, **static):
        for way in ("all tokens", *WAYS):
            found, cache = conversation(model, padded, way, **static)
            assert all(layer.step is not None for layer in rocketkv_layers(cache))
            same(found, expected)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_sixteen_bits_away_is_the_same(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    with rocketkv.patch(model, **PLUS):
        expected, _ = chat(model, of(FIRST), LATER, "all tokens")
    with rocketkv.patch(model, **AWAY):
        found, cache = chat(model, of(FIRST), LATER, "all tokens")
    for (tokens, logits), (other, other_logits) in zip(found, expected, strict=True):
        assert tokens.equal(other)
        assert logits.equal(other_logits)
    for layer in rocketkv_layers(cache):
        assert layer.store.keys.dtype == layer.history.keys.dtype == torch.bfloat16


def test_a_reset_forgets_the_history() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        cache = talked(model, **MT)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().total_bytes == 0
        fresh = RocketKVCache(model.config, **MT)
        for new in (SECOND, THIRD):
            assert turn_of(model, cache, new).equal(turn_of(model, fresh, new))


@pytest.mark.integration
def test_generate_again_goes_on_where_it_stopped() -> None:
    model = build()
    with rocketkv.patch(model, **MT):
        expected, expected_logits, _ = greedy(model, FIRST, 24)
        tokens, _, cache = greedy(model, FIRST, 10)
        found, logits, _ = greedy(model, torch.cat((FIRST, tokens), dim=1), 14, **{CACHE_ARGUMENT: cache})
    assert found.equal(expected[:, 10:])
    close(logits, expected_logits[:, 10:])


@pytest.mark.integration
def test_padding_of_a_first_prompt_is_never_seen_in_a_later_turn() -> None:
    """What a padded slot holds changes nothing, in the filter and in dense attention over the history alike."""
    model = build()
    context = left_padded(ROWS)
    mask = context["attention_mask"]
    spoilt = {**context, "input_ids": torch.where(mask == 0, 17, context["input_ids"])}
    assert (context["input_ids"] == PAD).any()
    with rocketkv.patch(model, **MT):
        outs = []
        for each in (context, spoilt):
            cache = read(model, each, **MT)
            outs.append([turn_of(model, cache, new, mask=mask) for new in LATER_ROWS])
    for found, expected in zip(*outs, strict=True):
        close(found, expected)
