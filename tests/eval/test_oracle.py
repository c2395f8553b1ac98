"""Oracle bounds on planted attention whose answers are known, against a loop over all prefixes, and parts of errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rocketkv.core.attention import attend
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import select_top
from rocketkv.eval.oracle import bounds as oracle
from rocketkv.eval.oracle.bounds import decompose, group_weights, shares, smallest_prefixes, union


def planted(weights: list[list[list[float]]]) -> Tensor:
    """Return the weights [G, m, S] of queries and keys that are made to have them: a channel for each row."""
    wanted = torch.tensor(weights)
    group, steps, size = wanted.shape
    keys = wanted.clamp(min=1e-30).log().reshape(group * steps, size).t()
    query = torch.eye(group * steps).reshape(group, steps, group * steps)
    found = group_weights(query, keys, scaling=1.0)
    torch.testing.assert_close(found, wanted.double(), atol=1e-6, rtol=0)
    return found


def needed(weights: list[list[list[float]]], values: Tensor, error: float) -> tuple[list[int], list[int]]:
    """Return the sizes of the steps' prefixes, and the tokens of their union."""
    found = smallest_prefixes(planted(weights), values, error)
    return found.sizes.tolist(), union(found).nonzero().flatten().tolist()


@pytest.mark.parametrize(("error", "size"), [(0.39, 3), (0.4014, 3), (0.4016, 2), (0.99, 2)])
def test_a_prefix_is_the_smallest_within_the_error(error: float, size: int) -> None:
    # Weights of 0.5, 0.3 and 0.2, values at right angles. The first alone errs by 1, as |(0.5, -0.3, -0.2)| is
    # |(0.5, 0.3, 0.2)|; the first two give (0.625, 0.375, 0), which errs by sqrt(0.06125 / 0.38) = 0.4015.
    sizes, tokens = needed([[[0.3, 0.5, 0.2]]], torch.eye(3), error)
    assert sizes == [size]
    assert tokens == sorted([1, 0, 2][:size])


def test_what_is_stored_is_the_union_over_steps() -> None:
    # Two tokens each: {1, 2}, {4, 2} and {1, 6}.
    rows = [
        [0.0, 0.5, 0.3, 0.2, 0.0, 0.0, 0.0],
        [0.2, 0.0, 0.3, 0.0, 0.5, 0.0, 0.0],
        [0.0, 0.3, 0.0, 0.0, 0.2, 0.0, 0.5],
    ]
    sizes, tokens = needed([rows], torch.eye(7), 0.45)
    assert sizes == [2, 2, 2]
    assert tokens == [1, 2, 4, 6]


def test_weights_are_averaged_over_the_group() -> None:
    # Sums 0.6, 1.05, 0.35: token 1 comes first, though the first head has it last; both heads' errors count together.
    first, second = [0.5, 0.2, 0.3], [0.1, 0.85, 0.05]
    values = torch.eye(3)

    def error(size: int) -> float:
        order = [1, 0, 2][:size]
        square = norm = 0.0
        for head in (first, second):
            mass = sum(head[token] for token in order)
            square += sum(((head[t] / mass if t in order else 0.0) - head[t]) ** 2 for t in range(3))
            norm += sum(weight**2 for weight in head)
        return math.sqrt(square / norm)

    assert error(1) > error(2) > 0.2
    for bound, size in ((error(1) + 1e-5, 1), (error(1) - 1e-5, 2), (error(2) + 1e-5, 2), (error(2) - 1e-5, 3)):
        assert needed([[first], [second]], values, bound)[0] == [size]


def test_equal_weights_go_to_the_lowest_positions() -> None:
    # Four equal weights, of opposite values in pairs: the first two already give the mean, which is not 0 by the last.
    values = torch.tensor([[1.0, 3.0], [1.0, -3.0], [1.0, 3.0], [1.0, -3.0]])
    sizes, tokens = needed([[[0.25] * 4]], values, 0.01)
    assert sizes == [2]
    assert tokens == [0, 1]


def test_one_value_everywhere_needs_one_token() -> None:
    sizes, tokens = needed([[[0.2, 0.2, 0.6, 0.0], [0.1, 0.1, 0.6, 0.2]]], torch.ones(4, 5), 1e-6)
    assert sizes == [1, 1]
    assert tokens == [2]


