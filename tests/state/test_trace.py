"""A trace against the step itself: the tokens kept and read, by the step's own output, and the missed mass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rocketkv
from monitor_case import PLUS
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import decode_step
from rocketkv.state.trace import Trace, step_reads
from tiny import SMALL, build, greedy, left_padded, prompt
from turns import HKV, PROMPT, SCALING, SPLITS, H, left_padding, prompted, tokens


@pytest.mark.parametrize("method", ["rocketkv", "quest", "sparq", "snapkv", "streaming", "exact-topk"])
@pytest.mark.parametrize("special", [False, True], ids=["", "soft-cap and learned sinks"])
def test_reads_reproduce_the_output_of_the_step(method: str, special: bool) -> None:
    sinks = torch.randn(H) if special else None
    params = AttentionParams(SCALING, softcap=2.0 if special else None, sinks=sinks)
    given = tokens(2, PROMPT + 3)
    # The second row's prompt is short enough that a step attends to all of it.
    valid = left_padding([PROMPT, 9], PROMPT)
    store = prompted(given[:PROMPT], SPLITS[method], valid)
    for i in range(PROMPT, PROMPT + 3):
        step = given[i : i + 1]
        query = step.query[:, :, 0]
        out = decode_step(query, step.key[:, :, 0], step.value[:, :, 0], store, params)
    reads = step_reads(store, query, params)
    stored = store.decoding.positions[:, :, : store.stored]
    for row in range(2):
        for head in range(H):
            group = head // (H // HKV)
            places = reads.positions[row, group]
            real = places[places >= 0].long()
            assert len(set(real.tolist())) == len(real)
            # By the definition, from the tokens at those places in the sequence.
            held = stored[row, group][stored[row, group] >= 0].long()
            logits = given.key[row, group, held].double() @ query[row, head].double() * SCALING
            logits = 2.0 * torch.tanh(logits / 2.0) if special else logits
            sink = torch.zeros(()) if sinks is None else sinks[head].double().exp()
            total = logits.exp().sum() + sink
            weights = logits.exp() / total
            by_place = dict(zip(held.tolist(), weights, strict=True))
            expected = torch.stack([by_place[place] for place in real.tolist()])
            assert reads.weights[row, head][places >= 0].double().allclose(expected, atol=1e-6)
            assert float(reads.missed[row, head]) == pytest.approx(float(weights.sum() - expected.sum()), abs=1e-6)
            attended = expected @ given.value[row, group, real].double() / (expected.sum() + sink / total)
            assert out[row, head].double().allclose(attended, atol=1e-5)
    whole = SPLITS[method].top_k is None
    assert bool((reads.missed[0] > 1e-4).all()) != whole
    assert reads.missed[1].allclose(torch.zeros(H), atol=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize("settings", [SMALL, PLUS], ids=["rocketkv", "rocketkv+"])
def test_a_run_is_traced_and_not_changed(settings: dict[str, Any]) -> None:
    model, trace = build("gemma3"), Trace()  # layers 1 and 3 are compressed
    inputs = left_padded([prompt(80), prompt(20)])
    with rocketkv.patch(model, **settings):
        expected = greedy(model, inputs, 8)[1]
    with rocketkv.patch(model, **settings, on_step=trace):
        _, found, cache = greedy(model, inputs, 8)
    positions = cache.positions()
    assert found.equal(expected)
    assert [step.position for step in trace.steps] == list(range(80, 87))
    assert list(trace.kept) == [1, 3]
    for number, kept in trace.kept.items():
        after = positions[number]
        assert kept.shape[2] == after.shape[2] - 7
        assert sorted(kept[0, 0].tolist()) == sorted(place for place in after[0, 0].tolist() if place < 80)
        # Neither padding nor generated tokens; the short row keeps all of its own.
        assert [sorted(place for place in head if place >= 0) for head in kept[1].tolist()] == [list(range(60, 80))] * 2
        reads = trace.steps[3].layers[number]
        assert ((reads.positions <= 83) & (reads.positions >= -1)).all()
        assert reads.weights.shape == (2, 4, reads.positions.shape[2])
    with rocketkv.patch(model, **settings, on_step=trace):
        greedy(model, {"input_ids": prompt(60)}, 3)
    assert [step.position for step in trace.steps] == [60, 61]
    assert all(int(kept.max()) == 59 and len(kept) == 1 for kept in trace.kept.values()), "a generation begins anew"


@pytest.mark.integration
def test_rejected_drafts_leave_no_steps() -> None:
    model, trace = build(), Trace()
    ids = prompt(12, seed=3).repeat(1, 6)  # so that drafts are found, and rejected
    with rocketkv.patch(model, **SMALL, on_step=trace) as handle:
        model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        seen = handle.cache.get_seq_length()
    places = [step.position for step in trace.steps if step.position < seen]
    assert places == list(range(72, seen))
    assert all(list(step.layers) == [0, 1] for step in trace.steps)
