"""A step's loss: how it is estimated, and what is done about it, beside exact attention made here by its definition."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from monitor_case import ALL_STORED, PLUS, SPLIT, errors, exact, layer, run
from rocketkv.core import decode
from rocketkv.core.decode import attend_selected
from rocketkv.dispatch import decode_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.missed import (
    attend_all_where,
    attend_stored,
    attend_wider_where,
    beyond,
    estimated_error,
    missed_mass,
)
from rocketkv.state.monitor import StepReport
from rocketkv.state.store import KVStore
from tiny import build, greedy, left_padded, prompt
from turns import DV, HKV, KERNEL, PARAMS, PROMPT, RESERVE, H, extend, left_padding, tokens


@pytest.fixture(params=[None, [PROMPT, 33, 10]], ids=["uniform", "ragged"])
def stepped(request: pytest.FixtureRequest) -> tuple[KVStore, Tensor, Tensor, Tensor]:
    """Return a store after a step, its query, output and missed mass; rows may be short, even within the budget."""
    store, late = KVStore(), tokens(3, 3)
    extend(store, tokens(3, PROMPT), None if request.param is None else left_padding(request.param, PROMPT))
    close_prompt(store, SPLIT, PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL)
    for i in range(3):
        out = decode_step(late.query[:, :, i], late.key[:, :, i], late.value[:, :, i], store, PARAMS)
    missed = missed_mass(store)
    assert missed is not None
    return store, late.query[:, :, 2], out, missed


def some_heads() -> Tensor:
    return torch.tensor([[True, False], [True, True], [False, True]])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_some_heads_attend_to_everything(
    stepped: tuple[KVStore, Tensor, Tensor, Tensor], sinks: bool, softcap: float | None
) -> None:
    store, query, out, missed = stepped
    own = {"softcap": softcap, "sinks": torch.randn(H) if sinks else None}
    params = PARAMS._replace(**own)
    expected = exact(store, query, **own)
    assert_near(attend_stored(query, store, params), expected)
    before = out.clone(), missed.clone()
    found, rest = attend_all_where(some_heads(), query, store, out, missed, params)
    chosen = some_heads().repeat_interleave(H // HKV, dim=1)
    assert_near(found[chosen], expected[chosen])
    assert found[~chosen].equal(out[~chosen])
    assert rest[~chosen].equal(missed[~chosen])
    assert not rest[chosen].any()
    assert out.equal(before[0])
    assert missed.equal(before[1])


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("sinks", [False, True])
def test_wider_heads_miss_no_more_than_the_bound(
    stepped: tuple[KVStore, Tensor, Tensor, Tensor], sinks: bool, bound: float
) -> None:
    store, query, out, missed = stepped
    own = {"sinks": torch.randn(H) if sinks else None}
    passed = some_heads() & beyond(missed, bound, HKV)
    chosen = passed.repeat_interleave(H // HKV, dim=1)
    found, rest = attend_wider_where(passed, bound, query, store, out, missed, PARAMS._replace(**own))
    assert found[~chosen].equal(out[~chosen])
    assert chosen.any()
    assert (rest[chosen] <= bound).all()
    if bound == 0:
        assert_near(found[chosen], exact(store, query, **own)[chosen])
    else:
        assert rest[chosen].any()  # it stops as soon as it may


def test_a_row_attends_to_more_as_it_would_alone() -> None:
    given = tokens(3, PROMPT + 4)
    together = run(layer(on_loss="widen", loss_bound=0.2), given)
    for row in range(3):
        for found, expected in zip(run(layer(on_loss="widen", loss_bound=0.2), given.row(row)), together, strict=True):
            assert_near(found, expected[row : row + 1])


def test_dense_gives_what_attention_to_all_that_is_stored_gives() -> None:
    # Nearly even attention and a small k: most of the weight is missed.
    given = tokens(2, PROMPT + 9)
    given.query.mul_(0.3)
    small = replace(SPLIT, top_k=3)
    plain, dense = layer(split=small, watched=False), layer(split=small, on_loss="dense")
    lost = 0.0
    for i, (found, out) in enumerate(zip(run(dense, given), run(plain, given), strict=True)):
        cropped = copy.deepcopy(dense.store)
        cropped.crop(PROMPT + i + 1)
        expected = exact(cropped, given.query[:, :, PROMPT + i])
        assert_near(found, expected)
        lost = max(lost, float(errors(out, expected).max()))
    assert lost > 0.1
    noted = dense.store.decoding.buffers.missed
    assert noted is not None
    assert not noted.any()  # what the step gave in the end misses nothing


def test_wider_steps_err_less() -> None:
    given = tokens(2, PROMPT + 6)
    mean = []
    for bound in (None, 0.4, 0.2, 0.05):
        made = layer(on_loss=None if bound is None else "widen", loss_bound=bound)
        out = run(made, given)[-1]
        mean.append(float(errors(out, exact(made.store, given.query[:, :, -1])).mean()))
    assert all(wider < narrower for narrower, wider in pairwise(mean))


def test_a_step_that_says_nothing_is_taken_to_miss_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "attend_selected", lambda *args, **own: (attend_selected(*args, **own)[0], None))
    given = tokens(1, PROMPT + 1)
    made = layer(on_loss="dense", loss_bound=0.9)
    assert_near(run(made, given)[0], exact(made.store, given.query[:, :, -1]))
    with pytest.warns(UserWarning, match="did not say what they missed"):
        run(layer(on_loss="warn", loss_bound=0.9), given)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@pytest.mark.parametrize("how", ["dense", "widen"])
def test_without_tolerance_a_model_reads_all_that_is_stored(how: str, family: str) -> None:
    model = build(family)
    for inputs in (prompt(90), left_padded([prompt(80), prompt(50), prompt(12)])):
        with rocketkv.patch(model, **{**PLUS, "split": ALL_STORED}):
            tokens_of_all, logits, _ = greedy(model, inputs)
        with rocketkv.patch(model, **PLUS) as handle:
            assert not greedy(model, inputs)[1].allclose(logits, atol=1e-2)
        with rocketkv.patch(model, **PLUS, on_loss=how, loss_bound=0.0) as handle:
            found, acted, _ = greedy(model, inputs)
        torch.testing.assert_close(acted, logits, atol=2e-4, rtol=0)
        assert found.equal(tokens_of_all)
        assert all(missed is None or not missed.any() for missed in handle.stats().missed)


def test_it_warns_once_a_generation_and_changes_nothing() -> None:
    model = build()
    with rocketkv.patch(model, **PLUS):
        expected = greedy(model, prompt(90))[1]
    with rocketkv.patch(model, **PLUS, on_loss="warn", loss_bound=0.01):
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"in layer \d, at token 9\d, .* an estimated 0\.\d+ of") as caught:
                assert greedy(model, prompt(90))[1].equal(expected)
            assert len([one for one in caught if "loss_bound=0.01" in str(one.message)]) == 1
    with rocketkv.patch(model, **PLUS, on_loss="warn", loss_bound=0.999), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(model, prompt(90))[1].equal(expected)


def test_the_estimate_is_as_defined() -> None:
    reports: list[StepReport] = []
    made = layer(audit_every=1000)
    assert made.monitor is not None
    made.monitor.on_step = reports.append
    given = tokens(2, PROMPT + 5)
    out = run(made, given)[-1]
    store = made.store
    values, noted = store.decoding.values, store.decoding.buffers.missed
    assert noted is not None
    for row in range(2):
        for head in range(H):
            missed = float(noted[row, head])
            mean = values[row, head // (H // HKV), : store.stored].double().mean(0)
            distance = float((out[row, head] - mean).norm() / out[row, head].norm())
            expected = missed / (1 - missed) * distance
            assert float(reports[-1].estimated_error[0][row, head]) == pytest.approx(expected, rel=1e-4)


def test_the_estimate_of_extremes() -> None:
    sums, lengths = torch.ones(1, 1, DV), torch.ones(1, 1, dtype=torch.int32)
    out = torch.cat((torch.zeros(1, 1, DV), torch.ones(1, 1, DV), torch.full((1, 1, DV), 3.0)), dim=1)
    found = estimated_error(out, torch.tensor([[0.0, 0.5, 1.0]]), sums, lengths)
    assert found[0, :2].tolist() == [0, 0]
    assert float(found[0, 2]) == pytest.approx(20 * 2 / 3)  # at least a twentieth is taken to be attended to
