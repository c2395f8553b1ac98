"""Which differences to the full cache are significant at 5 %, over all comparisons of a table.

The test of a difference is Fisher's: under the null hypothesis each sample's difference has either sign with the same
probability. Holm's step-down rule (1979) keeps the probability of any false star in a table at 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVEL = 0.05
_RESAMPLES = 9999
_EXACT = 12  # most samples whose every combination of signs is tried


def sign_flip_p(groups: Sequence[Sequence[float]]) -> float:
    """Return the two-sided p-value of the mean over groups of their mean differences.

    Args:
        groups: differences per sample of each task, none empty.
    """
    weighted = np.concatenate([np.asarray(group, dtype=np.float64) / len(group) for group in groups])
    weighted = weighted[weighted != 0]
    count = len(weighted)
    if count <= _EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = 1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, (_RESAMPLES, count), dtype=np.int8)
    observed = abs(weighted.sum())
    extreme = int((np.abs(signs @ weighted) >= observed * (1 - 1e-9)).sum())
    return extreme / len(signs) if count <= _EXACT else (extreme + 1) / (_RESAMPLES + 1)


def holm(values: Mapping[Any, float]) -> set[Any]:
    """Return the keys of the p-values that Holm's rule finds significant."""
    found = set()
    for rank, key in enumerate(sorted(values, key=values.__getitem__)):
        if values[key] * (len(values) - rank) > LEVEL:
            break
        found.add(key)
    return found
