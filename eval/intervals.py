"""95 % confidence intervals of proportions, means, and differences and ratios of means over the same samples.

Proportions use the Wilson score interval (`at_least`: an exact bound), all others the percentile bootstrap over samples
(Efron and Tibshirani 1993, section 13.3) with a fixed seed, so the same values always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .optional import optional

Interval = tuple[float, float]

BATCH = 1000  # resamples that are held in memory at a time


def mean_interval(values: Sequence[float], *, percent: bool = True) -> Interval | None:
    """Return the interval of a mean.

    Args:
        values: one per sample.
        percent: whether they are scores from 0 to 100. If so, values that are all 0 or 100 are treated as a proportion
            of right answers.

    Returns:
        Lower and upper end, or None for a single value that is not a proportion.

    Raises:
        ValueError: there are no values, or one is not finite.
        ImportError: scipy is not installed.
    """
    _check(values)
    if percent and all(value in (0, 100) for value in values):
        low, high = wilson(sum(value == 100 for value in values), len(values))
        return 100 * low, 100 * high
    return mean_of_means_interval([values])


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> Interval | None:
    """Return the interval of the mean difference `values - reference`.

    Args:
        values: one per sample.
        reference: one per sample, of the same samples in the same order.

    Returns:
        Lower and upper end, or None for a single pair.

    Raises:
        ValueError: the two differ in length, are empty, or a value is not finite.
        ImportError: scipy is not installed.
    """
    _check_pairs(values, reference)
    return mean_of_means_interval([[a - b for a, b in zip(values, reference, strict=True)]])


def mean_of_means_interval(groups: Sequence[Sequence[float]]) -> Interval | None:
    """Return the interval of the mean over groups of their means; each group is resampled independently.

    Args:
        groups: values per sample of each task; all tasks have the same weight.

    Returns:
        Lower and upper end, or None if a group has a single value.

    Raises:
        ValueError: there is no group, one is empty, or a value is not finite.
        ImportError: scipy is not installed.
    """
    if not groups:
        raise ValueError("groups must hold at least one, got none; pass the values of each task")
    for group in groups:
        _check(group)
    if min(map(len, groups)) < 2:
        return None
    return _bootstrap(groups, lambda *resampled, axis: sum(group.mean(axis) for group in resampled) / len(resampled))


def wilson(right: int, count: int) -> Interval:
    """Return the Wilson score interval of a proportion, from 0 to 1.

    Raises:
        ValueError: `count` is below 1, or `right` is not from 0 to `count`.
        ImportError: scipy is not installed.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; leave out a proportion of nothing")
    low, high = optional("scipy.stats").binomtest(right, count).proportion_ci(method="wilson")
    return float(low), float(high)


def at_least(right: int, count: int) -> float:
    """Return the one-sided 95 % lower bound of a proportion, from 0 to 1 (Clopper and Pearson 1934).

    It is exact: whatever the proportion, the bound exceeds it in at most 5 % of all samples.

    Raises:
        ValueError: `count` is below 1, or `right` is not from 0 to `count`.
        ImportError: scipy is not installed.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; leave out a proportion of nothing")
    test = optional("scipy.stats").binomtest(right, count, alternative="greater")
    return float(test.proportion_ci(confidence_level=0.95, method="exact").low)


def _bootstrap(data: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> Interval:
    rng = np.random.default_rng(0)
    result = optional("scipy.stats").bootstrap(data, statistic, method="percentile", batch=BATCH, rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _check_pairs(values: Sequence[float], reference: Sequence[float]) -> None:
    if len(values) != len(reference):
        raise ValueError(
            f"values and reference must be of the same samples, got {len(values)} and {len(reference)} of them"
        )
    _check(values)
    _check(reference)


def _check(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("values must hold at least one, got none; leave out tasks without samples")
    if not all(map(math.isfinite, values)):
        raise ValueError("values must be finite numbers; leave out samples without a score")
