"""A decode step as an operator: the same as that of a store that grows, on tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv.budget import METHODS
from rocketkv.dispatch import decode_step
from rocketkv.static_step import StaticStep, static_step
from static import run_operator, run_static, static_pair
from tracking import VIEWS, Tracker
from turns import BUDGET, PARAMS, SCALING, SPLITS, D, Tokens, decode, prompted, tokens

# Triton 3.2's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.mark.parametrize("lengths", [None, [60, 60], [60, 31, 7]], ids=["one row", "even", "ragged"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("run", [run_static, run_operator])
def test_a_static_step_equals_a_store_that_grows(
    run: Callable[[StaticStep, Tokens], Tensor], method: str, lengths: list[int] | None
) -> None:
    growing, static, given = static_pair(method, lengths, 25)
    found = run(static_step(given.query[:, :, 0], static), given)
    assert_near(found, decode(growing, given))
    static.lens.uncounted = True  # nobody counted these steps
    assert (static.seen, static.stored, static.shortest) == (growing.seen, growing.stored, growing.shortest)
    own, others = static.tensors(), growing.tensors()
    assert own["seq_lens"].equal(others["seq_lens"])
    for name in ("keys", "values", "positions"):
        assert own[name].equal(others[name][:, :, : static.capacity]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "sparq"])
def test_the_operator_in_low_precision(method: str, dtype: torch.dtype) -> None:
    growing, static, given = static_pair(method, [60, 31], 15, dtype)
    found = run_operator(static_step(given.query[:, :, 0], static), given)
    assert found.dtype == dtype
    assert_near(found, decode(growing, given), 0.02)  # one other token would make a difference of some tenths


@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"sinks": torch.arange(6.0)}], ids=["softcap", "sinks"])
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_the_operator_with_softcap_and_sinks(method: str, extra: dict[str, Any]) -> None:
    growing, static, given = static_pair(method, [60, 31], 9)
    params = PARAMS._replace(**extra)
    found = run_operator(static_step(given.query[:, :, 0], static), given, params)
    for i in range(len(given)):
        out = decode_step(given.query[:, :, i], given.key[:, :, i], given.value[:, :, i], growing, params)
        assert_near(found[:, :, i], out)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "snapkv", "streaming", "full"])
def test_opcheck(method: str) -> None:
    _, static, given = static_pair(method, [60, 31], 9)
    if method == "rocketkv":
        decoding = static.decoding
        decoding.buffers = decoding.buffers._replace(query_ring=torch.zeros(2, 6, 4, D))
    step = static_step(given.query[:, :, 0], static)
    arguments = (
        *(given.query[:, :, 0], given.key[:, :, 0], given.value[:, :, 0]),
        *(step.tensors, step.workspace, step.out, step.names, step.rule, SCALING, 2.0, torch.ones(6)),
    )
    torch.library.opcheck(torch.ops.rocketkv.decode_step.default, arguments)


def test_a_full_row_stays_as_it_is() -> None:
    _, static, given = static_pair("rocketkv", [60, 7], 4)
    step = static_step(given.query[:, :, 0], static)
    run_operator(step, given)
    before = {name: tensor.clone() for name, tensor in static.tensors().items()}
    out = run_operator(step, tokens(2, 1))
    assert out.isfinite().all()
    full = static.decoding.buffers.seq_lens == static.capacity
    assert full[0].all()
    assert not full[1].any()
    for name in ("keys", "values", "positions", "bounds"):
        assert static.tensors()[name][0].equal(before[name][0]), name
    static.lens.uncounted = True
    with pytest.raises(ValueError, match="decode_capacity=4"):
        static.stored  # noqa: B018  # asking is the test


def test_only_a_static_store_has_a_static_step() -> None:
    store = prompted(tokens(1, 60), SPLITS["rocketkv"])
    with pytest.raises(ValueError, match="closed with a decode_capacity"):
        static_step(torch.zeros(1, 6, D), store)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_a_step_on_the_kernels_does_nothing_else(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_kernels = pytest.importorskip("rocketkv.kernels.decode", reason="Triton has no package for this platform")
    if not decode_kernels.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET was not 1 when triton was imported")
    growing, static, given = static_pair(method, [60, 31], 3)
    assert static.stored > BUDGET
    step = static_step(given.query[:, :, 0], static, backend="triton")
    assert step.workspace
    known = [*step.tensors, *step.workspace, step.out, given.query, given.key, given.value]
    with torch.inference_mode(), Tracker(known) as tracker:
        found = run_operator(step, given[:1])
    assert set(tracker.operations) - VIEWS == {"decode_step", "clone", "cat"}
    assert_near(found, decode(growing, given[:1]))
    missed, expected = static.decoding.buffers.missed, growing.decoding.buffers.missed
    assert (missed is None) == (expected is None) == (method == "rocketkv")
    if missed is not None and expected is not None:
        assert_near(missed, expected)
    # And without the operator: launches, which the interpreter makes of other operations.
    launched = []

    class Launched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launched.append(self.name)

    kernels = ["append_sketch_kernel" if method == "rocketkv+" else "append_score_kernel", "select_attend_kernel"]
    for name in kernels:
        monkeypatch.setattr(decode_kernels, name, Launched(name))
    second = Tokens(*(tensor[:, :, 1:2].clone() for tensor in (given.query, given.key, given.value)))
    known += [second.query, second.key, second.value]
    with torch.inference_mode(), Tracker(known) as tracker:
        out = step(second.query[:, :, 0], second.key[:, :, 0], second.value[:, :, 0], PARAMS)
    assert launched == kernels
    assert [name for name in tracker.operations if name not in VIEWS] == []
    assert tracker.peak == 0
    assert out is step.out
