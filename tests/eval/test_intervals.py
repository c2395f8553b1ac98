"""Intervals against values by hand, exact distributions, and what a bootstrap must be true of."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from rocketkv.eval.intervals import mean_interval, mean_of_means_interval, paired_interval, wilson

HALF = [0.0, 100.0] * 5


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 3.8415 / 13.8415),  # z^2 / (n + z^2)
        (20, 20, 20 / 23.8415, 1.0),
        (1, 1, 1 / 4.8415, 1.0),
        (19, 20, 0.7639, 0.9911),
    ],
)
def test_wilson_by_hand(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)
    values = [100.0] * right + [0.0] * (count - right)
    assert mean_interval(values) == pytest.approx((100 * low, 100 * high), abs=1e-2)


def binomial_quantile(count: int, share: float, level: float) -> int:
    total = 0.0
    for k in range(count + 1):
        total += math.comb(count, k) * share**k * (1 - share) ** (count - k)
        if total >= level:
            return k
    return count


@pytest.mark.parametrize(("count", "lost"), [(10, 5), (10, 2), (50, 20)])
def test_paired_interval_has_the_quantiles_of_its_exact_distribution(count: int, lost: int) -> None:
    # Differences of -100 and 0: a resample's mean is a binomial variable.
    values, reference = [0.0] * lost + [100.0] * (count - lost), [100.0] * count
    low, high = (-100 * binomial_quantile(count, lost / count, level) / count for level in (0.975, 0.025))
    assert paired_interval(values, reference) == pytest.approx((low, high), abs=100 / count / 2)


def test_paired_interval_goes_by_the_pairs() -> None:
    assert paired_interval(HALF, HALF) == (0.0, 0.0)
    assert paired_interval([5.0, 15.0, 25.0], [0.0, 10.0, 20.0]) == (5.0, 5.0)
    assert paired_interval(HALF, HALF[::-1]) != (0.0, 0.0)


def test_tasks_are_resampled_independently() -> None:
    # Together two tasks of 10 are a binomial variable of 20: its quantiles are 6 and 14, those of 10 are 2 and 8.
    assert mean_of_means_interval([HALF]) == pytest.approx((20, 80))
    assert mean_of_means_interval([HALF, HALF]) == pytest.approx((30, 70))


def test_intervals_are_the_same_every_time() -> None:
    values = [3.0, 50.0, 77.0, 20.5]
    assert mean_interval(values) == mean_interval(values)
    assert min(values) <= mean_interval(values)[0] < 37.6 < mean_interval(values)[1] <= max(values)  # type: ignore[index]


def test_one_value_has_no_interval_unless_it_is_right_or_wrong() -> None:
    assert mean_interval([41.0]) is None
    assert paired_interval([41.0], [40.0]) is None
    assert mean_interval([0.0, 0.0, 0.0], percent=False) == (0.0, 0.0)
    assert mean_interval([0.0, 0.0, 0.0]) == pytest.approx((0.0, 56.15), abs=0.01)  # z^2 / (3 + z^2)


@pytest.mark.parametrize("call", [lambda: mean_interval([]), lambda: mean_interval([math.nan]),
                                  lambda: wilson(3, 2), lambda: mean_of_means_interval([])])  # fmt: skip
def test_intervals_refuse_what_has_no_mean(call: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        call()


def test_pairs_are_of_the_same_samples() -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired_interval([1.0], [])


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"rocketkv\[eval\]"):
        mean_interval([0.0, 100.0])
