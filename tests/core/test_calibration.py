"""The residual's weight: fitted in closed form, by the window's queries as if each were a decode step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_case import plain_attention
from close import assert_near
from naive import softmax_weights, top
from rocketkv.budget import BudgetSplit
from rocketkv.core import calibration, scratch
from rocketkv.core.decode import DecodeBuffers
from rocketkv.core.index import index_of
from rocketkv.core.params import AttentionParams
from rocketkv.core.residual import residual_attend
from rocketkv.core.sketch import build_sketch, rotation_matrix
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from sketch_case import some_queries
from tracking import Tracker

SPLIT = BudgetSplit(
    token_budget=24, kept_tokens=40, sketch_bits=2, top_k=11, residual=True, calibrated=True, by_largest=True
)
WINDOW, SIZE = 5, 70


def closed(
    heads: int, kv_heads: int, *, batch: int = 1, valid: Tensor | None = None, split: BudgetSplit = SPLIT, **extras: Any
) -> tuple[KVStore, Tensor, tuple[Tensor, Tensor]]:
    """Return a store after a prompt, its window's queries [B, H, W, D], and all keys and values of the prompt."""
    query, key = torch.randn(batch, heads, SIZE, 16) * 2, torch.randn(batch, kv_heads, SIZE, 16)
    value = torch.randn(batch, kv_heads, SIZE, 11)
    store = KVStore()
    store.extend(key, value, valid, expected=SIZE)
    store.prompt.remember(query, WINDOW)
    close_prompt(store, split, AttentionParams(0.25, **extras), decode_reserve=8, kernel_size=3)
    return store, query[:, :, -WINDOW:], (key, value)


def bias_of(store: KVStore) -> Tensor:
    bias = store.decoding.buffers.residual_bias
    assert bias is not None
    return bias


def naive_terms(
    query: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    estimates: Tensor,
    chosen: list[int],
    seen: list[int],
    **exact: Any,
) -> tuple[float, float]:
    """Return the two products of one query [D] with output [Dv], one KV head's stored tokens, and estimated logits."""
    sink, cap = exact.pop("sink"), exact["softcap"]
    logits = (keys.double() @ query.double()) * exact["scaling"]
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    others = [token for token in seen if token not in chosen]
    near, far = logits[chosen].exp(), estimates[others].double().exp().sum()
    far = far * min(1.0, near.sum() / estimates[chosen].double().exp().sum()) ** 0.5
    total = near.sum() + far + (0.0 if sink is None else math.exp(sink))
    mean = values[others].double().mean(0)
    fixed = (near @ values[chosen].double() - (total - far) * out) / total
    linear = far * (mean - out) / total
    return float(-(fixed @ linear) / (out @ out)), float(linear @ linear / (out @ out))


def factor_of(cross: Tensor, square: Tensor) -> Tensor:
    prior, least = calibration.PRIOR, calibration.NEGLIGIBLE
    found = (cross + prior * square + least) / ((1 + prior) * square + least)
    return found.clamp(calibration.LEAST, calibration.MOST)


