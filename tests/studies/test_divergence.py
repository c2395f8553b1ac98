"""Divergence by text and budget: forms of a method, where it is worse than the baseline, and hybrids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval_case
from rocketkv.core import residual, sketch
from rocketkv.eval.methods import Compressed
from studies import divergence
from studies.divergence import Settings, arm_of, holm, markdown, study, worse
from studies.texts import KINDS, made_texts
from tiny import build

SHORT: dict[str, Any] = {"prompt": 300, "steps": 6, "budgets": (72,), "kinds": ("prose", "dialogue")}


def test_a_method_is_worse_where_its_differences_say_so() -> None:
    rng = np.random.default_rng(1)
    reference = rng.gamma(1.0, size=64).tolist()
    assert worse([value + 0.5 for value in reference], reference) < 0.01
    assert worse([value - 0.5 for value in reference], reference) > 0.99
    noisy = [value + offset for value, offset in zip(reference, rng.normal(size=64), strict=True)]
    assert 0.01 < worse(noisy, reference) < 0.99
    # One bad stretch is one block, not many independent positions.
    stretch = [value + (1.0 if 8 <= place < 16 else 0.0) for place, value in enumerate(reference)]
    assert worse(stretch, reference) > 0.01


def test_holms_correction() -> None:
    # Holm 1979: the smallest times four, the next times three, and so on, never below one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_forms_replace_what_they_say_and_give_it_back() -> None:
    own = residual.overestimate, sketch.channel_balance
    arm = arm_of("rocketkv+:unbalanced,sketch-mass,no-residual", 64, Settings(prompt=512), 16, (0,))
    assert isinstance(arm.method, Compressed)
    assert arm.method.config.split is not None
    assert not arm.method.config.split.residual
    with arm.in_form():
        high, low = torch.tensor(3.0), torch.tensor(1.0)
        assert residual.overestimate(high, low) == -2
        assert (sketch.channel_balance(high[None], low[None], torch.zeros(1, 1, 4), 1) == 1).all()
    assert own == (residual.overestimate, sketch.channel_balance)
    for wrong in ("rocketkv:unbalanced", "rocketkv+:loud"):
        with pytest.raises(ValueError, match="names a form that there is not"):
            arm_of(wrong, 64, Settings(), 16, ())
    for settings, layers in ((Settings(), (0,)), (Settings(decode_capacity=64), ()), (Settings(errors=True), ())):
        with pytest.raises(ValueError, match="is not of the library: leave out"):
            arm_of("kvpress:KnormPress", 64, settings, 16, layers)


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_a_study_over_texts_and_layers(model: str, tmp_path: Path) -> None:
    made, tokenizer = build(model, vocab_size=eval_case.VOCABULARY), eval_case.tokenizer()
    arms = ("rocketkv", "rocketkv+", "rocketkv+:exact-chosen", "full")
    settings = Settings(**SHORT, arms=arms, errors=True)
    result = study(made, tokenizer, settings, tmp_path)
    by_arm = {(cell["text"], cell["arm"]): cell["kl"] for cell in result["cells"]}
    assert set(by_arm) == {(text, arm) for text in settings.kinds for arm in arms}
    for text in settings.kinds:
        assert max(by_arm[text, "full"]) < 1e-6
        assert min(by_arm[text, "rocketkv"]) > 1e-9
        assert len(by_arm[text, "rocketkv+"]) == settings.steps
    errors = result["errors"]["prose"]
    assert max(error for (error,) in errors["full 72"]) < 1e-5
    assert all(0 < error < 2 for (error,) in errors["rocketkv 72"])
    assert all(0 < error < 2 and 0 < rms < 9 for error, rms in errors["rocketkv+ 72"])
    # It resumes, and says the same.
    again = study(made, tokenizer, settings, tmp_path)
    assert again == result
    table = markdown({"settings": {"model": model, "baseline": "rocketkv", "prompt": 300, "steps": 6}, **result})
    assert "| `rocketkv` |" in table
    assert table.count("### t = 72") == 1
    alone = study(made, tokenizer, Settings(**SHORT, arms=("rocketkv",), by_layer=True), tmp_path)
    layers = {cell["layer"] for cell in alone["cells"]}
    assert layers == set(divergence.layer_numbers(made))


def test_texts_of_every_kind_are_the_same_every_time() -> None:
    tokenizer = eval_case.tokenizer()
    first = made_texts(tokenizer, 900, 0)
    assert [window.id for window in first] == list(KINDS)
    assert all(len(window.ids) == 900 for window in first)
    assert first == made_texts(tokenizer, 900, 0)
    assert all(one.ids != other.ids for one, other in zip(first, made_texts(tokenizer, 900, 1), strict=True))
    with pytest.raises(ValueError, match="there are no texts song"):
        made_texts(tokenizer, 900, 0, ["song"])


def test_facts_are_said_again_at_the_end() -> None:
    tokenizer = eval_case.tokenizer()
    said = tokenizer.decode(made_texts(tokenizer, 4000, 0, ["facts"])[0].ids)
    numbers = [word for word in said.split() if len(word) == 7 and word.isdecimal()]
    # The beginning is cut off, so that some facts are said at the end alone.
    assert [numbers.count(number) for number in set(numbers)].count(2) >= 4
