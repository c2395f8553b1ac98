"""Needle in a haystack: a seven-digit number hidden in generated prose, asked for at the end.

The prose has no digits: the needle is the only number. The prompt ends with the needle's own words, and no digit occurs
twice in the number, so the model only has to copy it. Even a model of 135 million parameters does that from its full
cache.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from .base import Preparation, Sample, Task, Turn, generated
from .length import prompt_limit, sample_tokens
from .text import prose_sentences

_NEEDLE = "One special magic number is hidden here: the special magic number is: {answer}."
_QUESTION = (
    "\n\nWhat is the special magic number hidden in the text?"
    " One special magic number is hidden here: the special magic number is:"
)
_NEW_TOKENS = 16  # seven digits are at most seven tokens

# Eleven depths from 0 to 1, ordered so that the first few are spread widely.
DEPTHS = tuple((5 + 4 * step) % 11 / 10 for step in range(11))


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt and its answer.

    Attributes:
        text: the prompt; the model should continue it with `answer`.
        answer: the hidden number: seven different digits, none of them zero.
        depth: share of the prose's tokens before the needle, from 0 to 1.
        tokens: number of tokens of `text`, special tokens included.
    """

    text: str
    answer: str
    depth: float
    tokens: int


def needle_prompt(tokenizer: PreTrainedTokenizerBase, *, tokens: int, depth: float, seed: int) -> NeedlePrompt:
    """Hide a number in the prose of `seed` and ask for it.

    Args:
        tokenizer: splits text into tokens.
        tokens: length to fill. The prompt never exceeds it and falls short of it by less than a sentence.
        depth: place of the number: 0 before the prose, 1 after it, rounded to the nearest end of a sentence.
        seed: of the prose and of the number.

    Raises:
        ValueError: `depth` is outside 0 to 1, `seed` is negative, or `tokens` leaves no room for a sentence.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be from 0 (start of the prose) to 1 (its end), got {depth}; pass a share")
    source = prose_sentences(seed)
    answer = "".join(random.Random(f"needle {seed}").sample("123456789", 7))
    needle = _NEEDLE.format(answer=answer)
    asking = len(tokenizer(f" {needle}{_QUESTION}")["input_ids"])
    budget = tokens - asking

    # Tokenise each sentence once: the first k sentences have ends[k] tokens.
    sentences: list[str] = []
    ends = [0]
    while ends[-1] <= budget:
        batch = list(islice(source, max(1, budget // 8)))
        ids = tokenizer([f" {sentence}" for sentence in batch], add_special_tokens=False)["input_ids"]
        sentences += batch
        ends += list(accumulate(map(len, ids), initial=ends[-1]))[1:]
    fitting = sum(end <= budget for end in ends) - 1

    # Sentences tokenised together may take a token more where they meet: a second pass is rare, a third rarer.
    for kept in range(fitting, 0, -1):
        before = min(range(kept + 1), key=lambda count: abs(ends[count] - depth * ends[kept]))
        text = " ".join([*sentences[:before], needle, *sentences[before:kept]]) + _QUESTION
        length = len(tokenizer(text)["input_ids"])
        if length <= tokens:
            return NeedlePrompt(text=text, answer=answer, depth=ends[before] / ends[kept], tokens=length)
    raise ValueError(
        f"tokens must leave room for a sentence beside the needle and the question, which take {asking} tokens here,"
        f" got {tokens}; ask for a longer prompt"
    )


def needle_grid(tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int, seed: int) -> list[NeedlePrompt]:
    """Hide `count` numbers, each in different prose, at depths spread evenly from 0.05 to 0.95, shallowest first.

    Args:
        tokenizer: as in `needle_prompt`.
        tokens: length of each prompt, as in `needle_prompt`.
        count: number of prompts; a single one has its needle in the middle.
        seed: of the whole grid.

    Raises:
        ValueError: `needle_prompt` refuses an argument.
    """
    seeds = random.Random(seed).sample(range(2**32), count)
    depths = [0.05 + 0.9 * i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    return [
        needle_prompt(tokenizer, tokens=tokens, depth=depth, seed=prompt_seed)
        for depth, prompt_seed in zip(depths, seeds, strict=True)
    ]


def found(answer: str, completion: str) -> bool:
    """Return whether `completion` contains the number `answer`, and not only as part of a longer number."""
    return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", completion) is not None


def _sample(prepared: Preparation, index: int) -> Sample:
    depth = DEPTHS[index % len(DEPTHS)]
    seed = random.Random(f"needle_grid/{prepared.length}/{prepared.seed}/{index}").getrandbits(32)
    limit = tokens = prompt_limit(prepared, _NEW_TOKENS)
    while True:
        prompt = needle_prompt(prepared.tokenizer, tokens=tokens, depth=depth, seed=seed)
        question, mark, prefix = _QUESTION.partition("?")
        turn = Turn(
            question=question + mark, answers=(prompt.answer,), max_new_tokens=_NEW_TOKENS, answer_prefix=prefix
        )
        sample = Sample(
            id=str(index),
            context=prompt.text.removesuffix(_QUESTION),
            turns=(turn,),
            notes={"haystack": "generated", "depth": depth, "placed": prompt.depth},
        )
        excess = sample_tokens(prepared, sample) - limit  # positive where a chat template adds tokens
        if excess <= 0:
            return sample
        tokens -= excess


def _score(prediction: str, turn: Turn) -> float:
    return 100.0 * found(turn.answers[0], prediction)


TASKS = (
    Task(
        name="needle_grid",
        group="needle",
        version=1,
        source="ours: a seven-digit number in generated prose, at eleven depths in turn",
        metric="accuracy",
        samples=generated(_sample),
        score=_score,
    ),
)
