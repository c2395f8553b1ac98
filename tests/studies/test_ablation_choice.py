"""The ablation's arms that choose otherwise: the library's where they change nothing, and what they read."""

from __future__ import annotations

import functools
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from ablation_case import CASE, PROMPT, captured, step_at
from studies.ablation import choice as ablation_choice
from studies.ablation import fit as ablation_fit
from studies.ablation import run as ablation_run
from studies.ablation import steps as ablation_steps
from studies.ablation.arms import BY_NAME
from studies.ablation.capture import Layer
from studies.ablation.choice import CostThreshold, best_of_heads, fitted_threshold
from studies.ablation.fit import Arm, fitted_split
from studies.ablation.run import ArmLayer
from tiny import build


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return captured(build())


def steps_of(layers: list[Layer], arm: Arm, count: int) -> tuple[ArmLayer, Tensor]:
    """Return a layer after its arm's first steps at `rocketkv+`'s own split, and their outputs [steps, B, H, Dv]."""
    layer = layers[0]
    made = ArmLayer(arm, fitted_split(BY_NAME["rocketkv+"], CASE), layer, PROMPT)
    return made, torch.stack([made.step_of(*step_at(layer, step), layer.params) for step in range(count)])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shared-k", {"least": 1}),
        ("top-p", {}),  # no threshold yet
        ("least-weight", {}),
        ("reuse-2", {"period": 1}),
        ("coarse", {"share": 1}),
        ("planes", {"share": 1}),
        ("value-norms-select", {}),
        ("adakv", {"least": 1}),
    ],
)
def test_choices_are_the_librarys_where_they_change_nothing(
    layers: list[Layer], name: str, changes: dict[str, Any]
) -> None:
    arm, field = BY_NAME[f"rocketkv+:{name}"], "storage" if name == "adakv" else "step"
    changed = replace(arm, **{field: functools.partial(getattr(arm, field), **changes)})
    # Values of one length rank as the weights do.
    even = [replace(layers[0], value=layers[0].value / layers[0].value.norm(dim=-1, keepdim=True))]
    own = steps_of(even, BY_NAME["rocketkv+:kernel-13"], 3)[1]
    torch.testing.assert_close(steps_of(even, changed, 3)[1], own, atol=1e-4, rtol=0)


def test_heads_that_share_take_the_best_of_all_and_some_of_their_own() -> None:
    weight = torch.tensor([[[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.1, 0.0, 0.05, 0, 0, 0, 0, 0.0]]])
    assert best_of_heads(weight, 4, 0.25)[0].int().tolist() == [[1] * 7 + [0], [1] + [0] * 7]
    assert best_of_heads(weight, 4, 0.5)[0].int().tolist() == [[1] * 6 + [0] * 2, [1, 0, 1] + [0] * 5]


@pytest.mark.parametrize("name", ["top-p", "least-weight", "planes-least-weight", "all"])
def test_heads_that_take_what_they_need_read_as_much_on_average(layers: list[Layer], name: str) -> None:
    split = fitted_split(BY_NAME["rocketkv+:kernel-13"], CASE)
    made = [ArmLayer(BY_NAME[f"rocketkv+:{name}"], split, layer, PROMPT) for layer in layers]
    assert ablation_run.fit_threshold(made, layers, PROMPT) is not None
    plain = [ArmLayer(BY_NAME["rocketkv+:kernel-13"], split, layer, PROMPT) for layer in layers]
    for own, layer in zip([*made, *plain], [*layers, *layers], strict=True):
        ablation_run.replay(own, layer, PROMPT)
    read = [[total / 64 for own in arms for total in own.read] for arms in (made, plain)]  # in tokens of 4 D bytes
    assert max(read[0]) - min(read[0]) > 1
    assert fmean(read[0]) == pytest.approx(fmean(read[1]), abs=1)


def test_cost_threshold_is_the_highest_that_is_within_the_bytes() -> None:
    state = CostThreshold((0.0, 2.0))
    state.within(torch.tensor([[[0.1, 0.3, 0.5, 1.9], [0.2, 1.0, 1.2, 1.4]]]), 1)
    assert state.attended == 1
    state.value = fitted_threshold([state], 2)
    assert state.value == pytest.approx(1, abs=1e-4)
    assert state.within(torch.tensor([[[0.1, 0.3, 0.5, 1.9], [0.2, 1.1, 1.2, 1.4]]]), 1).sum(-1).tolist() == [[3, 1]]


