"""RocketKV-MT through models: what one may do to a cache between turns and within them, and what it holds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from chat import chat, turn
from mt_case import (
    AWAY,
    FIRST,
    LATER,
    LATER_ROWS,
    MT,
    PADDED_FAMILIES,
    ROWS,
    SECOND,
    THIRD,
    close,
    decode,
    forward,
    of,
    read,
    talked,
    turn_of,
)
from pairs import pairs
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from storages import walked
from tiny import SMALL, TRANSFORMERS, build, left_padded, prompt

SETTINGS = {"mt": MT, "away": AWAY, "static": {**MT, "decode_capacity": 40}}
# In the first prompt, an answer, the second prompt, the next answer, and the last prompt.
LENGTHS = [1, 60, 90, 97, 102, 130, 152, 155, 164, 180, 199, 205]


@pytest.mark.parametrize(("name", "told", "length"), pairs(["mt", "away"], [True, False], LENGTHS))
def test_a_turn_after_a_crop_is_as_if_nothing_had_been_there(name: str, told: bool, length: int) -> None:
    model, fields = build(), SETTINGS[name]
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


@pytest.mark.parametrize(("family", "name", "padded"), pairs(["llama", "gemma3"], SETTINGS, [False, True]))
def test_snapshots_come_back_in_any_order(family: str, name: str, padded: bool) -> None:
    model, fields, choose = build(family), SETTINGS[name], random.Random(int(padded))
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


@pytest.mark.parametrize(("family", "told", "name"), pairs(["llama", "gemma3"], [True, False], ["mt", "away"]))
def test_a_copy_goes_on_alike_and_apart(family: str, told: bool, name: str) -> None:
    model, fields = build(family), SETTINGS[name]
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


# By pages: in batches of another size keys differ in their last bits, which a sketch may round to another scale.
@pytest.mark.parametrize(
    ("history_device", "padded", "when", "operation"),
    pairs([None, "cpu"], [False, True], ["decoding", "in a prompt"], ROW_OPERATIONS),
)
def test_row_operations_between_turns(history_device: str | None, padded: bool, when: str, operation: str) -> None:
    model, fields = build(), {**MT, "history_device": history_device}
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
@pytest.mark.parametrize(("family", "name", "padded"), pairs(PADDED_FAMILIES, ["mt", "away"], [False, True]))
def test_a_saved_conversation_goes_on(family: str, name: str, padded: bool, tmp_path: Path) -> None:
    model, fields, path = build(family), SETTINGS[name], tmp_path / "cache.safetensors"
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


@pytest.mark.parametrize("method", [name for name, m in rocketkv.METHODS.items() if not m.multi_turn])
def test_a_history_device_is_for_methods_with_a_history(method: str) -> None:
    with pytest.raises(ValueError, match="history_device='cpu' is for methods that keep a history, rocketkv-mt, "):
        rocketkv.RocketKVConfig(method=method, history_device="cpu")
    with pytest.raises(TypeError, match="history_device must be the name of a device"):
        rocketkv.RocketKVConfig(method="rocketkv-mt", history_device=torch.device("cpu"))  # type: ignore[arg-type]


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
