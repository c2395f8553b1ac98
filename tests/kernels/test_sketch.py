"""Decode steps on a sketch by the kernels, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv import dispatch as backend
from rocketkv.core.residual import residual_attend
from rocketkv.state.missed import missed_mass
from rocketkv.state.store import KVStore

pytest.importorskip("triton", reason="Triton has no package for this platform")

import triton
import triton.language as tl

from decode_cases import SKETCH_CASES, assert_sketched_step
from layer_case import DEVICE, Case, bias_of, expected_logits, expected_positions, kernel_step, make, workspace_of
from rocketkv.kernels import append_sketch, decode, digits, score_plan, select_plan
from rocketkv.kernels.decode_shape import SketchRule


def assert_step(
    case: Case,
    store: KVStore,
    plain: KVStore,
    workspace: decode.DecodeWorkspace,
    step: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
) -> None:
    found = kernel_step(case, store, workspace, step, sinks, bias_of(case))
    plain.append(*step[1:])
    assert_sketched_step(case, store, plain, step, sinks, found, workspace.chosen, workspace.scores)


@pytest.mark.parametrize("case", SKETCH_CASES, ids=str)
def test_steps_equal_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    for step in steps:
        assert_step(case, store, plain, workspace, step, sinks)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # One program a row; a tree of one level, and of several.
        (Case(sketch_bits=2, head_dim=16, heads=3, lengths=(300, 90), sinks=True, by_largest=True), ()),
        (Case(sketch_bits=2, head_dim=16, lengths=(150, 20), programs=1, by_largest=True, biased=True), (256,)),
        (Case(sketch_bits=3, head_dim=16, lengths=(300,), programs=64, protected=3), (128,)),
        (
            Case(
                sketch_bits=2, head_dim=16, heads=4, kv_heads=2, lengths=(140, 90), programs=64, sinks=True,
                biased=True, top_k=16, token_budget=50,
            ),
            (32,),
        ),
        (Case(sketch_bits=2, head_dim=16, heads=3, lengths=(100, 40, 260), top_k=15, by_largest=True), (32,)),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_in_a_launch_of_its_own(case: Case, blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(decode, "SELECT_CHUNK", 256)
    monkeypatch.setattr(select_plan, "SELECT_BLOCKS", blocks)
    store, [step], sinks = make(case)
    workspace = workspace_of(case, store)
    assert workspace.separate
    assert (workspace.select_tree is None) == (not blocks)
    assert_step(case, store, copy.deepcopy(store), workspace, step, sinks)


@pytest.mark.parametrize("programs", [1, 64])
def test_a_bias_weighs_what_is_not_read_and_no_more(programs: int) -> None:
    case = Case(sketch_bits=2, head_dim=16, heads=4, kv_heads=2, lengths=(150, 20), programs=programs, biased=True)
    store, [step], _ = make(case)
    bias = bias_of(case)
    assert bias is not None

    def stepped(given: Tensor | None) -> tuple[Tensor, Tensor]:
        other = copy.deepcopy(store)
        out = kernel_step(case, other, workspace_of(case, other), step, None, given)
        return out, other.tensors()["missed"]

    out, missed = stepped(None)
    for found, expected in zip(stepped(torch.zeros_like(bias)), (out, missed), strict=True):
        assert torch.equal(found, expected)
    biased, more = stepped(bias)
    # A row within the budget leaves nothing out. In the other the odds of what is left out are multiplied.
    assert torch.equal(biased[1], out[1])
    assert (more[1] == 0).all()
    assert_near(more[0].logit(), missed[0].logit() + bias[0], 1e-5)
    # A bias that rows share, and one that leaves nothing.
    for found, expected in zip(stepped(bias[:1].expand(2, -1)), (biased, more), strict=True):
        assert torch.equal(found, expected)
    assert (stepped(torch.full_like(bias, -200.0))[1] == 0).all()


def test_a_bias_is_what_the_reference_adds() -> None:
    case = Case(
        sketch_bits=2, head_dim=16, value_dim=24, heads=6, kv_heads=2, lengths=(150, 91), softcap=4.0, sinks=True,
        biased=True,
    )  # fmt: skip
    store, [step], sinks = make(case)
    bias = bias_of(case)
    found = kernel_step(case, store, workspace_of(case, store), step, sinks, bias)
    query, positions = step[0], expected_positions(case, store, step[0], sinks)
    buffers, logits = store.decoding.buffers, expected_logits(case, store, query)
    assert buffers.value_sum is not None
    given = query, buffers.keys, buffers.values, positions, logits, buffers.value_sum, case.params(sinks)
    out, missed = residual_attend(*given, bias=bias, lengths=buffers.seq_lens)
    assert_near(found, out)
    assert buffers.missed is not None
    assert_near(buffers.missed, missed)


@triton.jit
def _unpacked(codes, out, WIDTH: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, SUBNORMAL: tl.constexpr):
    token = tl.arange(0, 256)
    words = digits.words_of(codes, token, token < 256, SIZE, 0, SIZE, WORDS)
    found = digits.digits_of(words, WIDTH, SUBNORMAL)
    line = tl.arange(0, WORDS * 32 // WIDTH)
    tl.store(out + line[:, None] * 256 + token[None, :], found.to(tl.float32))


@pytest.mark.parametrize("subnormal", [True, False])
@pytest.mark.parametrize(("width", "head_dim"), [(1, 32), (1, 40), (2, 32), (2, 72), (4, 16)])
def test_digits_of_all_bytes_come_in_the_order_of_the_rotation(width: int, head_dim: int, subnormal: bool) -> None:
    size, words = head_dim * width // 8, append_sketch.code_words(head_dim, width)
    # Every byte takes every value, each in an order of its own.
    codes = (torch.arange(256)[:, None] * (2 * torch.arange(size) + 1) % 256).to(DEVICE, torch.uint8)
    out = torch.empty(words * 32 // width, 256, device=DEVICE)
    _unpacked[(1,)](codes, out, width, size, words, subnormal)
    channel = torch.arange(head_dim)
    digit, byte = channel // size, channel % size
    expected = codes.cpu().int()[:, byte] & ((1 << width) - 1) << (digit * width)
    order = append_sketch.arranged(torch.eye(head_dim), SketchRule(width, 256, 1.0, 1.0))[:head_dim]
    found = order @ out.cpu() * (2.0**24 if subnormal else 1.0)
    assert torch.equal(found.T, expected.float())


@pytest.mark.parametrize("bits", [2, 3])
def test_devices_without_subnormal_products(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_plan, "SUBNORMALS", False)
    case = Case(sketch_bits=bits, head_dim=16, lengths=(140,), softcap=4.0)
    store, [step], sinks = make(case)
    assert_step(case, store, copy.deepcopy(store), workspace_of(case, store), step, sinks)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_spoils_its_own_head_group_only(bad: float) -> None:
    case = Case(sketch_bits=2, head_dim=16, lengths=(140,), heads=4, kv_heads=2)
    store, [(query, key, value)], _ = make(case)
    expected = kernel_step(case, copy.deepcopy(store), workspace_of(case, store), (query, key, value), None)
    plain = copy.deepcopy(store)
    key[0, 1, 3] = bad
    found = kernel_step(case, store, workspace_of(case, store), (query, key, value), None)
    plain.append(key, value)
    assert torch.equal(found[0, :2], expected[0, :2])
    assert torch.equal(store.tensors()["codes"], plain.tensors()["codes"])
    assert torch.equal(store.tensors()["scales"].isnan(), plain.tensors()["scales"].isnan())


def test_equal_keys_and_no_difference() -> None:
    """All scores tie, and the scale is zero: the lowest positions win, and nothing is divided by zero."""
    case = Case(sketch_bits=2, head_dim=16, lengths=(140,))
    store, [(query, _, value)], _ = make(case)
    store.decoding.set_tensors({name: torch.ones_like(store.tensors()[name]) for name in ("keys", "mean")})
    store.decoding.rebuild_index(store.lens)
    workspace = workspace_of(case, store)
    out = kernel_step(case, store, workspace, (query, torch.ones_like(value), value), None)
    assert workspace.chosen[0].tolist() == list(range(case.top_k))
    assert store.tensors()["scales"][0, 0, 140] == 0
    assert_near(out[0, 0], store.decoding.values[0, 0, :141].mean(0), 1e-6)


def test_a_full_row_stays_as_it_is() -> None:
    case = Case(sketch_bits=2, head_dim=16, lengths=(128,))
    store, [step], _ = make(case)
    slotted = ("keys", "values", "positions", "codes", "scales")
    store.decoding.set_tensors({name: store.tensors()[name][:, :, :128].contiguous() for name in slotted})
    before = {name: tensor.clone() for name, tensor in store.tensors().items() if name != "missed"}
    out = kernel_step(case, store, workspace_of(case, store), step, None)
    assert out.isfinite().all()
    for name, tensor in before.items():
        assert torch.equal(store.tensors()[name], tensor), name


def test_the_reference_and_the_kernels_take_turns() -> None:
    """Through the backend: buffers grow, the row passes the budget, tokens are taken back; one workspace serves all."""
    case = Case(sketch_bits=2, head_dim=16, lengths=(70,), steps=14)
    store, steps, _ = make(case)
    plain = copy.deepcopy(store)
    workspaces, params = backend.Workspaces(), case.params()
    for i, step in enumerate(steps):
        name = "torch" if i in (6, 11) else "triton"
        found = backend.decode_step(*step, store, params, backend=name, workspaces=workspaces)
        assert_near(found, backend.decode_step(*step, plain, params, backend="torch"))
        if i == 9:
            store.crop(store.seen - 2)
            plain.crop(plain.seen - 2)
        missed, expected = missed_mass(store), missed_mass(plain)
        assert missed is not None
        assert expected is not None
        assert_near(missed, expected)
    assert len(workspaces.buffers) == 1
    assert store.capacity == plain.capacity > 78
    for name in ("codes", "value_sum"):
        assert torch.equal(store.tensors()[name], plain.tensors()[name])


def test_equal_steps_give_equal_bits_in_one_place() -> None:
    case = Case(sketch_bits=2, head_dim=16, lengths=(300,), programs=7)
    store, [step], _ = make(case)
    other = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    first = kernel_step(case, store, workspace, step, None)
    assert torch.equal(kernel_step(case, other, workspace, step, None), first)
    assert int(workspace.arrivals.abs().sum()) == 0
