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
from rocketkv.core.pages import FLOAT8, TILE_PAGES
from rocketkv.state.store import KVStore

pytest.importorskip("triton", reason="Triton has no package for this platform")

from layer_case import DEVICE, HALF, Case, expected_logits, expected_positions, kernel_step, make, workspace_of
from rocketkv.kernels import decode, score_plan, select_plan

CASES = [
    Case(),
    # Pages: one token, powers of two and not, the largest; the last full, or with one token, or one short.
    *(Case(page_size=p, lengths=(n,)) for p, n in product((1, 2, 3, 4, 5, 7, 8, 16), (179, 209))),
    # Head dims, values of another width, and groups: MHA, MQA, powers of two and not.
    *(Case(head_dim=d, channels=d // 3, dtype=HALF[d // 16 % 2]) for d in (80, 96, 128, 192, 256)),
    *(Case(head_dim=d, channels=d, page_size=1) for d in (16, 40, 64)),
    Case(head_dim=64, value_dim=32),
    Case(head_dim=32, value_dim=80, dtype=torch.bfloat16),
    *(Case(heads=g * h, kv_heads=h) for g, h in ((1, 4), (3, 3), (7, 2), (8, 1), (17, 1), (71, 1))),
    # Channels and tokens: few, odd, all.
    *(Case(channels=r, top_k=k, token_budget=2 * k) for r, k in ((1, 1), (1, 40), (33, 5), (64, 61), (63, 96))),
    Case(top_k=5, token_budget=150),
    # Precisions, soft-cap and learned sinks, over more than one tile of pages and more than one part.
    *(
        Case(dtype=dtype, page_size=p, softcap=cap, sinks=sinks, lengths=(411,))
        for dtype, p, (cap, sinks) in product(
            (torch.float32, *HALF), (1, 2), ((None, False), (4.0, False), (None, True), (30.0, True))
        )
    ),
    *(Case(lengths=(700,), page_size=1, programs=n, top_k=200, token_budget=400) for n in (1, 2, 3, 64)),
    # Rows of different lengths: within the budget, one token, and each with an open page of its own.
    Case(lengths=(200, 199), heads=6, kv_heads=2, steps=3),
    Case(lengths=(200, 131), heads=6, kv_heads=2, by_largest=True),
    Case(lengths=(200, 74, 73, 75, 1)),
    Case(lengths=(12, 200), page_size=1),
    Case(lengths=(130, 200, 91), dtype=torch.bfloat16, page_size=4),
    Case(lengths=(20,)),
    Case(lengths=(1,)),
    Case(lengths=(73,), steps=6),
    # Protected tokens, whole pages and parts of one, before all others.
    *(Case(protected=n, page_size=p, lengths=(200, 91), heads=6, kv_heads=2) for n, p in ((1, 3), (12, 3), (30, 1))),
    Case(protected=13, page_size=5, lengths=(411,), softcap=4.0, sinks=True, steps=2),
    # Bounds in 8 bits.
    *(
        Case(index_dtype=FLOAT8, dtype=dtype, page_size=p, lengths=(200, 131), steps=3)
        for dtype, p in product((torch.float32, *HALF), (1, 2, 3))
    ),
    *(Case(index_dtype=FLOAT8, dtype=d, lengths=(411,), heads=7, softcap=4.0, sinks=True) for d in HALF),
    # The parts that read without choosing.
    *(Case(method=m, lengths=n, dtype=d) for m in ("full", "streaming") for n in ((200,), (200, 60, 3)) for d in HALF),
    Case(method="streaming", lengths=(200,), softcap=5.0, sinks=True),
    Case(method="full", lengths=(1, 300), softcap=5.0, sinks=True, programs=64),
]


def read_by(case: Case, length: int, chosen: Tensor) -> Tensor:
    """Return which slots a row of this length attends to."""
    if length <= case.token_budget or case.method == "full":
        return torch.arange(length)
    if case.method == "streaming":
        return torch.cat((torch.arange(4), torch.arange(length - case.top_k + 4, length)))
    return chosen.long().cpu()


def attention(
    case: Case, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Attend in one precision from [G, D] over [k, D], by the definition."""
    query, keys, values = (tensor.cpu().to(dtype) for tensor in (query, keys, values))
    logits = query @ keys.T * case.head_dim**-0.5
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    if sinks is None:
        return logits.softmax(-1) @ values
    return torch.cat((logits, sinks.cpu().to(dtype)[:, None]), dim=-1).softmax(-1)[:, :-1] @ values


def assert_scores(case: Case, workspace: decode.DecodeWorkspace, plain: KVStore, query: Tensor) -> None:
    expected = expected_logits(case, plain, query)
    found = workspace.scores.view(len(case.lengths), case.heads, -1)
    lengths = plain.decoding.buffers.seq_lens.repeat_interleave(case.heads // case.kv_heads, dim=1)
    for b, head in product(range(len(case.lengths)), range(case.heads)):
        if lengths[b, head] <= case.token_budget:
            continue  # attends to all of it
        pages = -(-int(lengths[b, head]) // case.page_size)
        assert_near(found[b, head, :pages], expected[b, head, :pages])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_the_reference(case: Case) -> None:
    store, steps, sinks = make(case)
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    ranked = case.method == "rocketkv"
    group = case.heads // case.kv_heads
    for query, key, value in steps:
        found = kernel_step(case, store, workspace, (query, key, value), sinks)
        plain.append(key, value)
        known = plain.tensors()
        assert set(known) == {"keys", "values", "positions", "seq_lens", *(["bounds"] if ranked else [])}
        for name, tensor in store.tensors().items():
            assert torch.equal(tensor.double(), known[name].double()), name
        keys, values, _, seq_lens = store.decoding.buffers[:4]
        chosen = expected_positions(case, plain, query, sinks) if ranked else None
        if ranked and store.stored > case.token_budget:
            assert_scores(case, workspace, plain, query)
        errors, allowed = [], []
        for b, h in product(range(len(case.lengths)), range(case.kv_heads)):
            length = int(seq_lens[b, h])
            mine = workspace.chosen.view(len(case.lengths), case.kv_heads, -1)[b, h] if ranked else torch.empty(0)
            if chosen is not None and length > case.token_budget:
                assert mine[: chosen.shape[-1]].tolist() == chosen[b, h].tolist()
            at = read_by(case, length, mine[: min(case.top_k, length)]).to(DEVICE)
            heads = slice(h * group, (h + 1) * group)
            given = (query[b, heads], keys[b, h, at], values[b, h, at])
            own = None if sinks is None else sinks[heads]
            exact = attention(case, *given, own, torch.float64)
            low = attention(case, *given, own, case.dtype)
            errors.append((found[b, heads].cpu().double() - exact).abs().max())
            allowed.append((low.double() - exact).abs().max())
        # The largest of a step: a single row's may be zero by luck. Float32 rounds to 1e-7, which is noise.
        bound = 1e-6 if case.dtype == torch.float32 else 2 * max(allowed)
        assert max(errors) <= bound, (max(errors), bound)


RANKED = [c for c in CASES if c.method == "rocketkv" and c.programs == 8 and max(c.lengths) > c.token_budget]
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
    assert TILE_PAGES == score_plan.TILE_PAGES
