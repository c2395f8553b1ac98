"""Cases of a test with many settings."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return cases in which every two values of two axes meet: a part of the full product, the same every time."""
    values = [list(axis) for axis in axes]

    def met(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    cases = list(product(*(range(len(axis)) for axis in values)))
    left = set().union(*map(met, cases))
    chosen = []
    while left:
        chosen.append(max(cases, key=lambda case: len(met(case) & left)))
        left -= met(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(values, case, strict=True)) for case in sorted(chosen)]
