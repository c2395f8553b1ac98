"""The kernels of a decode step, in Triton's interpreter where there is no GPU, against the PyTorch reference.

Selections compare exactly; outputs by what plain PyTorch manages in the same precision.
"""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv import dispatch as backend
from rocketkv.core.pages import TILE_PAGES
from rocketkv.state.store import KVStore

pytest.importorskip("triton", reason="Triton has no package for this platform")

from decode_cases import PAGE_CASES, assert_paged_step
from layer_case import Case, expected_logits, expected_positions, kernel_step, make, workspace_of
from rocketkv.kernels import decode, decode_shape, select_plan


def assert_scores(case: Case, workspace: decode.DecodeWorkspace, plain: KVStore, query: Tensor) -> None:
    expected = expected_logits(case, plain, query)
    found = workspace.scores.view(len(case.lengths), case.heads, -1)
    lengths = plain.decoding.buffers.seq_lens.repeat_interleave(case.heads // case.kv_heads, dim=1)
    for b, head in product(range(len(case.lengths)), range(case.heads)):
        if lengths[b, head] <= case.token_budget:
            continue  # attends to all of it
        pages = -(-int(lengths[b, head]) // case.page_size)
        assert_near(found[b, head, :pages], expected[b, head, :pages])


@pytest.mark.parametrize("case", PAGE_CASES, ids=str)
def test_steps_equal_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    for step in steps:
        found = kernel_step(case, store, workspace, step, sinks)
        plain.append(*step[1:])
        if case.method == "rocketkv" and store.stored > case.token_budget:
            assert_scores(case, workspace, plain, step[0])
        assert_paged_step(case, store, plain, step, sinks, found, workspace.chosen)


RANKED = [c for c in PAGE_CASES if c.method == "rocketkv" and c.programs == 8 and max(c.lengths) > c.token_budget]
# A choice depends on pages, groups, k, lengths and protected tokens; hardly on head dims and dtypes: a third of those.
APART = [
    c
    for i, c in enumerate(RANKED)
    if (c.head_dim == Case().head_dim and c.dtype == Case().dtype and c.index_dtype == Case().index_dtype) or i % 3 == 0
]


@pytest.mark.parametrize(("case", "several"), [(c, i % 4 > 0) for i, c in enumerate(APART)], ids=str)
def test_a_choice_in_a_launch_of_its_own(case: Case, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(decode, "SELECT_CHUNK", 256)
    # A small tree, of one level or more: of two nodes' candidates or more.
    monkeypatch.setattr(select_plan, "SELECT_BLOCKS", (32, 64, 128) if several else ())
    store, [step, *_], sinks = make(case)
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    assert workspace.separate
    assert (workspace.select_tree is not None) == several
    found = kernel_step(case, store, workspace, step, sinks)
    expected = backend.decode_step(*step, plain, case.params(sinks), backend="torch")
    assert_near(found, expected, 1e-5 if case.dtype == torch.float32 else 2e-2)
    chosen = expected_positions(case, plain, step[0], sinks).flatten(0, 1)
    for row, length in enumerate(store.decoding.buffers.seq_lens.flatten().tolist()):
        if length > case.token_budget:
            assert workspace.chosen[row].tolist() == chosen[row].tolist()
    assert workspace.finished.count_nonzero() == workspace.arrivals.count_nonzero() == 0


def test_kernels_and_reference_have_the_same_tiles() -> None:
    assert TILE_PAGES == decode_shape.TILE_PAGES
