"""Watched steps: what is reported of them, audits beside exact attention, and that unwatched ones cost nothing more."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from monitor_case import ALL_STORED, PLUS, SPLIT, errors, exact, forward, layer, run
from naive import attention
from rocketkv.config import RocketKVConfig
from rocketkv.dispatch import decode_step
from rocketkv.hf.cache import RocketKVCache, cache_stats
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.monitor import StepReport
from tiny import SMALL, build, greedy, left_padded, prompt
from tracking import Operators
from turns import HKV, PARAMS, PROMPT, SCALING, D, H, extend, left_padding, tokens


def test_steps_of_the_kernels_are_watched_alike() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    model, found = build(num_hidden_layers=1), {}
    for backend in ("torch", "triton"):
        reports: list[StepReport] = []
        with rocketkv.patch(
            model, **PLUS, backend=backend, on_loss="widen", loss_bound=0.3, audit_every=2, on_step=reports.append
        ):
            logits = greedy(model, left_padded([prompt(45), prompt(9)]), 3)[1]
        found[backend] = logits, reports
    assert_near(found["triton"][0], found["torch"][0], 2e-5)
    for report, expected in zip(found["triton"][1], found["torch"][1], strict=True):
        assert_near(report.missed[0], expected.missed[0])
        assert_near(report.estimated_error[0], expected.estimated_error[0], 1e-4)
        assert report.passed[0].equal(expected.passed[0])
        assert (report.audit is None) == (expected.audit is None)
    assert any(report.passed[0].any() for report in found["triton"][1])


def test_every_step_is_reported() -> None:
    model, reports = build("gemma3"), list[StepReport]()  # layers 1 and 3 are compressed
    inputs = left_padded([prompt(80), prompt(50)])
    with rocketkv.patch(model, **PLUS, on_step=reports.append) as handle:
        greedy(model, inputs, 10)
    assert [report.position for report in reports] == list(range(80, 89))
    for report in reports:
        assert list(report.missed) == list(report.estimated_error) == [1, 3]
        for missed, error in zip(report.missed.values(), report.estimated_error.values(), strict=True):
            assert missed.shape == error.shape == (2, 4)
            assert ((missed > 0) & (missed < 1)).all()
            assert (error > 0).all()
        assert report.passed == {}
        assert report.audit is None
    missed = handle.stats().missed
    assert [one is None for one in missed] == [True, False, True, False]
    assert missed[1].equal(reports[-1].missed[1])  # type: ignore[union-attr]
    assert handle.stats().to_dict()["missed"][3] == pytest.approx(float(reports[-1].missed[3].mean()))
    reports.clear()
    greedy(model, inputs, 3)
    assert reports == []  # it was for a while


def test_reports_say_where_the_bound_was_passed() -> None:
    reports: list[StepReport] = []
    made = layer(on_loss="widen", loss_bound=0.6)
    assert made.monitor is not None
    made.monitor.on_step = reports.append
    run(made, tokens(2, PROMPT + 8))
    acted = torch.stack([report.passed[0] for report in reports])
    assert acted.shape == (8, 2, HKV)
    assert 0 < int(acted.sum()) < acted.numel()
    assert all((report.missed[0] <= 0.6).all() for report in reports)


def test_nobody_waits_for_the_device_who_did_not_ask() -> None:
    given = tokens(1, PROMPT + 3)
    reports: list[StepReport] = []
    waiting = ("_local_scalar_dense", "nonzero", "equal", "_to_cpu")
    for fields, waits in (({}, False), ({"on_loss": "widen", "loss_bound": 0.99}, True)):
        made = layer(**fields)
        assert made.monitor is not None
        made.monitor.on_step = reports.append
        run(made, given[: PROMPT + 2])
        with Operators() as done:
            forward(made, given[PROMPT + 2 :])
        assert any(word in name for name in done.names for word in waiting) == waits
    assert len(reports) == 6


def test_unasked_no_operation_is_added() -> None:
    cache = RocketKVCache(build().config, **PLUS)
    assert all(made.monitor is None for made in rocketkv_layers(cache))
    given = tokens(2, PROMPT + 4)
    made = layer(watched=False)
    run(made, given[: PROMPT + 3])
    query, key, value = (part[:, :, -1] for part in (given.query, given.key, given.value))
    decode_step(query, key, value, copy.deepcopy(made.store), PARAMS)  # the first step fills caches of constants
    store = copy.deepcopy(made.store)
    with Operators() as bare:
        decode_step(query, key, value, store, PARAMS)[:, None].transpose(1, 2)
    with Operators() as found:
        forward(made, given[PROMPT + 3 :])
    computed = [[name for name in done.names if not name.startswith("aten.slice")] for done in (bare, found)]
    assert computed[0] == computed[1]


@pytest.mark.parametrize("method", ["rocketkv+", "rocketkv", "snapkv"])
def test_audits_are_exact_attention(method: str) -> None:
    split = {
        "rocketkv+": SPLIT,
        "rocketkv": replace(SPLIT, sketch_bits=None, residual=False, page_size=3, channels=4),
        "snapkv": replace(SPLIT, sketch_bits=None, residual=False, top_k=None),
    }[method]
    given, plain = tokens(2, PROMPT + 40), layer(split=split, method=method, watched=False)
    watched = layer(split=split, method=method, audit_every=3)
    out = run(watched, given)
    assert all(found.equal(expected) for found, expected in zip(out, run(plain, given), strict=True))
    assert watched.monitor is not None
    audits = list(watched.monitor.audits)
    assert [audit.position for audit in audits] == list(range(PROMPT + 2, PROMPT + 40, 3))
    # One layer: a head each time, and then the other row.
    assert [audit.head for audit in audits] == [(audit.position + 1) // 3 % H for audit in audits]
    assert {audit.row for audit in audits} == {0, 1}
    for audit in audits:
        store = copy.deepcopy(watched.store)
        store.crop(audit.position + 1)
        expected = exact(store, given.query[:, :, audit.position])
        error = float(errors(out[audit.position - PROMPT], expected)[audit.row, audit.head])
        assert audit.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert audit.history_error is None
        assert (audit.missed is None) == (audit.estimated_error is None) == (method != "rocketkv+")
    assert (max(audit.error for audit in audits) > 0.05) == (method != "snapkv")


@pytest.mark.parametrize(("method", "device"), [("rocketkv-mt", None), ("rocketkv-mt", "cpu"), ("rocketkv-mt+", None)])
def test_audits_over_a_history_are_over_all_tokens(method: str, device: str | None) -> None:
    split = (
        replace(SPLIT, sketch_bits=None, residual=False, page_size=3, channels=4) if method == "rocketkv-mt" else SPLIT
    )
    given = tokens(1, PROMPT + 20)
    made = layer(method=method, split=split, audit_every=1, history_device=device)
    out = run(made, given)
    assert made.monitor is not None
    assert len(made.monitor.audits) == 20
    for audit, found in zip(made.monitor.audits, out, strict=True):
        past = slice(0, audit.position + 1)
        expected = attention(given.query[:, :, audit.position], given.key[:, :, past], given.value[:, :, past], SCALING)
        error = float(errors(found, expected)[0, audit.head])
        assert audit.history_error == pytest.approx(error, rel=1e-3)
        assert audit.history_error != audit.error


def test_a_history_of_padded_rows_is_of_their_tokens() -> None:
    made = layer(method="rocketkv-mt", split=replace(SPLIT, sketch_bits=None, residual=False, channels=4))
    given, valid = tokens(2, PROMPT), left_padding([PROMPT, 33], PROMPT)
    extend(made.store, given, valid)
    made.prompt_tokens = PROMPT
    made.end_prompt(PARAMS)
    late = tokens(2, 3)
    for i in range(3):
        decode_step(late.query[:, :, i], late.key[:, :, i], late.value[:, :, i], made.store, PARAMS)
    assert made.history is not None
    for row, first in ((0, 0), (1, PROMPT - 33)):
        keys, values = made.history.head(made.store, row, 1)
        assert keys.equal(torch.cat((given.key[row, 1, first:], late.key[row, 1])))
        assert values.equal(torch.cat((given.value[row, 1, first:], late.value[row, 1])))


def test_audits_are_few_operations() -> None:
    model, ids = build(), prompt(112)
    counts = []
    for every in (1000, 111):
        cache = RocketKVCache(model.config, prompt_length=110, **PLUS, audit_every=every)
        with rocketkv.patch(model, **PLUS), torch.no_grad():
            model(ids[:, :110], **{CACHE_ARGUMENT: cache})
            with Operators() as step:
                model(ids[:, 110:111], **{CACHE_ARGUMENT: cache})
        counts.append(len(step.names))
        assert len(cache.stats().audits) == (every == 111)
    # Of a step of two layers, and so less of one of more.
    assert 0 < counts[1] - counts[0] < 0.01 * 16 * counts[0]


def test_layers_take_turns_at_audits() -> None:
    model, reports = build(), list[StepReport]()
    with rocketkv.patch(model, **SMALL, audit_every=2, on_step=reports.append) as handle:
        _, _, cache = greedy(model, prompt(90), 40)
    audits = handle.stats().audits
    assert audits == cache_stats(cache).audits
    assert [audit.position for audit in audits] == list(range(91, 129, 2))
    assert [(audit.layer, audit.head) for audit in audits] == [
        ((audit.position + 1) // 2 % 2, (audit.position + 1) // 4 % 4) for audit in audits
    ]
    assert [report.audit for report in reports if report.audit is not None] == list(audits)
    assert handle.stats().to_dict()["audits"][0]["error"] == audits[0].error


def test_drafts_that_are_taken_back_are_reported_and_leave_no_trace() -> None:
    model, reports = build(), list[StepReport]()
    repeated = prompt(30).repeat(1, 3)
    with rocketkv.patch(model, **PLUS, on_loss="widen", loss_bound=0.1, on_step=reports.append):
        plain = greedy(model, repeated, 20)
        once = [report.position for report in reports]
        reports.clear()
        looked_up = greedy(model, repeated, 20, prompt_lookup_num_tokens=4)
    assert looked_up[0].equal(plain[0])
    torch.testing.assert_close(looked_up[1], plain[1], atol=1e-4, rtol=0)
    assert set(once) <= {report.position for report in reports}
    assert all(sorted(report.missed) == [0, 1] for report in reports)


def test_a_cache_of_ones_own_is_watched_too() -> None:
    model, reports = build(), list[StepReport]()
    cache = RocketKVCache(model.config, prompt_length=90, **PLUS, on_loss="dense", loss_bound=0.0)
    ids = prompt(92)
    with rocketkv.patch(model, **PLUS, on_step=reports.append), torch.no_grad():
        model(ids[:, :90], **{CACHE_ARGUMENT: cache})
        taken = cache.snapshot()
        logits = [model(ids[:, 90:91], **{CACHE_ARGUMENT: cache}).logits]
        cache.rollback(taken)
        logits.append(model(ids[:, 90:91], **{CACHE_ARGUMENT: cache}).logits)
        forked = copy.deepcopy(cache)
        found, expected = (model(ids[:, 91:92], **{CACHE_ARGUMENT: each}).logits for each in (cache, forked))
    assert found.equal(expected)
    assert logits[0].equal(logits[1])
    assert [report.position for report in reports] == [90, 90, 91, 91]
    assert all(bool(report.passed[0].all()) for report in reports)


@pytest.mark.parametrize("watched", [False, True])
def test_a_copy_that_was_made_in_inference_mode_goes_on(watched: bool) -> None:
    made, given = layer(watched=watched, on_loss="widen", loss_bound=0.2), tokens(1, PROMPT + 6)
    run(made, given[: PROMPT + 2])
    with torch.inference_mode():
        copied = copy.deepcopy(made)
        out = [forward(each, given[PROMPT + 2 : PROMPT + 3]) for each in (copied, made)]
    assert out[0].equal(out[1])


def test_a_copied_cache_leaves_the_callbacks_owner_alone() -> None:
    class Log:
        def __init__(self) -> None:
            self.lock = threading.Lock()  # which cannot be copied
            self.positions: list[int] = []

        def note(self, report: StepReport) -> None:
            with self.lock:
                self.positions.append(report.position)

    model, log = build(), Log()
    with rocketkv.patch(model, **PLUS, on_step=log.note), torch.no_grad():
        cache = RocketKVCache(model.config, prompt_length=90, **PLUS)
        model(prompt(90), **{CACHE_ARGUMENT: cache})
        for each in (cache, copy.deepcopy(cache)):
            model(prompt(1), **{CACHE_ARGUMENT: each})
        model(prompt(1), **{CACHE_ARGUMENT: copy.deepcopy(cache)})
    assert log.positions == [90, 90, 91]


def test_copies_of_a_model_report_to_nobody() -> None:
    model, reports = build(), list[StepReport]()
    rocketkv.patch(model, **PLUS, on_step=reports.append)
    greedy(copy.deepcopy(model), prompt(90), 4)
    assert reports == []
    greedy(model, prompt(90), 4)
    assert len(reports) == 3
    with rocketkv.patch(model, **PLUS):
        greedy(model, prompt(90), 4)
    assert len(reports) == 3
    greedy(model, prompt(90), 4)
    assert len(reports) == 6


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"audit_every": 0}, ValueError, "audit_every must be at least 1, got 0"),
    ({"audit_every": 2.0}, TypeError, r"audit_every must be an int, got 2\.0 of type float"),
    ({"audit_every": 8, "decode_capacity": 64}, ValueError, r"audit_every=8 is for caches that grow.*=64\)"),
    ({"on_loss": "stop"}, ValueError, "on_loss must be one of warn, widen, dense or None; got 'stop'"),
    ({"on_loss": "warn", "method": "rocketkv"}, ValueError, r"on_loss='warn' needs an estimate.*not 'rocketkv'"),
    ({"on_loss": "dense", "split": ALL_STORED}, ValueError, "on_loss='dense' needs an estimate"),
    ({"on_loss": "widen", "decode_capacity": 64}, ValueError, "on_loss='widen' is for caches that grow"),
    ({"loss_bound": 0.2}, ValueError, r"loss_bound=0\.2 has no effect without on_loss"),
    ({"on_loss": "warn", "loss_bound": 1.0}, ValueError, r"from 0 to less than 1.*got 1\.0"),
    ({"on_loss": "warn", "loss_bound": float("nan")}, ValueError, "got nan"),
    ({"on_loss": "warn", "loss_bound": "0.2"}, TypeError, "loss_bound must be a float or None, got '0.2' of type str"),
]


@pytest.mark.parametrize(("fields", "kind", "words"), REFUSED)
def test_what_cannot_work_is_refused(fields: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        RocketKVConfig(**{"method": "rocketkv+", **fields})


def test_a_callback_for_static_caches_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"on_step is for caches that grow.*decode_capacity=64"):
        rocketkv.patch(model, **PLUS, decode_capacity=64, on_step=print)
    with pytest.raises(TypeError, match="on_step must be a function of a StepReport, or None; got int"):
        rocketkv.patch(model, **PLUS, on_step=3)  # type: ignore[arg-type]
    cache = RocketKVCache(model.config, prompt_length=90, **PLUS, decode_capacity=64)
    with rocketkv.patch(model, **PLUS, on_step=print), pytest.raises(ValueError, match="on_step is for caches that"):
        model(prompt(90), **{CACHE_ARGUMENT: cache})


def test_a_watched_step_is_not_compiled() -> None:
    def step(given: Tensor) -> Tensor:
        assert made.monitor is not None
        return given + made.monitor.asks(0, made.store)

    made = layer(audit_every=1)
    run(made, tokens(1, PROMPT + 1))
    with pytest.raises(Exception, match="cannot be compiled"):
        torch.compile(step, backend="eager", fullgraph=True)(torch.ones(1, H, D))