@pytest.fixture(params=[1, 2**12, 2**22], ids=["query-by-query", "some", "at-once"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CPU_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("by_largest", [True, False])
def test_the_factor_is_that_of_least_squares(heads: int, kv_heads: int, extras: str, by_largest: bool) -> None:
    sinks = torch.randn(heads) if extras == "sinks" else None
    exact: dict[str, Any] = {"softcap": 3.0 if extras == "softcap" else None, "sinks": sinks}
    split = replace(SPLIT, by_largest=by_largest)
    store, window, (all_keys, all_values) = closed(heads, kv_heads, split=split, **exact)
    buffers, index, group, stored = store.decoding.buffers, index_of(split), heads // kv_heads, store.stored
    keys, values, positions, params = *buffers[:3], AttentionParams(0.25, exact["softcap"])
    assert index is not None
    sums = torch.zeros(2, 2, heads, dtype=torch.float64)  # of every other query
    for w in range(WINDOW):
        query = window[:, :, w]
        estimates = index.score(query, buffers.index_tensors, keys, params, stored=stored, lengths=None)[0]
        for g in range(kv_heads):
            own = range(g * group, (g + 1) * group)
            seen = [i for i in range(stored) if positions[0, g, i] <= SIZE - WINDOW + w]
            weights = []
            for h in own:
                mass = estimates[h, seen].double().exp()
                weights.append(mass / (mass.sum() + (0.0 if sinks is None else float(sinks[h].exp()))))
            weight = torch.stack(weights)
            chosen = [seen[i] for i in top(weight.amax(0) if by_largest else weight.mean(0), 11)]
            read = slice(SIZE - WINDOW + w + 1)
            for h in own:
                settings = {"scaling": 0.25, "softcap": exact["softcap"]}
                settings["sink"] = None if sinks is None else float(sinks[h])
                out = softmax_weights(query[0, h], all_keys[0, g, read], **settings) @ all_values[0, g, read].double()
                terms = naive_terms(
                    query[0, h], out, keys[0, g, :stored], values[0, g, :stored], estimates[h], chosen, seen, **settings
                )
                sums[w % 2, :, h] += torch.tensor(terms)
    fitted = factor_of(*sums.sum(0))
    added = torch.zeros(heads, dtype=torch.float64)
    for half, (cross, square) in enumerate(sums):
        tried = factor_of(*sums[1 - half])
        added += tried**2 * square - 2 * tried * cross
    expected = torch.where(added > calibration.NEGLIGIBLE, calibration.LEAST, fitted)
    assert ((expected > calibration.LEAST) & (expected < calibration.MOST)).any()
    assert_near(bias_of(store)[0], expected.log())


@pytest.mark.parametrize("chunks", [[SIZE], [30, 38, 2], [SIZE - 1, 1]])
def test_outputs_that_the_prompt_knows_serve_as_well(chunks: list[int]) -> None:
    query, key, value = torch.randn(1, 6, SIZE, 16) * 2, torch.randn(1, 2, SIZE, 16), torch.randn(1, 2, SIZE, 11)
    params = AttentionParams(0.25)
    out = plain_attention(query, key, value, params).float()
    found = []
    for known in (True, False):
        store = KVStore()
        store.extend(key, value, expected=SIZE)
        start = 0
        for count in chunks:
            own = slice(start, start + count)
            before = store.prompt.outputs
            store.prompt.remember(query[:, :, own], WINDOW)
            if known:
                store.prompt.remember_outputs(before, out[:, own], WINDOW)
            start += count
        assert (store.prompt.outputs is not None) == known
        close_prompt(store, SPLIT, params, decode_reserve=8, kernel_size=3)
        found.append(bias_of(store))
    assert_near(*found)


def test_a_chunk_whose_attention_failed_leaves_no_outputs_of_other_tokens() -> None:
    query, out = torch.randn(1, 6, SIZE, 16), torch.randn(1, SIZE, 6, 11)
    store = KVStore()
    store.extend(torch.randn(1, 2, SIZE, 16), torch.randn(1, 2, SIZE, 11), expected=SIZE)
    store.prompt.remember(query[:, :, :-2], WINDOW)
    store.prompt.remember_outputs(None, out[:, :-2], WINDOW)
    store.prompt.remember(query[:, :, -2:], WINDOW)
    store.prompt.crop(store.lens, SIZE - 2)
    assert store.prompt.queries is not None
    assert store.prompt.queries.equal(query[:, :, SIZE - WINDOW : SIZE - 2])
    assert store.prompt.outputs is None


def test_it_keeps_no_graph_of_a_models_parameters() -> None:
    """Sinks are parameters of the model; caches are copied, and outlive a forward."""
    sinks = torch.nn.Parameter(torch.randn(6))
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            store, *_ = closed(6, 2, sinks=sinks)
        assert not bias_of(store).requires_grad
        assert not bias_of(store).is_inference()
        copy.deepcopy(store)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_group_shares_its_keys(batch: int) -> None:
    """Scratch does not grow with the query heads that share a KV head's keys and values."""
    size, dims = 3000, (16, 16)
    keys, values = (torch.randn(batch, 1, size, width) for width in dims)
    query, positions = torch.randn(batch, 8, 1, 16), torch.arange(size).expand(batch, 1, size)
    sketch, lengths = (
        build_sketch(keys, size, rotation_matrix(16), 2, queries=some_queries(keys)),
        torch.full((batch, 1), size),
    )
    buffers, index = DecodeBuffers(keys, values, positions, lengths, sketch), index_of(SPLIT)
    assert index is not None
    params, exact = AttentionParams(0.25), torch.randn(batch, 1, 8, 16)
    with Tracker([query, keys, values, *sketch]) as tracker:
        calibration.fitted_bias(query, exact, buffers, index, params, split=SPLIT, stored=size, seen=size)
    assert tracker.largest[0] < keys.nbytes + values.nbytes


def padded(*missing: int) -> Tensor:
    valid = torch.ones(len(missing), SIZE, dtype=torch.bool)
    for row, count in enumerate(missing):
        valid[row, :count] = False
    return valid


def test_rows_that_are_read_whole_have_none_and_padding_says_nothing() -> None:
    store, *_ = closed(6, 2, batch=3, valid=padded(0, SIZE - 20, SIZE - 2))
    assert (bias_of(store)[0] != 0).all()
    assert (bias_of(store)[1:] == 0).all()
    # Nothing is left out while all that is stored may be read.
    store, *_ = closed(6, 2, split=replace(SPLIT, kept_tokens=24))
    assert (bias_of(store) == torch.zeros(1, 6)).all()


def test_a_row_of_a_batch_is_calibrated_as_alone() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 6, SIZE, 16) * 2, torch.randn(2, 2, SIZE, 16), torch.randn(2, 2, SIZE, 11)
    valid, found = padded(0, 13), []
    for rows, given in ((slice(0, 2), valid), (slice(0, 1), None), (slice(1, 2), None)):
        start = 13 if rows.start == 1 else 0
        store = KVStore()
        store.extend(key[rows, :, start:], value[rows, :, start:], given, expected=SIZE - start)
        store.prompt.remember(query[rows, :, start:], WINDOW)
        close_prompt(store, SPLIT, AttentionParams(0.25), decode_reserve=8, kernel_size=3)
        found.append(bias_of(store))
    assert_near(found[0], torch.cat(found[1:]))


def test_a_residual_that_is_right_at_any_weight_keeps_its_own() -> None:
    """Where all values are equal, what is fitted would be rounding errors."""
    query, key = torch.randn(1, 2, SIZE, 16), torch.randn(1, 1, SIZE, 16)
    store = KVStore()
    store.extend(key, torch.full((1, 1, SIZE, 8), 1.1), expected=SIZE)
    store.prompt.remember(query, WINDOW)
    close_prompt(store, SPLIT, AttentionParams(0.25), decode_reserve=8, kernel_size=1)
    assert_near(bias_of(store), torch.zeros(1, 2), 1e-5)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [None, (31, 18)])
