"""The static cache: the same output as one that grows, from buffers that never move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from rocketkv.budget import BudgetSplit
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.masks import LazyMask
from rocketkv.hf.models import CACHE_ARGUMENT
from static import PADDED, PROMPT, ROOM, STATIC, inputs_of, later, own_loop, places
from tiny import LARGE, SETTINGS, SKETCH_SPLIT, SMALL, SPLIT, build, greedy

# That steps are not compiled is said, which is tested in test_compiled.py.
pytestmark = pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly")

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3"]


@pytest.mark.integration
@pytest.mark.parametrize("rows", ["one", "padded"])
@pytest.mark.parametrize(
    ("family", "split"), [*((family, SPLIT) for family in FAMILIES), ("llama", SKETCH_SPLIT), ("gemma2", SKETCH_SPLIT)]
)
def test_static_equals_dynamic(family: str, split: BudgetSplit, rows: str) -> None:
    model = build(family)
    with rocketkv.patch(model, **{**SMALL, "split": split}):
        expected, expected_logits, _ = greedy(model, inputs_of(rows))
    with rocketkv.patch(model, **{**STATIC, "split": split}):
        found, logits, cache = greedy(model, inputs_of(rows))
    assert found.equal(expected)
    assert_near(logits, expected_logits, 1e-4)
    for layer in rocketkv_layers(cache):
        assert layer.store.capacity == 40 + ROOM
        assert layer.step is not None


@pytest.mark.integration
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_equals_dynamic_for_any_group_and_dtype(dtype: torch.dtype, heads: int) -> None:
    model = build("llama", num_key_value_heads=heads).to(dtype)
    # In low precision a selection would turn what rounding changes in one layer into other tokens in the next.
    fields = SMALL if dtype == torch.float32 else {**SMALL, "split": BudgetSplit(token_budget=24, kept_tokens=30)}
    with rocketkv.patch(model, **fields):
        expected, expected_logits, _ = greedy(model, PADDED)
    with rocketkv.patch(model, **fields, decode_capacity=ROOM):
        found, logits, _ = greedy(model, PADDED)
    if dtype == torch.float32:
        assert found.equal(expected)
        assert_near(logits, expected_logits, 1e-4)
    else:
        same = (found == expected).cumprod(-1)
        assert_near(logits[:, :2], expected_logits[:, :2], 0.1)
        assert same[:, :2].all()


@pytest.mark.integration
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_a_static_cache_leaves_prompts_to_the_models_own_attention(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LazyMask] = []
    attend = RocketKVLayer.attend

    def recorded(self: RocketKVLayer, query: Tensor, mask: LazyMask, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] > 1:
            made.append(mask)
        return attend(self, query, mask, *args, **kwargs)

    monkeypatch.setattr(RocketKVLayer, "attend", recorded)
    model = build()
    rocketkv.patch(model, **STATIC)
    greedy(model, inputs_of(rows), 2)
    assert made
    assert all(mask is None or (mask.causal and mask.padded == (rows == "padded")) for mask in made)


@pytest.mark.integration
def test_buffers_never_move() -> None:
    model = build()
    seen: list[Any] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(places(kwargs[CACHE_ARGUMENT]))
        return model(*args, **kwargs)

    with rocketkv.patch(model, **STATIC):
        *_, cache = own_loop(model, PADDED, step, ROOM + 1)
    assert len(seen) == ROOM
    assert all(place == places(cache) for place in seen)
    for layer in rocketkv_layers(cache):
        assert layer.store.capacity == 40 + ROOM
        assert layer.store.stored == layer.store.capacity


@pytest.mark.integration
def test_a_short_prompt_has_as_much_room() -> None:
    model = build()
    with rocketkv.patch(model, **{**LARGE, "decode_capacity": 5}):
        *_, cache = greedy(model, PROMPT[:, :21], 6)
    assert {layer.store.capacity for layer in rocketkv_layers(cache)} == {21 + 5}


@pytest.mark.integration
def test_beams_and_sequences_stay_in_their_buffers() -> None:
    model = build()
    arguments = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    with rocketkv.patch(model, **SMALL):
        expected = model.generate(**PADDED, **arguments).sequences
    with rocketkv.patch(model, **STATIC):
        found = model.generate(**PADDED, **arguments)
    assert found.sequences.equal(expected)
    assert {layer.store.capacity for layer in rocketkv_layers(found[CACHE_ARGUMENT])} == {40 + ROOM}


@pytest.mark.integration
def test_gradients_take_the_way_of_a_cache_that_grows() -> None:
    model = build()
    rocketkv.patch(model, **STATIC)
    gradients, next_logits = [], []
    for room in (None, ROOM):
        *_, cache = own_loop(model, inputs_of("one"), model, 3, decode_capacity=room)
        model.zero_grad()
        model(torch.full((1, 1), 7), **{CACHE_ARGUMENT: cache}).logits.sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        assert cache.get_seq_length() == 90 + 3
        next_logits.append(later(model, cache, torch.full((1, 1), 8)))
    assert gradients[0].abs().max() > 0
    assert_near(gradients[1], gradients[0], 1e-4)
    assert_near(next_logits[1], next_logits[0], 1e-4)


def test_decode_capacity_is_checked() -> None:
    for wrong in ("12", 1.5, True):
        with pytest.raises(TypeError, match="decode_capacity must be an int"):
            rocketkv.RocketKVConfig(decode_capacity=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decode_capacity must be at least 1, got 0"):
        rocketkv.RocketKVConfig(decode_capacity=0)
    assert rocketkv.RocketKVConfig().decode_capacity is None
    assert rocketkv.RocketKVConfig(**SETTINGS, token_budget=24, split=SPLIT, decode_capacity=3).decode_capacity == 3
