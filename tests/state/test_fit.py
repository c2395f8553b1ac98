"""A layer that sets its own budget: the least within a bound of the error, by steps whose exact outputs are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rocketkv import METHODS, RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.core.verify import verify_step_torch
from rocketkv.state import fit
from rocketkv.state.fit import FittedBudget, fitted_budget
from rocketkv.state.protection import RowMarks
from rocketkv.state.store import KVStore

PARAMS, WINDOW, SIZE, HEADS, KV_HEADS, D = AttentionParams(0.25), 16, 700, 4, 2, 16


def opened(focus: float, valid: Tensor | None = None, batch: int = 1) -> KVStore:
    """Return a store with an open prompt, whose queries look at fewer tokens the larger `focus` is."""
    store = KVStore()
    key, value = torch.randn(batch, KV_HEADS, SIZE, D), torch.randn(batch, KV_HEADS, SIZE, D)
    # Window queries resemble one another, as in a text.
    query = focus * (torch.randn(batch, HEADS, 1, D) + 0.3 * torch.randn(batch, HEADS, SIZE, D))
    store.extend(key, value, valid, expected=SIZE)
    store.prompt.remember(query, WINDOW)
    return store


def fitted(store: KVStore, max_error: float, method: str = "rocketkv+", **extras: Any) -> FittedBudget:
    split = METHODS[method].split
    settings = {"max_error": max_error, "least": 40, "kernel_size": 5, "decode_reserve": 20}
    return fitted_budget(store, lambda budget: split(SIZE, budget, D, 20), PARAMS, **{**settings, **extras})


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "snapkv"])
def test_the_less_error_is_allowed_the_larger_the_budget(method: str) -> None:
    store = opened(4.0)
    before = {name: tensor.clone() for name, tensor in store.tensors().items()}
    budgets = [fitted(store, bound, method).token_budget or math.inf for bound in (0.999, 0.5, 0.25, 0.1, 1e-5)]
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1] == math.inf
    # The prompt is as it was.
    assert all(tensor.equal(before[name]) for name, tensor in store.tensors().items())
    assert store.lens.longest == store.lens.seen == SIZE
    assert not store.closed


def test_the_estimate_is_the_error_of_the_methods_own_steps() -> None:
    """Tokens that are attended to alone are found again: no error where the budget has them all."""
    store = opened(0.0)  # every token alike: attention is the mean of all values
    found = fit._error_bound(
        store,
        replace(METHODS["rocketkv"].split(SIZE, 64, D, 20), kept_tokens=SIZE, top_k=None, channels=None, page_size=1),
        PARAMS,
        fit._exact_outputs(store, PARAMS),
        5,
        20,
        None,
        fit.TORCH_OPS,
    )
    assert float(found) < 1e-5


def test_between_two_budgets_the_logarithms_are_taken_as_linear() -> None:
    assert fit._least_within([64, 256], [0.4, 0.1], 0.5) == (64, 0.4, ())
    assert fit._least_within([64, 256], [0.4, 0.1], 0.2) == (128, 0.2, ())
    assert fit._least_within([64, 256], [0.4, 0.1], 0.1) == (256, 0.1, ())
    assert fit._least_within([64, 256], [0.4, 0.1], 0.05) == (None, 0.0, (64, 256))
    assert fit._least_within([64, 256], [math.nan, 0.1], 0.2) == (256, 0.1, ())
    assert fit._least_within([64, 256], [0.1, 0.3], 0.05) == (None, 0.0, (64, 256))


def test_a_short_prompt_keeps_all() -> None:
    store = KVStore()
    store.extend(torch.randn(1, 2, 100, D), torch.randn(1, 2, 100, D), expected=100)
    store.prompt.remember(torch.randn(1, 4, 100, D), WINDOW)
    assert fitted(store, 0.5) == (None, 0.0, ())


def test_a_budget_whose_index_takes_more_bytes_than_it_saves_keeps_all() -> None:
    found = fitted(opened(0.05), 0.9999, "exact-topk")  # it stores every token, and an index
    assert found.token_budget is None


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
@pytest.mark.parametrize("reserve", [0, 20, 5000])
def test_an_index_of_nearly_all_tokens_takes_no_more_bytes_than_all(method: str, reserve: int) -> None:
    """A split whose index ranks every token keeps as many as have the same bytes with it, and the window's."""
    store = opened(0.5)
    token = 2 * D * 4
    split = METHODS[method].split(SIZE, 300, D, reserve)
    found = fit.within_full_bytes(split, store, reserve)
    assert split.kept_tokens is not None
    assert found.kept_tokens is not None
    assert WINDOW <= found.kept_tokens <= split.kept_tokens
    assert found == replace(split, kept_tokens=found.kept_tokens)
    index = fit.index_of(split)
    assert index is not None

    def taken(kept: int) -> int:
        return (kept + reserve) * token + index.row_bytes(kept + reserve, D, 4)

    if found.kept_tokens < split.kept_tokens:
        assert taken(found.kept_tokens) <= (SIZE + reserve) * token or found.kept_tokens == WINDOW
        assert taken(found.kept_tokens + 1) > (SIZE + reserve) * token
    elif found.kept_tokens > WINDOW:
        assert taken(found.kept_tokens) <= (SIZE + reserve) * token
    small = METHODS[method].split(SIZE, 60, D, reserve)
    if reserve <= 20:
        assert fit.within_full_bytes(small, store, reserve) == small