def test_a_bias_multiplies_the_mass_of_what_was_not_chosen(
    sinks: bool, softcap: float | None, lengths: tuple[int, int] | None
) -> None:
    query, keys, values = torch.randn(2, 6, 8), torch.randn(2, 2, 31, 8), torch.randn(2, 2, 31, 5)
    logits, bias, sink = torch.randn(2, 6, 31), torch.randn(2, 6), torch.randn(6)
    positions = torch.stack([torch.randperm(18)[:7] for _ in range(4)]).view(2, 2, 7)
    counts = (31, 31) if lengths is None else lengths
    given = None if lengths is None else torch.tensor(lengths)[:, None].expand(2, 2)
    sums = torch.stack([values[b, :, : counts[b]].double().sum(1) for b in range(2)])
    params = AttentionParams(0.5, softcap, sink if sinks else None)
    found, rest = residual_attend(query, keys, values, positions, logits, sums, params, bias=bias, lengths=given)
    for b in range(2):
        for h in range(6):
            own = positions[b, h // 3].tolist()
            others = [i for i in range(counts[b]) if i not in own]
            exact = (keys[b, h // 3, own].double() @ query[b, h].double()) * 0.5
            exact = exact if softcap is None else torch.tanh(exact / softcap) * softcap
            mass = logits[b, h, others].double().exp().sum() * bias[b, h].double().exp()
            mass *= min(1.0, exact.exp().sum() / logits[b, h, own].double().exp().sum()) ** 0.5
            total = exact.exp().sum() + mass + (sink[h].double().exp() if sinks else 0.0)
            mean = values[b, h // 3, others].double().mean(0)
            assert_near(found[b, h], (exact.exp() @ values[b, h // 3, own].double() + mass * mean) / total)
            assert_near(rest[b, h], mass / total)
