"""95 % intervals of mean scores, of one arm and of the difference of two arms on the same samples.

Right-or-wrong scores of one arm have Wilson's interval (Wilson 1927, the score interval); everything else the
percentile bootstrap over samples (Efron and Tibshirani 1993, section 13.3), with fixed draws: the same values always
give the same interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 10_000


def mean_interval(values: Sequence[float], *, percent: bool = True) -> Interval | None:
    """Return the interval of the mean of values, one per sample.

    Args:
        values: one per sample.
        percent: they are scores from 0 to 100, so that values of 0 and 100 alone are right-or-wrong answers; False for
            a metric with another unit, where 0 is a measured value as any other.

    Returns:
        Lower and upper end, or None where a single value shows no spread.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    _check(values)
    if percent and all(value in (0, 100) for value in values):
        low, high = wilson(sum(value == 100 for value in values), len(values))
        return 100 * low, 100 * high
    return mean_of_means_interval([values])


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> Interval | None:
    """Return the interval of the mean difference `values - reference`, sample by sample.

    Args:
        values: one per sample.
        reference: those of the same samples in the same order.

    Returns:
        Lower and upper end, or None where a single pair shows no spread.

    Raises:
        ValueError: the two differ in length, are empty, or a value is not finite.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"values and reference must be of the same samples, got {len(values)} and {len(reference)}; pair them first"
        )
    return mean_of_means_interval([[a - b for a, b in zip(values, reference, strict=True)]])


def mean_of_means_interval(groups: Sequence[Sequence[float]]) -> Interval | None:
    """Return the interval of the mean over groups of their means: each group is resampled by itself.

    Args:
        groups: values per sample, of each task; all tasks count the same.

    Returns:
        Lower and upper end, or None where a group has a single value, which shows no spread.

    Raises:
        ValueError: there is no group, one is empty, or a value is not finite.
    """
    if not groups:
        raise ValueError("groups must hold at least one, got none; pass the values of each task")
    for group in groups:
        _check(group)
    if min(map(len, groups)) < 2:
        return None
    means = np.zeros(RESAMPLES)
    for place, group in enumerate(groups):
        # einsum: BLAS sums in an order that depends on its threads. Resamples are independent of each other: moved by
        # a place, those of one group serve the next.
        resampled = np.einsum("ij,j->i", _draws(len(group)), np.asarray(group, np.float64))
        means += np.roll(resampled, place)
    low, high = np.quantile(means / len(groups), (0.025, 0.975))
    return float(low), float(high)


def wilson(right: int, count: int) -> Interval:
    """Return Wilson's interval of a share, from 0 to 1.

    Raises:
        ValueError: `count` is below 1, or `right` is not from 0 to `count`.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"right must be from 0 to count and count at least 1, got {right} of {count}")
    share, spread = right / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # At the ends the interval reaches 0 and 1 exactly; floats may miss them.
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)


@functools.lru_cache(maxsize=4)
def _draws(count: int) -> NDArray[np.float64]:
    """Return the weights of `count` values in each resample, [RESAMPLES, count]: how often each is drawn."""
    drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights: NDArray[np.float64] = drawn / count
    return weights


def _check(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("values must hold at least one, got none; leave out what has no sample")
    if not all(map(math.isfinite, values)):
        raise ValueError("values must be finite numbers; leave out samples without a score")