def test_protected_tokens_and_small_page_bounds_are_counted() -> None:
    store, split = opened(0.5), METHODS["rocketkv"].split(SIZE, 300, D, 20)
    kept = fit.within_full_bytes(split, store, 20).kept_tokens
    less = fit.within_full_bytes(split, store, 20, torch.float8_e5m2).kept_tokens
    assert kept is not None
    assert less is not None
    assert kept < less < SIZE
    store.marks = (RowMarks(protected=((3, 20), (10, 30), (SIZE - 5, SIZE + 5))),)  # 27 and the last five
    assert fit.within_full_bytes(split, store, 20).kept_tokens == kept - 32


@pytest.mark.parametrize("missing", [SIZE - 60, SIZE - 10])
def test_a_shorter_row_changes_nothing(missing: int) -> None:
    """A row that is read whole has no error, and one without all of the last tokens is not tried."""
    store = opened(4.0)
    valid = torch.ones(2, SIZE, dtype=torch.bool)
    valid[1, :missing] = False
    key, value = store.prompt.keys, store.prompt.values
    assert store.prompt.queries is not None
    both = KVStore()
    both.extend(key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1), valid, expected=SIZE)
    both.prompt.remember(store.prompt.queries.repeat(2, 1, 1, 1), WINDOW)
    alone, together = fitted(store, 0.6), fitted(both, 0.6)
    assert alone.token_budget is not None
    assert together.token_budget == alone.token_budget
    assert together.expected_error == pytest.approx(alone.expected_error, rel=1e-4)


def test_a_short_part_of_a_turn_in_a_batch_is_not_refused() -> None:
    """A row's padding lies within the turn, before the few tokens that it adds to earlier ones."""
    store = opened(4.0, batch=2)
    valid = torch.ones(2, SIZE, dtype=torch.bool)
    valid[1, SIZE - 50 : SIZE - 5] = False
    both = KVStore()
    both.extend(store.prompt.keys, store.prompt.values, valid, expected=SIZE)
    assert store.prompt.queries is not None
    both.prompt.remember(store.prompt.queries, WINDOW)
    assert fitted(both, 0.6).tried or fitted(both, 0.6).token_budget


def test_trial_steps_attend_to_protected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(4.0)
    store.marks = (RowMarks(protected=((3, 20),)),)
    splits = []

    def step(*arguments: Any) -> Tensor:
        splits.append(arguments[5])
        return verify_step_torch(*arguments)

    monkeypatch.setattr(fit, "verify_step_torch", step)
    fitted(store, 0.6)
    assert {split.protected for split in splits} == {17}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_error": 0.0}, "max_error must be above 0 and below 1"),
        ({"max_error": 0.1, "decode_capacity": 64}, "max_error=0.1 is for caches that grow"),
        ({"max_error": 0.1, "layer_budgets": {0: 64}}, "leave out layer_budgets"),
        ({"max_error": 0.1, "method": "streaming"}, "'streaming' does not"),
        ({"max_error": 0.1, "method": "quest"}, "'quest' keeps them all"),
    ],
)
def test_settings_that_contradict_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RocketKVConfig(**{"method": "rocketkv+", **fields})
    with pytest.raises(TypeError, match="max_error must be a float"):
        RocketKVConfig(max_error="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sets the budget of each layer"):
        RocketKVConfig(max_error=0.1).split_for(4096, 64)
