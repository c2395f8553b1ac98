"""The compiled CPU step against the reference, over the shapes of the kernels' tests."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from close import assert_near
from decode_cases import PAGE_CASES, SKETCH_CASES, assert_paged_step, assert_sketched_step
from layer_case import Case, bias_of, make
from rocketkv import dispatch
from rocketkv.core.pages import FLOAT8
from rocketkv.state.store import KVStore
from rocketkv.verify import verify_step

pytest.importorskip("numba", reason="the extra [cpu] is not installed")

# Each pair of dtypes is compiled apart: of 8-bit bounds one, of float16 no sketch.
CASES = [case for case in PAGE_CASES if case.index_dtype is None or case.dtype == torch.bfloat16]
SKETCHES = [case for case in SKETCH_CASES if case.dtype != torch.float16]


def cpu_step(
    case: Case, store: KVStore, step: tuple[Tensor, ...], sinks: Tensor | None, workspaces: dispatch.Workspaces
) -> Tensor:
    buffers = store.decoding.buffers
    store.decoding.buffers = buffers._replace(residual_bias=bias_of(case))
    query, key, value = step
    return dispatch.decode_step(query, key, value, store, case.params(sinks), backend="cpu", workspaces=workspaces)


def chosen_by(workspaces: dispatch.Workspaces) -> Tensor:
    assert workspaces.warned == set()
    *_, workspace = workspaces.buffers.values()
    listed: Tensor = workspace.chosen
    return listed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_on_pages_equal_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    plain, workspaces = copy.deepcopy(store), dispatch.Workspaces()
    for step in steps:
        found = cpu_step(case, store, step, sinks, workspaces)
        plain.append(*step[1:])
        assert_paged_step(case, store, plain, step, sinks, found, chosen_by(workspaces))


@pytest.mark.parametrize("case", SKETCHES, ids=str)
def test_steps_on_a_sketch_equal_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    plain, workspaces = copy.deepcopy(store), dispatch.Workspaces()
    for step in steps:
        found = cpu_step(case, store, step, sinks, workspaces)
        plain.append(*step[1:])
        assert_sketched_step(case, store, plain, step, sinks, found, chosen_by(workspaces))


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(700, 90), heads=6, kv_heads=2, page_size=2, top_k=200, token_budget=300),
        Case(sketch_bits=2, lengths=(420, 90), heads=10, kv_heads=2, sinks=True, biased=True, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        store, steps, sinks = make(replace(case, steps=3))
        workspaces = dispatch.Workspaces()
        found = [cpu_step(case, store, step, sinks, workspaces) for step in steps]
        results.append((*found, chosen_by(workspaces).clone(), *store.tensors().values()))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("page_size", [1, 3])
@pytest.mark.parametrize("query_is_zero", [True, False])
def test_ties_go_to_the_lowest_positions(page_size: int, query_is_zero: bool) -> None:
    case = Case(page_size=page_size, lengths=(200,))
    store, [(query, key, value)], _ = make(case)
    if query_is_zero:
        query = torch.zeros_like(query)
    else:
        liked = query.sum(1, keepdim=True)  # equal keys have equal scores, also in the open page and at a tile's end
        store.decoding.keys[:] = liked[:, :, None]
        pages = torch.cat((liked, liked), dim=-1) if page_size > 1 else liked
        store.decoding.buffers.index_tensors[0][:] = pages[:, :, None, :, None]
        key = liked
    workspaces = dispatch.Workspaces()
    cpu_step(case, store, (query, key, value), None, workspaces)
    assert chosen_by(workspaces)[0].tolist() == list(range(case.top_k))


def test_equal_keys_and_no_difference() -> None:
    """All scores of a sketch tie, and the scale is zero: the lowest positions win, and nothing is divided by zero."""
    case = Case(sketch_bits=2, head_dim=16, lengths=(140,))
    store, [(query, _, value)], _ = make(case)
    store.decoding.set_tensors({name: torch.ones_like(store.tensors()[name]) for name in ("keys", "mean")})
    store.decoding.rebuild_index(store.lens)
    workspaces = dispatch.Workspaces()
    out = cpu_step(case, store, (query, torch.ones_like(value), value), None, workspaces)
    assert chosen_by(workspaces)[0].tolist() == list(range(case.top_k))
    assert store.tensors()["scales"][0, 0, 140] == 0
    assert_near(out[0, 0], store.decoding.values[0, 0, :141].mean(0), 1e-6)


@pytest.mark.parametrize("sketch_bits", [None, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_spoils_its_own_head_group_only(bad: float, sketch_bits: int | None) -> None:
    case = Case(lengths=(200, 200), heads=4, kv_heads=2, sketch_bits=sketch_bits)
    store, [(query, key, value)], _ = make(case)
    expected = cpu_step(case, copy.deepcopy(store), (query, key, value), None, dispatch.Workspaces())
    plain = copy.deepcopy(store)
    key[0, 1, 3] = bad
    found = cpu_step(case, store, (query, key, value), None, dispatch.Workspaces())
    plain.append(key, value)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, :2], expected[0, :2])
    for name, tensor in plain.tensors().items():
        if name not in ("missed", "positions", "seq_lens"):
            written = store.tensors()[name].double()
            assert torch.equal(written.nan_to_num(7.0), tensor.double().nan_to_num(7.0)), name


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(70,), steps=14),
        Case(sketch_bits=2, head_dim=16, lengths=(70,), steps=14),
        Case(method="streaming", lengths=(74,), steps=40),
    ],
    ids=str,
)
def test_the_reference_and_the_cpu_step_take_turns(case: Case) -> None:
    """Buffers grow or roll, the row passes the budget, tokens are taken back."""
    store, steps, sinks = make(case)
    plain, workspaces, params = copy.deepcopy(store), dispatch.Workspaces(), case.params(sinks)
    for i, step in enumerate(steps):
        name = "torch" if i in (6, 11) else "cpu"
        found = dispatch.decode_step(*step, store, params, backend=name, workspaces=workspaces)
        assert_near(found, dispatch.decode_step(*step, plain, params, backend="torch"))
        if i == 9:
            store.crop(store.seen - 2)
            plain.crop(plain.seen - 2)
    assert len(workspaces.buffers) == 1
    assert workspaces.warned == set()
    assert store.seen == plain.seen
    for name, tensor in plain.tensors().items():
        if name != "missed":
            assert torch.equal(store.tensors()[name], tensor), name


def test_a_full_row_stays_as_it_is() -> None:
    case = Case(sketch_bits=2, head_dim=16, lengths=(128,))
    store, [step], _ = make(case)
    slotted = ("keys", "values", "positions", "codes", "scales")
    store.decoding.set_tensors({name: store.tensors()[name][:, :, :128].contiguous() for name in slotted})
    before = {name: tensor.clone() for name, tensor in store.tensors().items() if name != "missed"}
    store.clock()
    workspaces = dispatch.Workspaces()
    out = dispatch.kernel_step("cpu", *step, store.decoding, case.params(), workspaces)
    assert out is not None
    assert out.isfinite().all()
    for name, tensor in before.items():
        assert torch.equal(store.tensors()[name], tensor), name


def test_queries_keys_and_values_may_be_slices_of_a_fused_projection() -> None:
    case = Case(lengths=(200, 150), heads=6, kv_heads=2)
    store, [step], _ = make(case)
    other = copy.deepcopy(store)
    expected = cpu_step(case, store, step, None, dispatch.Workspaces())
    slices = torch.cat(step, dim=1).split((6, 2, 2), dim=1)
    assert not slices[0].is_contiguous()
    assert torch.equal(cpu_step(case, other, slices, None, dispatch.Workspaces()), expected)
    for name, tensor in store.tensors().items():
        assert torch.equal(other.tensors()[name], tensor), name


DRAFT = 5
DRAFTED = [
    Case(lengths=(90, 71), heads=6, kv_heads=2, steps=2 * DRAFT),
    Case(lengths=(90, 71), heads=3, sketch_bits=3, steps=2 * DRAFT, biased=True, by_largest=True),
    Case(lengths=(80,), heads=4, kv_heads=2, sketch_bits=2, steps=DRAFT, softcap=2.0, sinks=True),
    Case(method="streaming", lengths=(80, 70), steps=DRAFT),
]


@pytest.mark.parametrize("case", DRAFTED, ids=str)
def test_a_verify_step_equals_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    bias, params, workspaces = bias_of(case), case.params(sinks), dispatch.Workspaces()
    if bias is not None:
        store.decoding.buffers = store.decoding.buffers._replace(residual_bias=bias)
    plain = copy.deepcopy(store)
    for start in range(0, case.steps, DRAFT):
        draft = [torch.stack(each, dim=2) for each in zip(*steps[start : start + DRAFT], strict=True)]
        found = verify_step(*draft, store, params, backend="cpu", workspaces=workspaces)
        assert_near(found, verify_step(*draft, plain, params, backend="torch"))
        assert workspaces.warned == set()
        for name, tensor in plain.tensors().items():
            if name == "missed":
                assert_near(store.tensors()[name], tensor)
            else:
                assert torch.equal(store.tensors()[name], tensor), name


def test_other_dtypes_run_on_the_reference_and_say_so() -> None:
    case = Case(dtype=torch.float64)
    store, [step], _ = make(case)
    with pytest.warns(UserWarning, match="run on PyTorch, not on the kernels: queries are torch.float64"):
        found = dispatch.decode_step(*step, store, case.params(), backend="cpu")
    assert found.dtype == torch.float64


def test_bounds_of_8_bits_were_among_the_cases() -> None:
    assert any(case.index_dtype == FLOAT8 for case in CASES)


def test_code_of_one_function_with_other_variables_has_other_names() -> None:
    """Code from several processes is linked by names: one name for two codes would run the wrong one."""
    from rocketkv.kernels.cpu import sketch

    assert len({add.py_func.__qualname__ for add in (sketch._add_1, sketch._add_2, sketch._add_4)}) == 3
