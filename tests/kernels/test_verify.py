"""A verify step of the kernels equals the reference's: outputs, selections and everything that is stored."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_near
from layer_case import Case, bias_of, make
from rocketkv import dispatch as backend
from rocketkv.core.topk import select
from rocketkv.core.verify import by_kv_head, of_queries
from rocketkv.kernels import decode
from rocketkv.kernels.decode_shape import DecodeShape, SketchRule
from rocketkv.state.store import KVStore
from rocketkv.verify import verify_step

DRAFT = 5
# Rows cross pages, and the budget of 74; the buffers have room for eight tokens.
CASES = [
    Case(lengths=(90, 71), heads=6, kv_heads=2, steps=2 * DRAFT),
    Case(lengths=(90,), heads=4, kv_heads=4, head_dim=32, page_size=1, channels=9, steps=DRAFT, protected=5),
    Case(lengths=(90, 71), heads=3, sketch_bits=3, steps=2 * DRAFT, biased=True, by_largest=True),
    Case(lengths=(80,), heads=4, kv_heads=2, sketch_bits=2, steps=DRAFT, softcap=2.0, sinks=True),
    Case(method="streaming", lengths=(80, 70), steps=DRAFT),
    Case(method="full", lengths=(40, 21), steps=DRAFT, sinks=True),
]


def chosen_by_reference(case: Case, store: KVStore, query: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each query's positions [B, n Hkv, k] of a store that has the draft, and its tokens [B, n Hkv]."""
    decoding, count = store.decoding, query.shape[2]
    own, params = of_queries(0, count, count, decoding.buffers, None, case.params(sinks))
    rows, lengths = by_kv_head(query, decoding.buffers), own.seq_lens
    assert decoding.index is not None
    logits = decoding.index.score(rows, own.index_tensors, own.keys, params, stored=store.stored, lengths=lengths)
    shape: dict[str, Any] = {"unit_size": case.split.page_size, "kv_heads": lengths.shape[1], "sinks": params.sinks}
    rule: dict[str, Any] = {"protected": case.protected, "by_largest": case.by_largest}
    return select(logits, case.top_k, stored=store.stored, lengths=lengths, **shape, **rule)[0], lengths


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_verify_step_equals_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    bias, params, workspaces = bias_of(case), case.params(sinks), backend.Workspaces()
    if bias is not None:
        store.decoding.buffers = store.decoding.buffers._replace(residual_bias=bias)
    plain = copy.deepcopy(store)
    for start in range(0, case.steps, DRAFT):
        draft = [torch.stack(each, dim=2) for each in zip(*steps[start : start + DRAFT], strict=True)]
        found = verify_step(*draft, store, params, backend="triton", workspaces=workspaces)
        expected = verify_step(*draft, plain, params, backend="torch")
        assert_near(found, expected)
        assert workspaces.warned == set()
        own, others = store.tensors(), plain.tensors()
        for name, tensor in others.items():
            if name == "missed":
                assert_near(own[name], tensor)
            else:
                assert torch.equal(own[name], tensor), name
        assert int(store.clock()) == store.seen == plain.seen
        (workspace,) = workspaces.buffers.values()
        if workspace.shape.scored and start == 0:
            positions, lengths = chosen_by_reference(case, plain, draft[0], sinks)
            listed = workspace.chosen.view(positions.shape)
            over = lengths > case.token_budget
            assert over.any()
            assert torch.equal(listed[over], positions[over])


def test_a_draft_of_another_cut_than_a_step_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program a row attends, with code for the several that a decode step has."""
    monkeypatch.setattr(decode, "DecodeWorkspace", partial(decode.DecodeWorkspace, programs=4))
    case = Case(lengths=(90,), heads=2, head_dim=16, sketch_bits=2, steps=DRAFT)
    store, steps, _ = make(case)
    plain, draft = copy.deepcopy(store), [torch.stack(each, dim=2) for each in zip(*steps, strict=True)]
    workspaces = backend.Workspaces()
    found = verify_step(*draft, store, case.params(), backend="triton", workspaces=workspaces)
    assert_near(found, verify_step(*draft, plain, case.params(), backend="torch"))
    (workspace,) = workspaces.buffers.values()
    assert (workspace.parts, workspace.part_block) == (1, 2)


@pytest.mark.parametrize("programs", [1, 132])
@pytest.mark.parametrize(("pages", "sketch_bits"), [(700, None), (20000, None), (7000, 2)])
def test_a_verify_step_compiles_nothing_anew(pages: int, sketch_bits: int | None, programs: int) -> None:
    split: dict[str, Any] = {"page_size": 3, "channels": 40} if sketch_bits is None else {"page_size": 1}
    rule = None if sketch_bits is None else SketchRule(sketch_bits, 256, 8.0, 1.0)
    shape = DecodeShape(
        batch=1, heads=32, kv_heads=8, head_dim=64, value_dim=64, capacity=pages * split["page_size"], top_k=512,
        token_budget=1024, sinks=None, sketch=rule, residual=rule is not None, **{"channels": None, **split},
    )  # fmt: skip
    constants = []
    for count in (1, 2, 7, 40):
        drafted = replace(shape, heads=32 * count, kv_heads=8 * count, queries=count)
        rotation = None if rule is None else torch.empty(64, 64, device="meta")
        space = decode.DecodeWorkspace(drafted, torch.device("meta"), programs, rotation=rotation)
        dtypes = torch.bfloat16, torch.bfloat16
        chosen = space.select_launch() if space.separate else None
        constants.append((space.first_launch(*dtypes, 0), chosen, space.attend_launch(*dtypes)))
        assert space.parts <= space.part_block
        assert space.splits <= space.split_block
    assert constants[1:] == 3 * constants[:1]


def test_a_long_draft_is_read_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lengths=(90,), steps=6)
    store, steps, _ = make(case)
    plain, draft = copy.deepcopy(store), [torch.stack(each, dim=2) for each in zip(*steps, strict=True)]
    monkeypatch.setattr("rocketkv.verify.SCORE_BYTES", 2 * case.heads * store.capacity * 4)
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)  # the choice is a launch of its own
    workspaces = backend.Workspaces()
    found = verify_step(*draft, store, case.params(), backend="triton", workspaces=workspaces)
    assert_near(found, verify_step(*draft, plain, case.params(), backend="torch"))
    (workspace,) = workspaces.buffers.values()
    assert workspace.shape.queries == 2
    assert workspace.separate
