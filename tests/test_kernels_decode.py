"""The kernels of a decode step, in Triton's interpreter where there is no GPU, against the PyTorch reference.

Selections compare exactly; outputs by what plain PyTorch manages in the same precision.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rocketkv import backend
from rocketkv.attention import score
from rocketkv.attention import select as select_tokens
from rocketkv.budget import BudgetSplit
from rocketkv.index import FLOAT8
from rocketkv.store import KVStore

from .close import assert_near

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv.kernels import decode, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = 4


@dataclass(frozen=True)
class Case:
    """One layer in the middle of decoding; `lengths` are the tokens of its rows, the longest of them the buffer's."""

    lengths: tuple[int, ...] = (200,)
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    page_size: int = 3
    channels: int = 20
    top_k: int = 37
    token_budget: int = 74
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype | None = None
    softcap: float | None = None
    sinks: bool = False
    programs: int = 8
    method: str = "rocketkv"
    steps: int = 1

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "") or "plain"

    @property
    def split(self) -> BudgetSplit:
        common: dict[str, Any] = {"token_budget": self.token_budget}
        if self.method == "full":
            return BudgetSplit(**common, kept_tokens=None, page_size=1, channels=None, top_k=None)
        if self.method == "streaming":
            return BudgetSplit(**common, kept_tokens=None, page_size=1, channels=None, top_k=self.top_k, sinks=4)
        return BudgetSplit(
            **common, kept_tokens=None, page_size=self.page_size, channels=self.channels, top_k=self.top_k
        )


HALF = (torch.float16, torch.bfloat16)
INDEX8 = [dtype for dtype in FLOAT8 if decode.index_refusal(dtype, backend._capability(DEVICE)) is None]
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
    Case(lengths=(200, 74, 73, 75, 1)),
    Case(lengths=(12, 200), page_size=1),
    Case(lengths=(130, 200, 91), dtype=torch.bfloat16, page_size=4),
    Case(lengths=(20,)),
    Case(lengths=(1,)),
    Case(lengths=(73,), steps=6),
    # Bounds in 8 bits.
    *(
        Case(index_dtype=index, dtype=dtype, page_size=p, lengths=(200, 131), steps=3)
        for index, dtype, p in product(INDEX8, (torch.float32, *HALF), (1, 2, 3))
    ),
    *(Case(index_dtype=i, dtype=d, lengths=(411,), heads=7, softcap=4.0, sinks=True) for i in INDEX8 for d in HALF),
    # The parts that read without choosing.
    *(Case(method=m, lengths=n, dtype=d) for m in ("full", "streaming") for n in ((200,), (200, 60, 3)) for d in HALF),
    Case(method="streaming", lengths=(200,), softcap=5.0, sinks=True),
    Case(method="full", lengths=(1, 300), softcap=5.0, sinks=True, programs=64),
]


