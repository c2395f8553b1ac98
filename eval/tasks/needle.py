"""Needle in a haystack, depth by length: a number in generated prose, asked for at the end."""

from __future__ import annotations

import random

from ..prompts import sample_tokens
from .base import Preparation, Sample, Task, Turn
from .fill import room
from .needle_text import found, needle_prompt

_NEW_TOKENS = 16  # seven digits are at most seven tokens

# Eleven depths from 0 to 1, in an order in which few samples are spread as widely as many.
DEPTHS = tuple((5 + 4 * step) % 11 / 10 for step in range(11))


def _samples(prepared: Preparation) -> list[Sample]:
    return [_sample(prepared, index) for index in range(prepared.count)]


def _sample(prepared: Preparation, index: int) -> Sample:
    depth = DEPTHS[index % len(DEPTHS)]
    seed = random.Random(f"needle_grid/{prepared.length}/{prepared.seed}/{index}").getrandbits(32)
    limit = tokens = room(prepared, _NEW_TOKENS)
    while True:
        made = needle_prompt(prepared.tokenizer, tokens=tokens, depth=depth, seed=seed)
        context, gap, asked = made.text.rpartition("\n\n")
        question, mark, prefix = asked.partition("?")
        sample = Sample(
            id=str(index),
            context=context,
            turns=(
                Turn(
                    question=gap + question + mark,
                    answers=(made.answer,),
                    max_new_tokens=_NEW_TOKENS,
                    answer_prefix=prefix,
                ),
            ),
            notes={"haystack": "generated", "depth": depth, "placed": made.depth},
        )
        over = sample_tokens(prepared, sample) - limit  # more than 0 by a chat template
        if over <= 0:
            return sample
        tokens -= over


def _score(prediction: str, turn: Turn) -> float:
    return 100.0 * found(turn.answers[0], prediction)


TASKS = (
    Task(
        name="needle_grid",
        group="needle",
        version=1,
        source="ours: a seven-digit number in prose of a small grammar, at eleven depths in turn",
        metric="accuracy",
        samples=_samples,
        score=_score,
    ),
)
