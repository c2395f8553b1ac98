"""Crops, copies and drafts as loops of a user's own make them: in open prompts, behind turns, in inference mode."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from rocketkv import RocketKVCache
from rocketkv.core.sketch import rotation_matrix
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.stats import live_bytes
from tiny import SETTINGS, SKETCH_SPLIT, SPLIT, build, greedy, left_padded, prompt

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly"),
]

METHODS = {"rocketkv": SPLIT, "rocketkv+": SKETCH_SPLIT, "rocketkv-mt": SPLIT, "rocketkv-mt+": SKETCH_SPLIT}
MODES: dict[str, Callable[[], Any]] = {"inference": torch.inference_mode, "no_grad": torch.no_grad}


def fields_of(method: str, **others: Any) -> dict[str, Any]:
    return {**SETTINGS, "token_budget": 24, "method": method, "split": METHODS[method], **others}


def logits(model: Any, ids: Tensor, cache: RocketKVCache, **inputs: Any) -> Tensor:
    found: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, **inputs).logits[:, -1]
    return found


def padded(mask: Tensor, new: int) -> dict[str, Tensor]:
    """Return mask and positions of a forward of the last `new` tokens."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]}


@pytest.mark.parametrize("kept", [60, 92, 93, 99])
@pytest.mark.parametrize("method", METHODS)
def test_an_open_prompt_that_lost_its_last_queries_says_so(method: str, kept: int) -> None:
    fields = fields_of(method)
    model, ids = build(), prompt(100)
    with rocketkv.patch(model, **fields), torch.no_grad():
        cache = RocketKVCache(model.config, **fields)
        logits(model, ids, cache)
        cache.crop(kept)
        left = max(0, fields["window_size"] - (100 - kept))
        said = f"queries of a prompt's last 8 .* {left} of them are left.*prompt_length"
        with pytest.warns(UserWarning, match=said) if left else pytest.raises(ValueError, match=said):
            logits(model, prompt(1), cache)


@pytest.mark.parametrize("method", METHODS)
def test_an_open_prompt_goes_on_after_a_crop_as_if_what_was_cropped_had_never_come(method: str) -> None:
    fields = fields_of(method, split=None, token_budget=64)
    model, ids = build(), prompt(100)
    with rocketkv.patch(model, **fields), torch.no_grad():
        cropped, straight = (RocketKVCache(model.config, **fields) for _ in range(2))
        logits(model, ids, cropped)
        cropped.crop(70)
        logits(model, ids[:, :70], straight)
        for new in (prompt(30, seed=4), *(prompt(1, seed=i) for i in range(4))):
            assert torch.allclose(logits(model, new, cropped), logits(model, new, straight), atol=1e-4)
        for one, other in zip(rocketkv_layers(cropped), rocketkv_layers(straight), strict=True):
            assert one.store.split == other.store.split
            assert one.store.phase.positions.equal(other.store.phase.positions)


@pytest.mark.parametrize("method", METHODS)
def test_generate_goes_on_with_an_open_prompt_by_its_last_token(method: str) -> None:
    fields = fields_of(method)
    model, ids = build(), prompt(100)
    with rocketkv.patch(model, **fields):
        expected = greedy(model, ids, 6)[0]
        cache = RocketKVCache(model.config, **fields)
        with torch.no_grad():
            logits(model, ids, cache)
        cache.crop(-1)
        assert greedy(model, ids, 6, cache=cache)[0].equal(expected)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