def make(case: Case, seed: int = 0) -> tuple[KVStore, list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
    """Return a store of the case, what its steps append and ask, and the model's sinks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, case.dtype)

    batch, longest = len(case.lengths), max(case.lengths)
    value_dim = case.value_dim or case.head_dim
    store = KVStore()
    valid = torch.arange(longest, device=DEVICE) >= longest - torch.tensor(case.lengths, device=DEVICE)[:, None]
    keys = normal(batch, case.kv_heads, longest, case.head_dim)
    values = normal(batch, case.kv_heads, longest, value_dim)
    store.extend(keys, values, None if bool(valid.all()) else valid)
    store.remember_queries(normal(batch, case.heads, min(WINDOW, longest), case.head_dim), WINDOW)
    settings: dict[str, Any] = {"scaling": case.head_dim**-0.5, "index_dtype": case.index_dtype}
    store.close_prompt(case.split, decode_reserve=8, kernel_size=7, **settings)
    steps = [
        (
            normal(batch, case.heads, case.head_dim),
            normal(batch, case.kv_heads, case.head_dim),
            normal(batch, case.kv_heads, value_dim),
        )
        for _ in range(case.steps)
    ]
    sinks = torch.randn(case.heads, generator=generator).to(DEVICE) if case.sinks else None
    return store, steps, sinks


def workspace_of(case: Case, store: KVStore) -> decode.DecodeWorkspace:
    assert store.keys is not None
    assert store.values is not None
    split = store.split
    assert split is not None
    batch, kv_heads, capacity, head_dim = store.keys.shape
    shape = decode.DecodeShape(
        batch, case.heads, kv_heads, head_dim, store.values.shape[3], capacity,
        split.page_size, split.channels, split.top_k, split.token_budget, split.sinks,
    )  # fmt: skip
    return decode.DecodeWorkspace(shape, DEVICE, case.programs)


def kernel_step(
    case: Case, store: KVStore, workspace: decode.DecodeWorkspace, step: tuple[Tensor, ...], sinks: Tensor | None
) -> Tensor:
    query, _, value = step
    # The interpreter does not round to bfloat16, it cuts off.
    precise = torch.float32 if decode.INTERPRETED else query.dtype
    out = decode.decode_step(
        *step,
        keys=store.keys,
        values=store.values,
        positions=store.positions,
        index=store.index,
        lengths=store.lengths,
        seen=store.clock(),
        workspace=workspace,
        scaling=case.head_dim**-0.5,
        softcap=case.softcap,
        sinks=sinks,
        out=torch.empty(*query.shape[:2], value.shape[2], dtype=precise, device=DEVICE),
    )
    store.advance(clocked=True)
    return out.to(query.dtype)


def expected_logits(case: Case, store: KVStore, query: Tensor) -> Tensor:
    """Return the reference's scores of a store that has the step's token already."""
    assert store.keys is not None
    assert store.index is not None
    return score(
        query,
        store.index,
        store.keys,
        stored=store.stored,
        lengths=None if store.uniform else store.lengths,
        page_size=case.page_size,
        channels=case.channels,
        scaling=case.head_dim**-0.5,
        softcap=case.softcap,
    )


def expected_positions(case: Case, store: KVStore, query: Tensor, sinks: Tensor | None) -> Tensor:
    return select_tokens(
        expected_logits(case, store, query),
        min(case.top_k, store.stored),
        stored=store.stored,
        lengths=None if store.uniform else store.lengths,
        kv_heads=case.kv_heads,
        unit_size=case.page_size,
        sinks=sinks,
    )[0]


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
    assert plain.lengths is not None
    lengths = plain.lengths.repeat_interleave(case.heads // case.kv_heads, dim=1)
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
        for name in ("keys", "values", "positions", "lengths", *(["index"] if ranked else [])):
            assert torch.equal(getattr(store, name).double(), getattr(plain, name).double()), name
        assert store.keys is not None
        assert store.values is not None
        assert store.lengths is not None
        chosen = expected_positions(case, plain, query, sinks) if ranked else None
        if ranked and store.stored > case.token_budget:
            assert_scores(case, workspace, plain, query)
        errors, allowed = [], []
        for b, h in product(range(len(case.lengths)), range(case.kv_heads)):
            length = int(store.lengths[b, h])
            mine = workspace.chosen.view(len(case.lengths), case.kv_heads, -1)[b, h] if ranked else torch.empty(0)
            if chosen is not None and length > case.token_budget:
                assert mine[: chosen.shape[-1]].tolist() == chosen[b, h].tolist()
            at = read_by(case, length, mine[: min(case.top_k, length)]).to(DEVICE)
            heads = slice(h * group, (h + 1) * group)
            given = (query[b, heads], store.keys[b, h, at], store.values[b, h, at])
            own = None if sinks is None else sinks[heads]
            exact = attention(case, *given, own, torch.float64)
            low = attention(case, *given, own, case.dtype)
            errors.append((found[b, heads].cpu().double() - exact).abs().max())
            allowed.append((low.double() - exact).abs().max())
        # The largest of a step: a single row's may be zero by luck. Float32 rounds to 1e-7, which is noise.
        bound = 1e-6 if case.dtype == torch.float32 else 2 * max(allowed)
        assert max(errors) <= bound, (max(errors), bound)


RANKED = [c for c in CASES if c.method == "rocketkv" and c.programs == 8 and max(c.lengths) > c.token_budget]


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_a_choice_in_a_launch_of_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(decode, "SELECT_CHUNK", 256)
    store, [step, *_], sinks = make(case)
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    assert workspace.separate
    found = kernel_step(case, store, workspace, step, sinks)
    expected = backend.decode_step(
        *step, plain, scaling=case.head_dim**-0.5, softcap=case.softcap, sinks=sinks, backend="torch"
    )
    assert_near(found, expected, 1e-5 if case.dtype == torch.float32 else 2e-2)
    assert store.lengths is not None
    chosen = expected_positions(case, plain, step[0], sinks).flatten(0, 1)
    for row, length in enumerate(store.lengths.flatten().tolist()):
        if length > case.token_budget:
            assert workspace.chosen[row].tolist() == chosen[row].tolist()


@pytest.mark.parametrize("page_size", [1, 2, 3, 5])
@pytest.mark.parametrize("query_is_zero", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_ties_go_to_the_lowest_positions(
    page_size: int, query_is_zero: bool, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if separate:
        monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    case = Case(page_size=page_size, lengths=(200,))
    store, [(query, key, value)], _ = make(case)
    assert store.keys is not None
    assert store.index is not None
    if query_is_zero:
        query = torch.zeros_like(query)
    else:
        # Equal keys, in whole numbers: equal scores in whatever order they are summed.
        query = (4 * query).round()
        liked = query.sum(1, keepdim=True)
        store.keys[:] = liked[:, :, None]
        pages = torch.cat((liked, liked), dim=-1) if page_size > 1 else liked
        store.index[:] = pages[:, :, None, :, None]
        key = liked
    workspace = workspace_of(case, store)
    kernel_step(case, store, workspace, (query, key, value), None)
    for row in workspace.chosen:
        assert row.tolist() == list(range(case.top_k))


def test_a_nan_key_spoils_its_own_head_group_only() -> None:
    case = Case(lengths=(200, 200), heads=4, kv_heads=2)
    store, [step], _ = make(case)
    other = copy.deepcopy(store)
    assert other.keys is not None
    other.keys[0, 1, 199, 5] = torch.nan  # in the open page
    expected = kernel_step(case, store, workspace_of(case, store), step, None)
    found = kernel_step(case, other, workspace_of(case, other), step, None)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, :2], expected[0, :2])


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_nan_stays_in_the_bounds_of_its_page(page_size: int) -> None:
    case = Case(lengths=(page_size * 60 + page_size - 1,), page_size=page_size)
    store, [(query, key, value)], _ = make(case)
    key[0, 0, 3] = torch.nan
    plain = copy.deepcopy(store)
    kernel_step(case, store, workspace_of(case, store), (query, key, value), None)
    plain.append(key, value)
    assert store.index is not None
    assert plain.index is not None
    assert store.index.isnan().sum() == (1 if page_size == 1 else 2)
    assert torch.equal(store.index.nan_to_num(9.0), plain.index.nan_to_num(9.0))


@pytest.mark.parametrize("programs", [1, 7, 200])
def test_runs_repeat_bit_for_bit_and_cuts_do_not_change_the_choice(programs: int) -> None:
    case = Case(lengths=(500, 300), page_size=1, programs=programs, top_k=150, token_budget=200, dtype=HALF[1], steps=2)
    store, steps, sinks = make(case)
    again, whole = copy.deepcopy(store), copy.deepcopy(store)
    first, second = workspace_of(case, store), workspace_of(case, again)
    uncut = workspace_of(replace(case, programs=1), whole)
    for step in steps:
        out = kernel_step(case, store, first, step, sinks)
        assert torch.equal(kernel_step(case, again, second, step, sinks), out)
        assert_near(kernel_step(case, whole, uncut, step, sinks), out, 2e-2)
        assert torch.equal(first.chosen, uncut.chosen)
    assert first.arrivals.count_nonzero() == 0


def test_a_workspace_serves_one_layer_after_another() -> None:
    case = Case(lengths=(300, 150), programs=64, steps=2)
    stores = [make(case, seed)[0] for seed in range(3)]
    alone = copy.deepcopy(stores)
    shared = workspace_of(case, stores[0])
    _, steps, _ = make(case, 9)
    for step in steps:
        for store, single in zip(stores, alone, strict=True):
            expected = kernel_step(case, single, workspace_of(case, single), step, None)
            assert torch.equal(kernel_step(case, store, shared, step, None), expected)


def test_queries_keys_and_values_may_be_slices_of_a_fused_projection() -> None:
    case = Case(lengths=(200, 150), heads=6, kv_heads=2)
    store, [(query, key, value)], _ = make(case)
    other = copy.deepcopy(store)
    expected = kernel_step(case, store, workspace_of(case, store), (query, key, value), None)
    query, key, value = torch.cat((query, key, value), dim=1).split((6, 2, 2), dim=1)
    assert not query.is_contiguous()
    with Counting() as counting:
        found = kernel_step(case, other, workspace_of(case, other), (query, key, value), None)
    assert torch.equal(found, expected)
    assert not [name for name in counting.names if "clone" in name]
    assert torch.equal(other.keys, store.keys) if other.keys is not None and store.keys is not None else False
    assert torch.equal(other.values, store.values) if other.values is not None and store.values is not None else False


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_channels_that_are_not_chosen_do_not_matter(bad: float) -> None:
    case = Case(lengths=(300,), channels=17)
    store, [(query, key, value)], _ = make(case)
    assert store.keys is not None
    assert store.index is not None
    chosen = query.abs().sum(1).argsort(dim=-1, descending=True)[0]
    other = copy.deepcopy(store)
    assert other.index is not None
    other.index[0, 0, 0, chosen[20], 5] = bad
    first, second = workspace_of(case, store), workspace_of(case, other)
    kernel_step(case, store, first, (query, key, value), None)
    kernel_step(case, other, second, (query, key, value), None)
    assert torch.equal(second.chosen, first.chosen)
    assert torch.equal(second.scores.nan_to_num(7.0)[..., :100], first.scores.nan_to_num(7.0)[..., :100])


@pytest.mark.parametrize(("length", "separate"), [(120, False), (120, True), (256, False), (256, True)])
def test_nothing_beyond_the_buffers_is_touched(length: int, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row within the budget has no list to read, and one that is full has nowhere to score another page."""
    if separate:
        monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    case = Case(lengths=(length,), page_size=2, top_k=64, token_budget=128)
    store, [step], _ = make(case)
    full = length == 256
    if full:  # as many slots as one tile of pages holds
        assert store.keys is not None
        assert store.values is not None
        store.keys, store.values = store.keys[:, :, :256].contiguous(), store.values[:, :, :256].contiguous()
        store.positions = None if store.positions is None else store.positions[:, :, :256].contiguous()
        store.index = None if store.index is None else store.index[:, :, :1].contiguous()
    space = workspace_of(case, store)
    guard = 1000.0
    scores, chosen = space.scores, space.chosen
    wide = torch.full((scores.numel() + 256,), guard)
    space.scores = wide[: scores.numel()].view_as(scores)
    lists = torch.full((chosen.numel() + 128,), 2**30, dtype=torch.int32)  # a slot that would be far outside
    space.chosen = lists[: chosen.numel()].view_as(chosen)
    before = None if store.keys is None else store.keys.clone()
    out = kernel_step(case, store, space, step, None)
    assert out.isfinite().all()
    assert (wide[scores.numel() :] == guard).all()
    assert (lists[chosen.numel() :] == 2**30).all()
    if full:
        assert before is not None
        assert store.keys is not None
        assert torch.equal(store.keys, before)
        assert store.lengths is not None
        assert store.lengths.tolist() == [[256]]


@pytest.mark.parametrize("pages", [256, 2048])
def test_a_separate_choice_takes_few_passes(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    case = Case(lengths=(pages - 1,), page_size=1, top_k=40, token_budget=80)
    store, [step], _ = make(case)
    passes = []
    counted = select._found
    monkeypatch.setattr(select, "_found", lambda *args, **kwargs: passes.append(1) or counted(*args, **kwargs))
    kernel_step(case, store, workspace_of(case, store), step, None)
    if decode.INTERPRETED:
        assert 3 <= len(passes) <= 34  # bits of a float32 and two more


class Counting(TorchDispatchMode):
    """Collects the operations that PyTorch runs and that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("pages", "launches"), [(decode.REGISTER_PAGES, 2), (0, 3)])
def test_a_step_is_two_launches_and_no_operation(pages: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", pages)
    case = Case(lengths=(300,))
    store, steps, _ = make(case)
    workspace = workspace_of(case, store)
    kernels = {name: getattr(decode, name) for name in ("append_score_kernel", "select_kernel", "select_attend_kernel")}
    launched = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                launched.append((self.name, args, kwargs, grid))

            return launch

    for name in kernels:
        monkeypatch.setattr(decode, name, Recorded(name))
    query, key, value = steps[0]
    clock, out = store.clock(), torch.zeros_like(query)
    with Counting() as counting:
        decode.decode_step(
            query, key, value,
            keys=store.keys, values=store.values, positions=store.positions, index=store.index, lengths=store.lengths,
            seen=clock, workspace=workspace, scaling=0.125, out=out,
        )  # fmt: skip
    assert counting.names == []
    assert len(launched) == launches
    # What was recorded is the step: run it.
    for name, args, kwargs, grid in launched:
        kernels[name][grid](*args, **kwargs)
    assert out.count_nonzero() == out.numel()
    assert store.lengths is not None
    assert store.lengths.tolist() == [[301]]


@pytest.mark.parametrize(
    "case", [Case(lengths=(70,), steps=12), Case(method="streaming", lengths=(74,), steps=40)], ids=str
)
def test_through_the_backend_over_a_long_decode(case: Case) -> None:
    """Buffers grow, pages close, rows pass the budget; a rolling store rolls."""
    store, steps, sinks = make(case)
    plain = copy.deepcopy(store)
    workspaces: dict[Any, Any] = {}
    for query, key, value in steps:
        given: dict[str, Any] = {"scaling": case.head_dim**-0.5, "sinks": sinks}
        found = backend.decode_step(query, key, value, store, **given, backend="triton", workspaces=workspaces)
        expected = backend.decode_step(query, key, value, plain, **given, backend="torch")
        assert_near(found, expected)
    assert len(workspaces) == 1
    assert store.seen == plain.seen
    assert store.capacity == plain.capacity > max(case.lengths) + 8
    # And the reference goes on where the kernels stopped, and they after it.
    query, key, value = steps[0]
    for first, second in (("torch", "triton"), ("triton", "torch")):
        found = backend.decode_step(query, key, value, store, **given, backend=first)
        assert_near(found, backend.decode_step(query, key, value, plain, **given, backend=second))
    assert torch.equal(store.positions, plain.positions) if store.positions is not None else False
    store.crop(store.seen - 3)
    plain.crop(plain.seen - 3)
    found = backend.decode_step(query, key, value, store, **given, backend="triton")
    assert_near(found, backend.decode_step(query, key, value, plain, **given, backend="torch"))
    assert math.isfinite(float(found.sum()))