def naive(
    query: Tensor, keys: Tensor, values: Tensor, error: float, exact: dict[str, Any]
) -> tuple[list[int], set[int]]:
    """Try every prefix of every step by the library's own attention, in float64."""
    group, steps, _ = query.shape
    params = AttentionParams(**exact)
    sizes, stored = [], set()
    for step in range(steps):
        seen = keys.shape[0] - steps + step + 1
        row = query[:, step][None].double()
        key, value = keys[None, None, :seen].double(), values[None, None, :seen].double()
        full = attend(row, key, value, params).double()
        logits = (row[0] * exact["scaling"]) @ key[0, 0].t()
        if exact["softcap"] is not None:
            logits = torch.tanh(logits / exact["softcap"]) * exact["softcap"]
        if exact["sinks"] is not None:
            logits = torch.cat((logits, exact["sinks"].double()[:, None]), 1)
        weight = logits.softmax(-1)[:, :seen].sum(0)
        for size in range(1, seen + 1):
            chosen = select_top(weight, size)
            out = attend(row, key, value, params, chosen[None, None]).double()
            if (out - full).norm() <= error * full.norm():
                sizes.append(size)
                stored |= set(chosen.tolist())
                break
    assert group == full.shape[1]
    return sizes, stored


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("error", [0.03, 0.3])
def test_bounds_are_those_of_a_loop_over_all_prefixes(
    softcap: float | None, sinks: bool, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    query, keys = torch.randn(3, 4, 8, generator=generator) * 2, torch.randn(37, 8, generator=generator)
    values = torch.randn(37, 6, generator=generator) + 0.5
    exact: dict[str, Any] = {
        "scaling": 0.4,
        "softcap": softcap,
        "sinks": torch.tensor([0.5, 3.0, -1.0]) if sinks else None,
    }
    wanted, stored = naive(query, keys, values, error, exact)
    weights = group_weights(query, keys, **exact)
    for size in (oracle.BLOCK_BYTES, 4 * 3 * 6 * 8 * 5, 1):  # all at once, by fives, one by one
        monkeypatch.setattr(oracle, "BLOCK_BYTES", size)
        found = smallest_prefixes(weights, values, error)
        assert found.sizes.tolist() == wanted
        assert set(union(found).nonzero().flatten().tolist()) == stored
    assert len(set(wanted)) > 1


def test_steps_see_no_token_that_comes_after_them() -> None:
    weights = group_weights(torch.ones(2, 3, 4), torch.zeros(5, 4), scaling=1.0)
    for step, seen in enumerate((3, 4, 5)):
        torch.testing.assert_close(weights[:, step, :seen], torch.full((2, seen), 1 / seen, dtype=torch.float64))
        assert not weights[:, step, seen:].any()
    # An output of 0 is within no error but its own: all that is seen, and no more.
    values = torch.tensor([[1.0], [1.0], [-2.0], [0.0], [0.0]])
    assert smallest_prefixes(weights, values, 0.5).sizes.tolist() == [3, 3, 3]
    assert smallest_prefixes(weights, torch.zeros(5, 2), 0.5).sizes.tolist() == [1, 1, 1]


def test_an_error_below_rounding_needs_what_a_step_sees_and_no_more() -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys = torch.randn(2, 5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    found = smallest_prefixes(group_weights(query, keys, scaling=0.5), torch.randn(40, 7, generator=generator), 1e-30)
    assert found.sizes.tolist() == [36, 37, 38, 39, 40]


def test_what_cannot_be_bound_is_refused() -> None:
    weights = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    for error in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="error must be between 0 and 1"):
            smallest_prefixes(weights, torch.eye(2), error)
    with pytest.raises(ValueError, match="must be finite"):
        smallest_prefixes(weights, torch.tensor([[math.nan], [1.0]]), 0.1)
    with pytest.raises(ValueError, match="at most 2 steps, got 3"):
        group_weights(torch.zeros(1, 3, 4), torch.zeros(2, 4), scaling=1.0)


def test_parts_of_an_error_are_those_known() -> None:
    # |full| is 5; the parts are (1, 0), (0, 2), (0, 0), (0, -1), the whole is (1, 1).
    full = torch.tensor([[3.0, 4.0]])
    outputs = [full, torch.tensor([[4.0, 4.0]]), torch.tensor([[4.0, 6.0]]), torch.tensor([[4.0, 6.0]])]
    outputs.append(torch.tensor([[4.0, 5.0]]))
    parts = decompose(outputs, outputs[-1] - full)
    assert parts.errors == pytest.approx([1 / 5, math.sqrt(5) / 5, math.sqrt(5) / 5, math.sqrt(2) / 5])
    assert parts.square == pytest.approx(2 / 25)
    assert parts.products == pytest.approx([1 / 25, 2 / 25, 0, -1 / 25])
    assert shares(parts.square, parts.products, 1) == pytest.approx([0.5, 1.0, 0.0, -0.5])
    assert parts.gap == pytest.approx(0, abs=1e-12)


def test_parts_add_up_and_a_whole_that_is_another_shows() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = [torch.randn(9, 12, generator=generator) for _ in range(5)]
    whole = outputs[-1] - outputs[0]
    parts = decompose(outputs, whole)
    found = shares(parts.square, parts.products, 9)
    assert found is not None
    assert sum(found) == pytest.approx(1, abs=1e-6)
    assert sum(parts.products) == pytest.approx(parts.square, rel=1e-6)
    assert parts.gap < 1e-6
    assert decompose(outputs, whole + 0.1).gap > 1e-3


def test_steps_count_alike_whatever_their_norm() -> None:
    full, part = torch.tensor([[1.0, 0.0], [0.0, 100.0]]), torch.tensor([[0.5, 0.0], [0.0, 25.0]])
    parts = decompose([full, full + part, full + part], part)
    assert parts.square == pytest.approx(0.25 + 0.0625)
    assert parts.errors == pytest.approx([0.375, 0.375])


def test_rounding_has_no_parts() -> None:
    assert shares(1e-12, [1e-12, 0.0], 64) is None
    assert shares(64 * 1e-6, [64e-6, 0.0], 64) == [1.0, 0.0]
