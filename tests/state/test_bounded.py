"""Bounded decoding in a store: what it evicts is by its definition, and snapshots come back from behind evictions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive import softmax_weights, top
from protection_case import kept_by
from rocketkv.budget import BudgetSplit
from rocketkv.core.pages import TILE_PAGES, build_pages
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import decode_step, eviction_ops
from rocketkv.state.compress import close_prompt, evict_generated, kept_of
from rocketkv.state.store import KVStore
from turns import Tokens, last_queries, left_padding

# Triton 3.2's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

WINDOW, KERNEL, PROMPT, D, SCALING = 4, 5, 60, 16, 0.3
CAPACITY, KEPT = 13, 6


@dataclass
class Head:
    """One row and KV head by the definition: queries [tokens, G, D], keys and values [tokens, D], in float64.

    Tokens are named by their position in the sequence; `prompt` and `generated` are those that are stored.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    softcap: float | None
    sinks: list[float | None]
    prompt: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)

    def weights(self, at: int, tokens: list[int]) -> Tensor:
        """Return the weights [G, len(tokens)] of the queries of token `at`."""
        keys = self.keys[tokens]
        return torch.stack(
            [
                softmax_weights(query, keys, SCALING, self.softcap, sink)
                for query, sink in zip(self.queries[at], self.sinks, strict=True)
            ]
        )

    def evict(self, kept: int, end: int) -> None:
        stored = self.prompt + self.generated
        ranked = self.generated[:-WINDOW]
        total = dict.fromkeys(stored, 0.0)
        for at in range(end - WINDOW, end):
            seen = [token for token in stored if token <= at]
            for token, weight in zip(seen, self.weights(at, seen).sum(0).tolist(), strict=True):
                total[token] += weight
        own = [total[token] for token in ranked]
        pooled = [max(own[max(0, i - KERNEL // 2) : i + KERNEL // 2 + 1]) for i in range(len(own))]
        self.generated = [ranked[i] for i in top(pooled, kept - WINDOW)] + self.generated[-WINDOW:]

    def selected(self, at: int, split: BudgetSplit) -> list[int]:
        """Return what the queries of token `at` read of the stored tokens, by the pages' bounds."""
        stored = self.prompt + self.generated
        if split.top_k is None or len(stored) <= split.token_budget:
            return stored
        assert split.channels is not None
        queries = self.queries[at]
        chosen = top(queries.abs().sum(0), split.channels)
        estimate = torch.zeros(len(queries), len(stored), dtype=torch.float64)
        for start in range(0, len(stored), split.page_size):
            keys = self.keys[stored[start : start + split.page_size]]
            bounds = torch.where(queries.sum(0) > 0, keys.amax(0), keys.amin(0))
            for g, query in enumerate(queries):
                share = float(query[chosen].abs().sum() / query.abs().sum())
                promise = query[chosen] @ bounds[chosen] * SCALING / share**0.5
                estimate[g, start : start + split.page_size] = promise
        if self.softcap is not None:
            estimate = self.softcap * torch.tanh(estimate / self.softcap)
        columns = [[sink] if sink is not None else [] for sink in self.sinks]
        extra = torch.tensor(columns, dtype=torch.float64).view(len(queries), -1)
        weights = torch.cat((estimate, extra), dim=1).softmax(-1)[:, : len(stored)].mean(0)
        return [stored[i] for i in top(weights, split.top_k)]

    def step(self, at: int, split: BudgetSplit) -> Tensor:
        """Take token `at` in and return [G, Dv]."""
        if len(self.generated) == CAPACITY:
            self.evict(KEPT, at)
        self.generated.append(at)
        tokens = self.selected(at, split)
        return self.weights(at, tokens) @ self.values[tokens]


SPLITS = {
    "rocketkv": BudgetSplit(token_budget=16, kept_tokens=20, page_size=2, channels=6, top_k=8),
    "snapkv": BudgetSplit(token_budget=16, kept_tokens=16),
    "stored-topk": BudgetSplit(token_budget=16, kept_tokens=20, channels=D, top_k=8, oracle=True),
    "pages of 5": BudgetSplit(token_budget=15, kept_tokens=23, page_size=5, channels=D, top_k=7),
    "pages of 1": BudgetSplit(token_budget=15, kept_tokens=21, channels=3, top_k=7),
}


@dataclass(frozen=True)
class Case:
    split: str = "rocketkv"
    lengths: tuple[int, ...] = (PROMPT,)
    heads: int = 6
    kv_heads: int = 2
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "plain"


CASES = [
    *(Case(split=name, lengths=lengths) for name in SPLITS for lengths in ((PROMPT, PROMPT), (PROMPT, 33, 9))),
    Case(heads=3, kv_heads=3),
    Case(heads=5, kv_heads=1, lengths=(41, 60)),
    Case(softcap=2.0),
    Case(sinks=True, lengths=(60, 12)),
    Case(split="snapkv", softcap=3.0, sinks=True),
]


def started(case: Case, count: int) -> tuple[KVStore, Tokens, AttentionParams, list[list[Head]]]:
    """Return a store whose prompt is closed, all tokens, the attention parameters, and its rows by the definition."""
    rows = len(case.lengths)
    given = Tokens(
        torch.randn(rows, case.heads, PROMPT + count, D) * 1.5,
        torch.randn(rows, case.kv_heads, PROMPT + count, D),
        torch.randn(rows, case.kv_heads, PROMPT + count, D),
    )
    sinks = torch.randn(case.heads) if case.sinks else None
    params = AttentionParams(SCALING, case.softcap, sinks)
    store, first = KVStore(), given[slice(0, PROMPT)]
    store.extend(first.key, first.value, None if min(case.lengths) == PROMPT else left_padding(case.lengths, PROMPT))
    store.prompt.remember(first.query, WINDOW)
    close_prompt(
        store,
        SPLITS[case.split],
        params,
        decode_reserve=5,
        kernel_size=KERNEL,
        decode_capacity=CAPACITY,
        ring_size=WINDOW,
    )
    group = case.heads // case.kv_heads
    own = [None] * case.heads if sinks is None else sinks.tolist()
    heads = [
        [
            Head(
                given.query[b, g * group : (g + 1) * group].transpose(0, 1).double(),
                given.key[b, g].double(),
                given.value[b, g].double(),
                case.softcap,
                own[g * group : (g + 1) * group],
                prompt=kept_by(store, b, g),
            )
            for g in range(case.kv_heads)
        ]
        for b in range(rows)
    ]
    return store, given, params, heads


def step(store: KVStore, given: Tokens, at: int, params: AttentionParams, backend: str = "torch") -> Tensor:
    """Decode token `at`, evicting before it where there is no room."""
    if store.stored >= store.capacity:
        ops = eviction_ops(store.decoding.keys, backend=backend)
        evict_generated(store, KEPT, params, kernel_size=KERNEL, ops=ops)
    return decode_step(
        given.query[:, :, at], given.key[:, :, at], given.value[:, :, at], store, params, backend=backend
    )


def assert_index_is_anew(store: KVStore) -> None:
    """Assert that the bounds of every full page are those of its keys."""
    buffers, page_size = store.decoding.buffers, store.decoding.split.page_size
    if not buffers.index_tensors:
        return
    (bounds,) = buffers.index_tensors
    rebuilt = build_pages(buffers.keys.clone(), store.stored, page_size)
    for b, row in enumerate(buffers.seq_lens.tolist()):
        for g, length in enumerate(row):
            for page in range(length // page_size):
                at = (b, g, page // TILE_PAGES, slice(None), page % TILE_PAGES)
                assert bounds[at].equal(rebuilt[at])


ON_KERNELS = [
    Case(lengths=(60, 9), heads=3, kv_heads=1),
    Case(split="pages of 5", heads=2, kv_heads=2, softcap=2.0, sinks=True),
    Case(split="snapkv", heads=2, kv_heads=1),
]


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "torch") for case in CASES), *((case, "triton") for case in ON_KERNELS)], ids=str
)
def test_it_is_its_definition(case: Case, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no package for this platform")
    count = 38 if backend == "torch" else 22  # the interpreter takes its time
    store, given, params, heads = started(case, count)
    kept = [[list(head.prompt) for head in row] for row in heads]
    buffers = {name: tensor.data_ptr() for name, tensor in store.tensors().items()}
    for at in range(PROMPT, PROMPT + count):
        found = step(store, given, at, params, backend)
        expected = torch.stack([torch.cat([head.step(at, SPLITS[case.split]) for head in row]) for row in heads])
        for b, row in enumerate(heads):
            for g, head in enumerate(row):
                stored = kept_by(store, b, g)
                assert stored == head.prompt + head.generated
                assert stored[: len(kept[b][g])] == kept[b][g], "what the prompt kept stays"
        assert_near(found, expected)
        assert_index_is_anew(store)
        assert last_queries(store).equal(given.query[:, :, at + 1 - WINDOW : at + 1])
    assert store.generated <= CAPACITY
    assert buffers == {name: tensor.data_ptr() for name, tensor in store.tensors().items()}
    behind = torch.arange(store.capacity) >= store.decoding.buffers.seq_lens[..., None]
    assert (store.decoding.positions[behind] == -1).all()


def test_what_cannot_be_evicted_is_refused() -> None:
    case = Case()
    store, given, params, _ = started(case, 9)
    with pytest.raises(ValueError, match="more generated tokens than are kept; got 0 and 6"):
        evict_generated(store, KEPT, params, kernel_size=KERNEL)
    for at in range(PROMPT, PROMPT + 9):
        step(store, given, at, params)
    with pytest.raises(ValueError, match="got 9 and 3"):  # fewer than the window
        evict_generated(store, 3, params, kernel_size=KERNEL)
    with pytest.raises(ValueError, match="needs a store whose prompt is closed"):
        evict_generated(KVStore(), KEPT, params, kernel_size=KERNEL)
    assert kept_of(64, 32) == 32
    assert kept_of(63, 32) is None
    assert kept_of(65, 32) == 32


@pytest.mark.parametrize("lengths", [(PROMPT,), (PROMPT, 33, 9)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("taken", [0, 5, 12, 13, 14, 30])
def test_a_snapshot_comes_back_from_behind_evictions(taken: int, lengths: tuple[int, ...]) -> None:
    case = Case(lengths=lengths)
    store, given, params, _ = started(case, 60)
    for at in range(PROMPT, PROMPT + taken):
        step(store, given, at, params)
    apart, snapshot = copy.deepcopy(store), store.snapshot()
    buffers = {name: tensor.data_ptr() for name, tensor in store.tensors().items()}
    for count in (3, 25, 30):
        expected = copy.deepcopy(apart)
        for at in range(PROMPT + taken, PROMPT + taken + count):
            assert step(store, given, at, params).equal(step(expected, given, at, params))
        later, kept = store.snapshot(), copy.deepcopy(store)
        store.restore(snapshot)
        assert store.seen == apart.seen
        for b in range(len(lengths)):
            for g in range(2):
                assert kept_by(store, b, g) == kept_by(apart, b, g)
        assert last_queries(store).equal(given.query[:, :, PROMPT + taken - WINDOW : PROMPT + taken])
        assert_index_is_anew(store)
        store.restore(later)  # and back to the other branch
        for at in range(PROMPT + taken + count, PROMPT + 60):
            assert step(store, given, at, params).equal(step(kept, given, at, params))
        store.restore(snapshot)
    assert buffers == {name: tensor.data_ptr() for name, tensor in store.tensors().items()}


@pytest.mark.parametrize("lengths", [(PROMPT,), (PROMPT, 33, 9)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("removed", [1, 3, 4])
def test_a_crop_takes_queries_back_with_their_tokens(removed: int, lengths: tuple[int, ...]) -> None:
    case = Case(lengths=lengths)
    store, given, params, _ = started(case, 60)
    at = PROMPT
    while at < PROMPT + 50:
        for _ in range(removed + 1):
            step(store, given, at, params)
            at += 1
        store.crop(at - removed)
        at -= removed
        queries = last_queries(store)
        assert queries.equal(given.query[:, :, at - queries.shape[2] : at])
        assert queries.shape[2] == WINDOW - removed
        assert store.seen == at
        for b in range(len(lengths)):
            assert kept_by(store, b, 0)[-1] == at - 1
        assert_index_is_anew(store)


def test_a_crop_into_what_was_evicted_is_refused_with_the_bound() -> None:
    case = Case()
    store, given, params, _ = started(case, 20)
    for at in range(PROMPT, PROMPT + 14):
        step(store, given, at, params)
    with pytest.raises(ValueError, match="of the first 69, some were evicted"):
        store.crop(68)
    store.crop(69)
    assert kept_by(store, 0, 0)[-1] < 69
    assert last_queries(store).shape[2] == 0