def test_a_selection_is_used_again_without_its_index(layers: list[Layer]) -> None:
    arm, layer = BY_NAME["rocketkv+:reuse-2"], layers[0]
    outs = []
    for spoilt in (False, True):
        made = steps_of(layers, arm, 1)[0]
        if spoilt:
            made.store.decoding.named_index()["codes"].zero_()
        outs.append(made.step_of(*step_at(layer, 1), layer.params))
    assert torch.equal(*outs)


def test_pages_left_out_are_not_scored(layers: list[Layer]) -> None:
    arm, layer = BY_NAME["rocketkv+:coarse"], layers[0]
    token = step_at(layer, 0)
    made, own = steps_of(layers, arm, 1)
    made.store.crop(PROMPT)
    scored = ablation_steps.Step(*token, made.store, None, layer.params).score()
    near = ablation_choice.near_tokens(token[0], scored, layer.params, page_size=32, channels=16, share=0.5)
    size = near.shape[-1]
    assert 0.4 * size < near.sum(-1).min() < 0.6 * size
    made.store.crop(PROMPT)
    made.store.decoding.named_index()["scales"][:, :, :size][~near] = torch.nan
    torch.testing.assert_close(made.step_of(*token, layer.params), own[0])


def test_high_bits_are_of_the_same_sketch(layers: list[Layer]) -> None:
    made = steps_of(layers, BY_NAME["rocketkv+:planes"], 1)[0]
    made.store.decoding.named_index()["codes"].fill_(0xFF)  # all channels 1.5 steps from the mean
    scored = ablation_steps.Step(*step_at(layers[0], 1), made.store, None, layers[0].params).score()
    shift = scored.rows @ made.store.decoding.named_index()["mean"][..., None]
    rough = ablation_choice.high_bit_logits(scored, made.store)[..., :-1] - shift
    expected = (scored.logits[..., :-1] - shift) * ablation_choice.HIGH_BIT / 1.5
    torch.testing.assert_close(rough, expected, atol=1e-4, rtol=1e-4)


def test_low_bits_of_what_ranks_low_are_not_read(layers: list[Layer]) -> None:
    arm, layer = BY_NAME["rocketkv+:planes"], layers[0]
    made, own = steps_of(layers, arm, 1)
    made.store.crop(PROMPT)
    scored = ablation_steps.Step(*step_at(layer, 0), made.store, None, layer.params).score()
    rough = ablation_steps.group_weights(ablation_choice.high_bit_logits(scored, made.store))
    size = rough.shape[-1]
    low = ablation_choice.mask_of(rough.argsort(dim=-1)[..., : int(0.7 * size)], size)
    made.store.crop(PROMPT)
    made.store.decoding.named_index()["codes"][:, :, :size][low] &= 0b10101010
    assert torch.equal(made.step_of(*step_at(layer, 0), layer.params), own[0])


def test_heads_that_share_storage_store_as_much_together(layers: list[Layer]) -> None:
    arm, split = BY_NAME["rocketkv+:adakv"], fitted_split(BY_NAME["rocketkv+:kernel-13"], CASE)
    made, kept = ArmLayer(arm, split, layers[0], PROMPT), split.kept_tokens or 0
    lengths = made.store.decoding.buffers.seq_lens.clone()
    assert lengths.sum(1).tolist() == [2 * kept] * 2
    assert lengths.min() >= 32 + (kept - 32) // 4
    assert lengths.unique().numel() > 1
    assert made.store.decoding.positions.eq(PROMPT - 1).any(-1).all()
    ablation_run.replay(made, layers[0], PROMPT)
    assert torch.equal(made.store.decoding.buffers.seq_lens, lengths)
    # Each row reads the sketch of its own tokens.
    assert made._next_bytes() == pytest.approx(ablation_fit.step_bytes(split, kept + 1, (16, 16), (2, 2), nominal=True))
