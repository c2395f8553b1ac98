"""Making a prompt as long as it may be: how much filler brings prompt and answer closest to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

from ..prompts import sample_tokens
from .base import Preparation, Sample

_NEAR = 0.98  # of the room: full enough to stop looking
_AIM = 0.99  # of the room: what a guess aims at, so that it seldom overshoots


def room(prepared: Preparation, new_tokens: int) -> int:
    """Return the tokens that a prompt may have when `new_tokens` are generated after it.

    Raises:
        ValueError: no length is given, or it leaves no room for a prompt.
    """
    if prepared.length is None:
        raise ValueError("length must be a number of tokens for a task whose samples are made to a length, got None")
    if prepared.length <= new_tokens:
        raise ValueError(
            f"length must leave room for a prompt beside the {new_tokens} tokens of an answer, got {prepared.length};"
            " ask for a longer one"
        )
    return prepared.length - new_tokens


def fill(prepared: Preparation, build: Callable[[int], Sample], *, least: int) -> Sample:
    """Return the sample with so many pieces of filler that prompt and answer nearly fill the length.

    The chat template counts where there is one. What comes back does not exceed the length, and falls short of it by
    2 % or by one piece of filler.

    Args:
        prepared: with the length.
        build: makes the sample with so many pieces of filler; the more pieces, the more tokens.
        least: pieces that the sample has at least.

    Raises:
        ValueError: there is no length, or `least` pieces exceed it.
    """
    low, best = least, build(least)
    limit = room(prepared, best.turns[0].max_new_tokens)
    low_tokens = sample_tokens(prepared, best)
    if low_tokens > limit:
        raise ValueError(
            f"length must be at least {low_tokens + best.turns[0].max_new_tokens} tokens for this sample,"
            f" got {prepared.length}; ask for a longer one"
        )
    high: int | None = None  # the fewest pieces known to be too many
    guess = 4 * least + 16
    while low_tokens < _NEAR * limit and (high is None or high - low > 1):
        sample = build(guess)
        tokens = sample_tokens(prepared, sample)
        slope = max((tokens - low_tokens) / (guess - low), 0.01)  # tokens a piece
        if tokens <= limit:
            low, low_tokens, best = guess, tokens, sample
        else:
            high = guess
        guess = low + max(1, int((_AIM * limit - low_tokens) / slope))
        if high is not None:
            guess = min(guess, high - 1)
    return best
