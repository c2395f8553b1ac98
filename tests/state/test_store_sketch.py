"""A store with the sketch and the residual: what a step adds is what a rebuild would make, and leaves no trace."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive import attention
from rocketkv import dispatch
from rocketkv.budget import BudgetSplit
from rocketkv.config import RocketKVConfig
from rocketkv.core.residual import sum_values
from rocketkv.core.sketch import Sketch, rotation_matrix, write_tokens
from rocketkv.dispatch import Workspaces, decode_step
from rocketkv.state.compress import close_prompt, evict_generated
from rocketkv.state.missed import missed_mass
from rocketkv.state.protection import RowMarks
from rocketkv.state.stats import store_stats
from rocketkv.state.store import KVStore
from tracking import Tracker
from turns import (
    BUDGET,
    HKV,
    KERNEL,
    PARAMS,
    PROMPT,
    RESERVE,
    SCALING,
    SPLITS,
    WINDOW,
    D,
    H,
    Tokens,
    close,
    decode,
    extend,
    left_padding,
    prompted,
    tokens,
)

PLUS = SPLITS["rocketkv+"]
NAMES = ("codes", "scales", "mean", "balance", "value_sum")


@pytest.fixture(params=[None, [PROMPT, 33, 10]], ids=["uniform", "ragged"])
def valid(request: pytest.FixtureRequest) -> Tensor | None:
    return None if request.param is None else left_padding(request.param, PROMPT)


def in_use(store: KVStore) -> dict[str, Tensor]:
    """Return what is kept beside keys and values, zero where no token is."""
    filled = torch.arange(store.stored) < store.decoding.buffers.seq_lens[..., None]
    parts = {name: store.tensors()[name] for name in NAMES}
    parts["codes"] = parts["codes"][:, :, : store.stored] * filled[..., None]
    parts["scales"] = parts["scales"][:, :, : store.stored].float() * filled
    return parts


def assert_same(found: KVStore, expected: KVStore) -> None:
    others = in_use(expected)
    for name, tensor in in_use(found).items():
        assert tensor.equal(others[name]), name


def assert_as_rebuilt(store: KVStore) -> None:
    """Assert that all has the bits of one that is made of what is stored, with the same mean and balance."""
    other = copy.deepcopy(store)
    for name, value in (("codes", 0), ("scales", 0), ("value_sum", torch.nan)):
        other.tensors()[name].fill_(value)
    other.decoding.rebuild_index(other.lens)
    assert_same(store, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_appended_it_is_as_rebuilt(bits: int, dtype: torch.dtype, valid: Tensor | None) -> None:
    given, late = (
        Tokens(*(tensor.to(dtype) for tensor in (part.query, part.key, part.value)))
        for part in (tokens(3, PROMPT), tokens(3, 2 * RESERVE + 3))  # it grows on the way
    )
    store = prompted(given, replace(PLUS, sketch_bits=bits), valid)
    assert_as_rebuilt(store)
    decode(store, late)
    assert_as_rebuilt(store)
    assert store.tensors()["codes"].shape[:3] == store.decoding.keys.shape[:3]


@pytest.mark.parametrize("static", [None, 3 * RESERVE], ids=["grows", "static"])
def test_a_token_that_was_taken_back_leaves_no_trace(static: int | None, valid: Tensor | None) -> None:
    given, early, late = tokens(3, PROMPT), tokens(3, 4), tokens(3, 6)
    stores = []
    for _ in range(2):
        store = KVStore()
        extend(store, given, valid)
        close_prompt(store, PLUS, PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=static)
        decode(store, early)
        stores.append(store)
    straight, cropped = stores
    # As large as a float32 gets beside numbers of everyday size: in a running sum of floats it would stay behind.
    wrong = tokens(3, 5)
    wrong.value.mul_(1e4)
    wrong.value[0, 0, 2] = torch.nan
    decode(cropped, wrong)
    cropped.crop(PROMPT + 4)
    assert_same(cropped, straight)
    assert decode(cropped, late).equal(decode(straight, late))
    assert_same(cropped, straight)


def test_a_crop_reads_the_values_that_it_removes_and_no_others(valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), PLUS, valid)
    decode(store, tokens(3, 5))
    with Tracker(known=store.tensors().values()) as tracker:
        store.crop(store.seen - 2)
    assert tracker.largest[0] <= max(
        8 * 3 * HKV * 2 * store.decoding.values.shape[3], 8 * store.decoding.positions.numel()
    )
    assert tracker.syncs() == ["_local_scalar_dense"]
    assert_as_rebuilt(store)


def test_a_way_back_over_reordered_rows(valid: Tensor | None) -> None:
    store = KVStore()
    extend(store, tokens(3, PROMPT), valid)
    close_prompt(store, PLUS, PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=RESERVE)
    decode(store, tokens(3, 3))
    expected, taken, late = copy.deepcopy(store), store.snapshot(), tokens(3, 5)
    store.map(lambda tensor: tensor.index_select(0, torch.tensor([2, 0, 0])))
    decode(store, tokens(3, 2))
    store.restore(taken)
    assert_same(store, expected)
    assert decode(store, late).equal(decode(expected, late))


def test_what_is_evicted_of_the_generated_tokens_goes_everywhere(valid: Tensor | None) -> None:
    store = KVStore()
    extend(store, tokens(3, PROMPT), valid)
    settings = {"decode_reserve": RESERVE, "decode_capacity": RESERVE}
    close_prompt(store, PLUS, PARAMS, kernel_size=KERNEL, ring_size=WINDOW, **settings)
    before = {name: store.tensors()[name].data_ptr() for name in NAMES}
    mean = store.tensors()["mean"].clone()
    decode(store, tokens(3, RESERVE))
    evict_generated(store, RESERVE // 2, PARAMS, kernel_size=KERNEL)
    assert_as_rebuilt(store)
    assert store.tensors()["mean"].equal(mean)
    decode(store, tokens(3, RESERVE // 2))
    assert_as_rebuilt(store)
    assert {name: store.tensors()[name].data_ptr() for name in NAMES} == before


def test_another_prompt_has_a_mean_of_its_own(valid: Tensor | None) -> None:
    store = prompted(tokens(3, PROMPT), PLUS, valid)
    decode(store, tokens(3, 3))
    question = tokens(3, 20)
    question.key.add_(5)
    extend(store, question)
    assert store.tensors().keys().isdisjoint(NAMES)
    close(store, PLUS)
    keys, _, _, seq_lens = store.decoding.buffers[:4]
    for row in range(3):
        for head in range(HKV):
            held = keys[row, head, : int(seq_lens[row, head])]
            assert_near(store.tensors()["mean"][row, head], held.mean(0))
    assert_as_rebuilt(store)


def test_protected_tokens_are_attended_to_whatever_the_sketch_says() -> None:
    given, late = tokens(1, PROMPT), tokens(1, 9)
    given.key[:, :, 20:23] = -10 * late.query[:, ::3, :1]  # nothing could rank lower
    marked, plain = KVStore(), KVStore()
    marked.marks = (RowMarks(protected=((20, 23),)),)
    for store in (marked, plain):
        extend(store, given)
        close(store, replace(PLUS, kept_tokens=30))
    assert marked.decoding.positions[0, :, :3].tolist() == [[20, 21, 22]] * HKV
    assert (marked.stored, plain.stored) == (33, 30)
    assert marked.decoding.split.top_k == PLUS.top_k + 3  # type: ignore[operator]
    decode(marked, late)
    assert_as_rebuilt(marked)


@pytest.mark.parametrize("padded", [False, True])
def test_within_the_budget_it_is_plain_attention(padded: bool) -> None:
    given, late = tokens(2, BUDGET - 5), tokens(2, 5)
    valid = left_padding([BUDGET - 5, 4], BUDGET - 5) if padded else None
    found, expected = (decode(prompted(given, split, valid), late) for split in (PLUS, SPLITS["full"]))
    assert found.equal(expected)


def test_the_missed_weight_is_that_of_the_others() -> None:
    # With four bits and few channels an estimate is nearly exact.
    store = prompted(tokens(2, PROMPT), replace(PLUS, sketch_bits=4, top_k=6, by_largest=False))
    given = tokens(2, 3)
    decode(store, given[:2])
    before = store.tensors()["missed"].data_ptr()
    decode(store, given[2:])
    assert store.tensors()["missed"].data_ptr() == before
    assert store.tensors()["missed"].shape == (2, H)
    keys = store.decoding.keys[:, :, : store.stored].repeat_interleave(H // HKV, 1)
    weights = torch.einsum("bhd,bhnd->bhn", given.query[:, :, 2] * SCALING, keys).softmax(-1)
    shared = weights.view(2, HKV, H // HKV, -1).sum(2)
    chosen = shared.topk(6, dim=-1).indices.repeat_interleave(H // HKV, 1)
    missed = missed_mass(store)
    assert missed is not None
    assert (missed - (1 - weights.gather(-1, chosen).sum(-1))).abs().max() < 0.1


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_residual_beside_pages(page_size: int, valid: Tensor | None) -> None:
    # Where all keys are alike, so are all weights and bounds: with the mean of the others it is attention to all.
    split = BudgetSplit(token_budget=16, kept_tokens=40, page_size=page_size, channels=D, top_k=8, residual=True)
    given, late = tokens(3, PROMPT), tokens(3, 5)
    for part in (given, late):
        part.key.fill_(0.5)
    store = prompted(given, split, valid)
    out = decode(store, late)
    keys, values, _, seq_lens = store.decoding.buffers[:4]
    seen = [[range(int(length)) for length in row] for row in seq_lens]
    assert_near(out[:, :, -1], attention(late.query[:, :, -1], keys, values, SCALING, seen))
    assert store.tensors()["value_sum"].equal(sum_values(values, store.stored, seq_lens))


def test_sums_do_not_depend_on_blocks_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 3, 500, 7) * torch.logspace(-8, 2, 7)
    lengths = torch.tensor([[500, 3, 77], [0, 1, 499]])
    whole = sum_values(values, 500, lengths)
    for count, row in zip(lengths.flatten().tolist(), range(6), strict=True):
        own = values.flatten(0, 1)[row, :count]
        assert_near(whole.flatten(0, 1)[row], own.double().sum(0), 1e-7)
    monkeypatch.setattr("rocketkv.core.scratch.CPU_BYTES", 8 * 2 * 3 * 7 * 13)
    assert sum_values(values, 500, lengths).equal(whole)
    order = torch.randperm(500)
    assert sum_values(values[:, :, order], 500).equal(sum_values(values, 500))


def test_bytes_are_those_of_codes_scales_and_means() -> None:
    store = prompted(tokens(2, PROMPT), PLUS)
    found, rows, capacity = store_stats(store), 2 * HKV, store.capacity
    value_dim = store.decoding.values.shape[3]
    assert found.index_bytes == rows * (capacity * (D // 4 + 2) + 6 * D + 8 * value_dim) + 2 * 4 * H
    stored, k = store.stored + 1, PLUS.top_k or 0
    read = stored * (D // 4 + 2)
    assert found.nominal_step_bytes == rows * (read + 2 * D + 2 * (k + 1) * (D + value_dim))
    assert found.step_bytes == rows * (read + 6 * D + 8 * value_dim + 4 * k * (D + value_dim))


def test_the_kernels_leave_a_residual_of_pages_to_pytorch_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rocketkv.kernels.decode", reason="Triton has no package for this platform")
    monkeypatch.setattr(dispatch, "backend_name", lambda *_: "triton")
    workspaces = Workspaces()
    store = prompted(tokens(1, PROMPT), replace(PLUS, sketch_bits=None, channels=4, calibrated=False))
    other = copy.deepcopy(store)
    given = tokens(1, 3)

    def step(i: int) -> Tensor:
        token = (given.query[:, :, i], given.key[:, :, i], given.value[:, :, i])
        return decode_step(*token, store, PARAMS, workspaces=workspaces)

    with pytest.warns(UserWarning, match="needs the scores of a sketch; the kernels have it for no other"):
        found = step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(1)
    monkeypatch.undo()
    assert found.equal(decode(other, given[:1])[:, :, 0])


def test_a_static_store_without_room_refuses_and_stays_whole() -> None:
    store = KVStore()
    extend(store, tokens(1, PROMPT))
    close_prompt(store, PLUS, PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=3)
    decode(store, tokens(1, 3))
    before = copy.deepcopy(store)
    with pytest.raises(ValueError, match="decode_capacity=3"):
        decode(store, tokens(1, 1))
    assert_same(store, before)
    assert_as_rebuilt(store)


def test_the_index_of_pages_has_a_dtype_and_the_sketch_has_not() -> None:
    with pytest.raises(ValueError, match="index_dtype='float8_e5m2' is for the bounds of pages"):
        RocketKVConfig(method="rocketkv+", index_dtype="float8_e5m2")
    with pytest.raises(ValueError, match="is for the bounds of pages"):
        RocketKVConfig(split=BudgetSplit(token_budget=8, sketch_bits=2, top_k=4), index_dtype="float8_e5m2")


def test_tokens_written_one_by_one_are_those_of_the_buffer() -> None:
    store = prompted(tokens(2, PROMPT), PLUS)
    expected = copy.deepcopy(store)
    late = tokens(2, 4)
    decode(store, late)
    sketch = {name: tensor.clone() for name, tensor in expected.decoding.named_index().items()}
    write_tokens(Sketch(**sketch), late.key, expected.stored, rotation_matrix(D), 2)
    for name, tensor in sketch.items():
        assert tensor.equal(store.tensors()[name]), name
