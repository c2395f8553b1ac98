"""What is said of a step's loss, and what is done about it, beside exact attention made here by its definition."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import SETTINGS, SKETCH_SPLIT, SMALL, build, greedy, left_padded, prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rocketkv
from rocketkv.backend import decode_step
from rocketkv.budget import BudgetSplit
from rocketkv.cache import RocketKVCache, cache_stats, rocketkv_layers
from rocketkv.config import RocketKVConfig
from rocketkv.handover import claim
from rocketkv.layer import RocketKVLayer
from rocketkv.loss import attend_all_where, attend_stored, attend_wider_where, beyond, estimated_error, missed_mass
from rocketkv.models import CACHE_ARGUMENT
from rocketkv.monitor import Monitor, StepReport
from rocketkv.store import KVStore

from .close import assert_near
from .naive import attention
from .turns import DV, HKV, KERNEL, PROMPT, RESERVE, SCALING, WINDOW, D, H, Tokens, extend, left_padding, tokens

SPLIT = BudgetSplit(token_budget=14, kept_tokens=50, sketch_bits=2, top_k=6, residual=True)
PLUS: dict[str, Any] = {**SETTINGS, "method": "rocketkv+", "token_budget": 24, "split": SKETCH_SPLIT}
# As much kept, and no selection of it.
ALL_STORED = BudgetSplit(token_budget=24, kept_tokens=40, value_aware=True, pool_offset=SKETCH_SPLIT.pool_offset)


def layer(
    *, watched: bool = True, method: str = "rocketkv+", split: BudgetSplit = SPLIT, **fields: Any
) -> RocketKVLayer:
    config = RocketKVConfig(
        method=method, split=split, window_size=WINDOW, kernel_size=KERNEL, decode_reserve=RESERVE, **fields
    )
    made = RocketKVLayer(config)
    made.monitor = Monitor(config, [0]) if watched else None
    return made


def forward(made: RocketKVLayer, given: Tokens) -> Tensor:
    """Take some tokens through a layer and return [B, H, n, Dv]."""
    made.armed = True
    assert claim(made.update(given.key, given.value)[0]) is made
    exact: dict[str, Any] = {"scaling": SCALING, "softcap": None, "sinks": None}
    return made.attend(given.query, None, fast=lambda *_: None, **exact).transpose(1, 2)


def run(made: RocketKVLayer, given: Tokens, prompt_length: int = PROMPT) -> list[Tensor]:
    """Take a prompt and the tokens after it through a layer; return what each of these gives, [B, H, Dv]."""
    forward(made, given[:prompt_length])
    return [forward(made, given[i : i + 1])[:, :, 0] for i in range(prompt_length, len(given))]


def exact(store: KVStore, query: Tensor, **kwargs: Any) -> Tensor:
    """Return attention [B, H, Dv] to all that a store holds, by its definition."""
    assert store.keys is not None
    assert store.values is not None
    assert store.lengths is not None
    seen = [[range(int(count)) for count in row] for row in store.lengths]
    return attention(query, store.keys, store.values, SCALING, seen, **kwargs)  # type: ignore[arg-type]


def errors(out: Tensor, expected: Tensor) -> Tensor:
    return (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.fixture(params=[None, [PROMPT, 33, 10]], ids=["uniform", "ragged"])
def stepped(request: pytest.FixtureRequest) -> tuple[KVStore, Tensor, Tensor, Tensor]:
    """Return a store after a step, its query, output and missed mass; rows may be short, even within the budget."""
    store, late = KVStore(), tokens(3, 3)
    extend(store, tokens(3, PROMPT), None if request.param is None else left_padding(request.param, PROMPT))
    store.close_prompt(SPLIT, decode_reserve=RESERVE, kernel_size=KERNEL, scaling=SCALING)
    for i in range(3):
        out = decode_step(late.query[:, :, i], late.key[:, :, i], late.value[:, :, i], store, scaling=SCALING)
    missed = missed_mass(store, H)
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
    expected = exact(store, query, **own)
    assert_near(attend_stored(query, store, scaling=SCALING, **own), expected)
    before = out.clone(), missed.clone()
    found, rest = attend_all_where(some_heads(), query, store, out, missed, scaling=SCALING, **own)
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
    found, rest = attend_wider_where(passed, bound, query, store, out, missed, scaling=SCALING, **own)
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
    assert dense.store.missed is not None
    assert not dense.store.missed.any()  # what the step gave in the end misses nothing


def test_wider_steps_err_less() -> None:
    given = tokens(2, PROMPT + 6)
    mean = []
    for bound in (None, 0.4, 0.2, 0.05):
        made = layer(on_loss=None if bound is None else "widen", loss_bound=bound)
        out = run(made, given)[-1]
        mean.append(float(errors(out, exact(made.store, given.query[:, :, -1])).mean()))
    assert all(wider < narrower for narrower, wider in pairwise(mean))


def test_a_step_that_says_nothing_is_taken_to_miss_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVStore, "note_missed", lambda store, missed: None)
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


def test_the_estimate_is_as_defined() -> None:
    reports: list[StepReport] = []
    made = layer(audit_every=1000)
    assert made.monitor is not None
    made.monitor.on_step = reports.append
    given = tokens(2, PROMPT + 5)
    out = run(made, given)[-1]
    store = made.store
    assert store.values is not None
    assert store.missed is not None
    for row in range(2):
        for head in range(H):
            missed = float(store.missed[row, head])
            mean = store.values[row, head // (H // HKV), : store.stored].double().mean(0)
            distance = float((out[row, head] - mean).norm() / out[row, head].norm())
            expected = missed / (1 - missed) * distance
            assert float(reports[-1].estimated_error[0][row, head]) == pytest.approx(expected, rel=1e-4)


def test_the_estimate_of_extremes() -> None:
    sums, lengths = torch.ones(1, 1, DV), torch.ones(1, 1, dtype=torch.int32)
    out = torch.cat((torch.zeros(1, 1, DV), torch.ones(1, 1, DV), torch.full((1, 1, DV), 3.0)), dim=1)
    found = estimated_error(out, torch.tensor([[0.0, 0.5, 1.0]]), sums, lengths)
    assert found[0, :2].tolist() == [0, 0]
    assert float(found[0, 2]) == pytest.approx(20 * 2 / 3)  # at least a twentieth is taken to be attended to


def test_nobody_waits_for_the_device_who_did_not_ask() -> None:
    given = tokens(1, PROMPT + 3)
    reports: list[StepReport] = []
    waiting = ("_local_scalar_dense", "nonzero", "equal", "_to_cpu")
    for fields, waits in (({}, False), ({"on_loss": "widen", "loss_bound": 0.99}, True)):
        made = layer(**fields)
        assert made.monitor is not None
        made.monitor.on_step = reports.append
        run(made, given[: PROMPT + 2])
        with Operations() as done:
            forward(made, given[PROMPT + 2 :])
        assert any(word in name for name in done.names for word in waiting) == waits
    assert len(reports) == 6


class Operations(TorchDispatchMode):
    """Writes down which operations of PyTorch run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_unasked_no_operation_is_added() -> None:
    cache = RocketKVCache(build().config, **PLUS)
    assert all(made.monitor is None for made in rocketkv_layers(cache))
    given = tokens(2, PROMPT + 4)
    made = layer(watched=False)
    run(made, given[: PROMPT + 3])
    store = copy.deepcopy(made.store)
    with Operations() as bare:
        query, key, value = (part[:, :, -1:] for part in (given.query, given.key, given.value))
        decode_step(query[:, :, 0], key[:, :, 0], value[:, :, 0], store, scaling=SCALING)[:, None].transpose(1, 2)
    with Operations() as found:
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
    made.close_prompt({"scaling": SCALING, "softcap": None, "sinks": None})
    late = tokens(2, 3)
    for i in range(3):
        decode_step(late.query[:, :, i], late.key[:, :, i], late.value[:, :, i], made.store, scaling=SCALING)
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
            with Operations() as step:
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
    ({"audit_every": 2.0}, TypeError, r"audit_every must be an int .* got 2\.0 of type float"),
    ({"audit_every": 8, "decode_capacity": 64}, ValueError, r"audit_every=8 is for caches that grow.*=64\)"),
    ({"on_loss": "stop"}, ValueError, "on_loss must be one of warn, widen, dense or None; got 'stop'"),
    ({"on_loss": "warn", "method": "rocketkv"}, ValueError, r"on_loss='warn' needs an estimate.*not 'rocketkv'"),
    ({"on_loss": "dense", "split": ALL_STORED}, ValueError, "on_loss='dense' needs an estimate"),
    ({"on_loss": "widen", "decode_capacity": 64}, ValueError, "on_loss='widen' is for caches that grow"),
    ({"loss_bound": 0.2}, ValueError, r"loss_bound=0\.2 is where on_loss acts, which is None"),
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