@pytest.mark.parametrize("question", [3, 5, 7])
def test_a_turn_that_evicted_nothing_can_be_taken_back(method: str, question: int) -> None:
    fields = fields_of(method)
    model = build()
    with rocketkv.patch(model, **fields), torch.no_grad():
        cache = RocketKVCache(model.config, prompt_length=100, **fields)
        logits(model, prompt(100), cache)
        cache.crop(-7)
        taken = cache.snapshot()
        cache.begin_turn()
        logits(model, prompt(question, seed=5), cache)
        logits(model, prompt(1), cache)
        cache.crop(93)
        held = [layer.store for layer in rocketkv_layers(cache)]
        positions = [store.phase.positions[:, :, : store.stored].sort(-1).values for store in held]
        cache.rollback(taken)
        for store, expected in zip((layer.store for layer in rocketkv_layers(cache)), positions, strict=True):
            assert store.phase.positions[:, :, : store.stored].sort(-1).values.equal(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decode_capacity", [None, 20])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_made_in_inference_mode_decodes_anywhere(method: str, decode_capacity: int | None, mode: str) -> None:
    fields = fields_of(method, decode_capacity=decode_capacity)
    model = build()
    with rocketkv.patch(model, **fields):
        with torch.inference_mode():
            cache = RocketKVCache(model.config, prompt_length=60, **fields)
            logits(model, prompt(60), cache)
            other = copy.deepcopy(cache)
        with MODES[mode]():
            for i in range(26):  # beyond the end of a static cache's room
                assert logits(model, prompt(1, seed=i), other).equal(logits(model, prompt(1, seed=i), cache))
            for each in (other, cache):
                each.begin_turn()
            assert logits(model, prompt(9), other).equal(logits(model, prompt(9), cache))


@pytest.mark.parametrize("method", METHODS)
def test_padded_turns_go_on_in_inference_mode_after_a_crop(method: str) -> None:
    fields, inputs = fields_of(method), left_padded([prompt(100), prompt(20)])
    model, ones = build(), torch.ones(2, 9, dtype=torch.long)
    turn = prompt(9, rows=2)
    found = []
    for mode in MODES.values():
        with rocketkv.patch(model, **fields), mode():
            mask = inputs["attention_mask"]
            cache = RocketKVCache(model.config, prompt_length=100, **fields)
            logits(model, inputs["input_ids"], cache, **padded(mask, 100))
            taken = cache.snapshot()
            cache.crop(-4)
            mask = torch.cat((mask[:, :-4], ones), 1)
            cache.begin_turn()
            found.append(logits(model, turn, cache, **padded(mask, 9)).clone())
            # The turn has not ended: back to behind its beginning, and on.
            cache.begin_turn(30)
            mask = torch.cat((mask, ones), 1)
            logits(model, turn, cache, **padded(mask, 9))
            cache.crop(-12)
            mask = torch.cat((mask[:, :-12], ones), 1)
            found.append(logits(model, turn, cache, **padded(mask, 9)).clone())
            cache.rollback(taken)
    assert found[0].equal(found[2])
    assert found[1].equal(found[3])


@pytest.mark.parametrize("change", ["reorder", "select"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_whose_longest_row_was_left_out_comes_back_from_its_file(
    method: str, change: str, tmp_path: Path
) -> None:
    fields, inputs = fields_of(method), left_padded([prompt(30), prompt(12)])
    model = build()
    with rocketkv.patch(model, **fields), torch.no_grad():
        cache = RocketKVCache(model.config, prompt_length=30, **fields)
        logits(model, inputs["input_ids"], cache, **padded(inputs["attention_mask"], 30))
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 1]))
        else:
            cache.batch_select_indices(torch.tensor([1]))
        rows = 2 if change == "reorder" else 1
        mask = inputs["attention_mask"][[1] * rows]
        rocketkv.save_cache(cache, tmp_path / "cache", model=model)
        loaded = rocketkv.load_cache(tmp_path / "cache", model)
        for i in range(20):  # over the budget of the row that is left
            mask = torch.cat((mask, mask.new_ones(rows, 1)), 1)
            new = prompt(1, rows=rows, seed=i)
            assert logits(model, new, loaded, **padded(mask, 1)).equal(logits(model, new, cache, **padded(mask, 1)))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_changes_nothing(method: str, dtype: torch.dtype) -> None:

    fields = fields_of(method, decode_capacity=20)
    model, ids = build(), prompt(100)
    with rocketkv.patch(model, **fields), torch.no_grad():
        rotation_matrix.cache_clear()
        straight = RocketKVCache(model.config, prompt_length=100, **fields)
        expected = [logits(model, new, straight) for new in (ids, *(prompt(1, seed=i) for i in range(24)))]
        rotation_matrix.cache_clear()
        with default_dtype(dtype):
            cache = RocketKVCache(model.config, prompt_length=100, **fields)
            for new, wanted in zip((ids, *(prompt(1, seed=i) for i in range(24))), expected, strict=True):
                assert logits(model, new, cache).equal(wanted)


def without_padding(model: Any) -> None:
    """Have a model never choose the padding token."""
    model.lm_head.register_forward_hook(lambda module, given, out: out.index_fill(-1, torch.tensor([0]), -1e4))


@pytest.mark.parametrize("protect", [None, ((10, 12),)])
@pytest.mark.parametrize("method", METHODS)
def test_a_patched_assistant_like_the_model_has_all_its_drafts_accepted(method: str, protect: Any) -> None:
    fields = fields_of(method, protect=protect)
    model, assistant, ids = build(), build(), prompt(100)
    for each in (model, assistant):
        without_padding(each)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    forwards: list[int] = []

    def counted(patched: bool) -> Tensor:
        with contextlib.ExitStack() as stack:
            for each in (model, assistant) if patched else ():
                stack.enter_context(rocketkv.patch(each, **fields))
            expected: Tensor = model.generate(ids, **settings)
            count: list[None] = []
            hook = model.model.register_forward_pre_hook(lambda *_: count.append(None))
            found: Tensor = model.generate(ids, assistant_model=assistant, **settings)
            hook.remove()
        forwards.append(len(count))
        assert found.equal(expected)
        return found

    counted(False)
    counted(True)
    assert forwards[1] == forwards[0]


def test_what_drafts_hold_on_to_is_counted() -> None:
    fields = fields_of("rocketkv", decode_capacity=20)
    model, ids = build(), prompt(100)
    with rocketkv.patch(model, **fields), torch.no_grad():
        cache = RocketKVCache(model.config, prompt_length=100, **fields)
        logits(model, ids, cache)
        logits(model, prompt(1), cache)
        before = cache.stats().total("other_bytes")
        for layer in rocketkv_layers(cache):
            layer.speculative = True
        logits(model, prompt(4), cache)
        rings = [layer.store.decoding.ring for layer in rocketkv_layers(cache)]
        saved = [ring.saved for ring in rings if ring is not None and ring.saved is not None]
        held = [(each.ring, each.query) for each in saved]
        assert len(held) == len(rings)
        assert cache.stats().total("other_bytes") - before == sum(live_bytes(t) for pair in held for t in pair)
