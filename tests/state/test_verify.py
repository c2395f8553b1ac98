"""A verify step equals as many decode steps: outputs, selections and everything that is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv.core.verify
from close import assert_near
from monitor_case import forward, layer
from pairs import pairs
from rocketkv.budget import BudgetSplit
from rocketkv.core.params import AttentionParams
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from tracking import Operators
from turns import (
    KERNEL,
    PROMPT,
    RESERVE,
    SCALING,
    SPLITS,
    WINDOW,
    Tokens,
    decode,
    extend,
    joined,
    last_queries,
    left_padding,
    prompted,
    tokens,
    verify,
)

# Rows of 10 tokens pass the budget of 16 within the draft; 25 tokens are more than the buffers have room for.
LAYOUTS = {"uniform": [PROMPT] * 3, "ragged": [PROMPT, 33, 10], "short": [10, 10, 9]}
SHAPES = {
    "pages": BudgetSplit(token_budget=16, kept_tokens=30, page_size=3, channels=3, top_k=8, protected=2),
    "keys": BudgetSplit(token_budget=16, kept_tokens=30, page_size=1, channels=3, top_k=8),
    "sketch": BudgetSplit(
        token_budget=16, kept_tokens=30, sketch_bits=3, top_k=8, residual=True, calibrated=True, by_largest=True
    ),
}


def valid_of(lengths: list[int]) -> Tensor | None:
    return None if min(lengths) == PROMPT else left_padding(lengths, PROMPT)


def assert_same_tensors(found: KVStore, expected: KVStore) -> None:
    """Assert that stores are equal bit for bit, but for the missed mass, which sums in another order."""
    assert vars(found.lens) == vars(expected.lens)
    own, others = found.tensors(), expected.tensors()
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        if name == "missed":  # NaN before the first selection
            torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=1e-5, equal_nan=True)
        else:
            assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize(("split", "layout", "count"), pairs(SPLITS, LAYOUTS, [2, 7, 25]))
def test_a_verify_step_equals_decode_steps(split: str, layout: str, count: int) -> None:
    plain = prompted(tokens(3, PROMPT), SPLITS[split], valid_of(LAYOUTS[layout]))
    decode(plain, tokens(3, 3))
    store, draft = copy.deepcopy(plain), tokens(3, count)
    assert_near(verify(store, draft), decode(plain, draft))
    assert_same_tensors(store, plain)


@pytest.mark.parametrize(
    ("split", "heads", "extra"),
    pairs(SHAPES, [(4, 4), (6, 2), (3, 1)], [{}, {"softcap": 2.0}, {"softcap": 3.0, "sinks": True}]),
)
def test_groups_soft_caps_and_sinks(split: str, heads: tuple[int, int], extra: dict[str, Any]) -> None:
    count, kv_heads = heads
    sinks = torch.randn(count) if extra.get("sinks") else None
    params = AttentionParams(SCALING, extra.get("softcap"), sinks)

    def drawn(size: int) -> Tokens:
        own = (2, kv_heads, size)
        return Tokens(torch.randn(2, count, size, 8) * 1.5, torch.randn(*own, 8), torch.randn(*own, 5))

    plain = KVStore()
    extend(plain, drawn(PROMPT), left_padding([PROMPT, 14], PROMPT))
    close_prompt(plain, SHAPES[split], params, decode_reserve=RESERVE, kernel_size=KERNEL)
    if split == "sketch":
        assert plain.decoding.buffers.residual_bias is not None
        plain.decoding.buffers.residual_bias.copy_(torch.randn(2, count))
    store, draft = copy.deepcopy(plain), drawn(9)
    assert_near(verify(store, draft, params), decode(plain, draft, params))
    assert_same_tensors(store, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_static_buffers_with_a_query_ring(layout: str) -> None:
    plain = KVStore()
    extend(plain, tokens(3, PROMPT), valid_of(LAYOUTS[layout]))
    close_prompt(
        plain,
        SPLITS["rocketkv"],
        AttentionParams(SCALING),
        decode_reserve=RESERVE,
        kernel_size=KERNEL,
        decode_capacity=RESERVE,
        ring_size=WINDOW,
    )
    plain.clock()
    store, draft = copy.deepcopy(plain), tokens(3, RESERVE)
    for part in (draft[:3], draft[3:]):  # fewer queries than the ring has places, and more
        assert_near(verify(store, part), decode(plain, part))
        assert torch.equal(last_queries(store), last_queries(plain))
        assert_same_tensors(store, plain)
        assert int(store.clock()) == store.seen
    with pytest.raises(ValueError, match="room for decode_capacity=20 generated tokens"):
        verify(store, tokens(3, 2))


@pytest.mark.parametrize("split", ["rocketkv", "rocketkv+", "streaming", "snapkv"])
def test_blocks_of_queries_do_not_matter(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], left_padding(LAYOUTS["ragged"], PROMPT))
    other, draft = copy.deepcopy(store), tokens(3, 9)
    whole = verify(store, draft)
    monkeypatch.setattr(rocketkv.core.verify, "BLOCK_BYTES", 1)
    assert_near(verify(other, draft), whole)
    assert_same_tensors(other, store)


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
@pytest.mark.parametrize("split", ["rocketkv", "rocketkv+", "snapkv"])
def test_the_number_of_operators_does_not_depend_on_the_draft(split: str, layout: str) -> None:
    store = prompted(tokens(3, PROMPT), SPLITS[split], valid_of(LAYOUTS[layout]))

    def operators_of(count: int) -> int:
        draft = tokens(3, count)
        verify(copy.deepcopy(store), draft)  # makes the cached constants
        with Operators() as operators:
            verify(store, draft)
        return len(operators.names)

    few, many = operators_of(2), operators_of(8)
    # Where rows differ, several pages that may have become full need a range of their own.
    assert many == few + (2 if (split, layout) == ("rocketkv", "ragged") else 0)


def test_a_verify_step_has_the_gradients_of_decode_steps() -> None:
    grads = []
    plain = prompted(tokens(3, PROMPT), SPLITS["rocketkv+"], left_padding(LAYOUTS["ragged"], PROMPT))
    draft = tokens(3, 5)
    for run in (decode, verify):
        query = draft.query.clone().requires_grad_()
        run(copy.deepcopy(plain), Tokens(query, draft.key, draft.value)).square().sum().backward()
        assert query.grad is not None
        grads.append(query.grad)
    assert_near(grads[1], grads[0])


@pytest.mark.parametrize("fields", [{"audit_every": 2}, {"on_loss": "widen", "loss_bound": 0.1}], ids=str)
def test_drafts_of_a_watched_layer_are_audited_and_widened_alike(fields: dict[str, Any]) -> None:
    given = tokens(1, PROMPT + 8)
    single, drafted = layer(**fields), layer(**fields)
    for made in (single, drafted):
        made.speculative = True
        forward(made, given[:PROMPT])
    expected = torch.cat([forward(single, given[i : i + 1]) for i in range(PROMPT, PROMPT + 8)], dim=2)
    first = forward(drafted, joined(given[PROMPT : PROMPT + 5], tokens(1, 1)))[:, :, :5]
    drafted.crop(PROMPT + 5)
    found = torch.cat((first, forward(drafted, given[PROMPT + 5 :])), dim=2)
    assert_near(found, expected)
    assert single.monitor is not None
    assert drafted.monitor is not None
    kept = {audit.position: audit for audit in drafted.monitor.audits}  # a dropped token's is replaced
    assert list(kept.values()) == list(single.monitor.audits)
    assert len(kept) == (4 if "audit_every" in fields else 0)
