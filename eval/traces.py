"""Length of an answer, and bytes of the cache over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..hf.cache import cache_stats
from .generate import DecodeLoop

_POINTS, _LEAST = 32, 64  # points of a trace at most, and tokens between two of them at least


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The course of one answer.

    Attributes:
        tokens: generated, thinking included.
        cut: whether a limit ended it, not the model.
        kv_bytes: pairs of generated tokens and bytes of the cache then, from the prompt's end to the answer's.
    """

    tokens: int
    cut: bool
    kv_bytes: tuple[tuple[int, int], ...]


def watched(
    loop: DecodeLoop,
    count: int,
    points: list[tuple[int, int]],
    ends: Collection[int] = (),
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Yield the tokens of `DecodeLoop.greedy`, and append a point of `Trace.kv_bytes` now and then.

    Args:
        loop: generates the tokens.
        count: see `DecodeLoop.greedy`.
        points: begins at the prompt's end; the caller appends the last one.
        ends: see `DecodeLoop.greedy`.
        choose: likewise.
    """
    every = max(_LEAST, -(-count // _POINTS))
    points.append((0, cache_stats(loop.cache).total_bytes))
    for number, token in enumerate(loop.greedy(count, ends, choose)):
        if number and number % every == 0:
            points.append((number, cache_stats(loop.cache).total_bytes))
        yield token
