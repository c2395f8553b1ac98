"""Needle in a haystack: one seven-digit number hidden in plain prose, asked for at the end.

The prose comes out of a small seeded grammar, so that a prompt of any length needs no download and is the same on
every machine. It holds no digit: the needle is the only number, so a right answer was read in it. The last words of the
prompt repeat the needle's, and no digit occurs twice in the number: copying it is then a matter of reaching back to
the needle and of nothing else, which even a model of 135 million parameters does from its full cache.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Protocol

_NEEDLE = "One special magic number is hidden here: the special magic number is: {answer}."
_QUESTION = (
    "\n\nWhat is the special magic number hidden in the text?"
    " One special magic number is hidden here: the special magic number is:"
)


def _listed(items: str) -> list[str]:
    return items.split(", ")


_PEOPLE = _listed(
    "baker, farmer, teacher, gardener, sailor, doctor, painter, carpenter, miller, shepherd, fisherman, neighbour,"
    " grandmother, student, tailor, musician, postman, cook, librarian"
)
_DEEDS = _listed("carried, cleaned, found, washed, moved, fetched, painted, mended, sold, borrowed, hid")
_THINGS = _listed(
    "a basket of apples, the wooden chair, a jar of honey, the old lamp, a pair of boots, the kettle,"
    " a bundle of sticks, the blue blanket, a loaf of bread, the small table, a bag of flour, the rope,"
    " the garden tools, a bucket of water, the copper pan, a box of candles, the window frame, a hat"
)
_PLACES = _listed(
    "in the kitchen, near the river, behind the barn, at the market, by the harbour, under the bridge,"
    " beside the church, in the orchard, along the road, at the station, on the hill, in the garden,"
    " outside the school, next to the well, in the village square, at the edge of the forest"
)
_TIMES = _listed(
    "In the morning, After lunch, Before sunset, Late in the evening, On a rainy day, In early spring,"
    " During the summer, When the bell rang, After the storm, On market day, At dawn, In the autumn"
)
_SCENES = _listed("the sky, the water, the path, the house, the field, the street, the air, the room, the grass")
_LOOKS = _listed("quiet, warm, cold, bright, dry, green, empty, clean, dark, fresh, calm, soft, wet")
_ANIMALS = _listed("dog, cat, horse, goat, hen, sparrow, rabbit, donkey, duck, sheep")
_RESTED = _listed("slept, waited, sat, rested, walked around, stood still, looked for food, played")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def __call__(self, text: Any, *, add_special_tokens: bool = ...) -> Mapping[str, Any]:
        """Return `input_ids`: the token ids of a text, or a list of them for a list of texts."""


@dataclass(frozen=True)
class NeedlePrompt:
    """One question to a model.

    Attributes:
        text: the prompt; the model is to continue it with `answer`.
        answer: the hidden number: seven different digits, none of them zero.
        depth: share of the prose's tokens that lie before the needle, from 0 to 1.
        tokens: length of `text` as the tokenizer cuts it, its special tokens included.
    """

    text: str
    answer: str
    depth: float
    tokens: int


def prose(seed: int, sentences: int) -> str:
    """Compose plain sentences about everyday scenes, without a digit in them.

    Args:
        seed: the same seed gives the same text; a longer text begins with the shorter one.
        sentences: how many.

    Raises:
        ValueError: `seed` or `sentences` is negative.
    """
    _check_seed(seed)
    if sentences < 0:
        raise ValueError(f"sentences must be 0 or more, got {sentences}; pass how many sentences to compose")
    return " ".join(islice(_sentences(seed), sentences))


def needle_prompt(tokenizer: Tokenizer, *, tokens: int, depth: float, seed: int) -> NeedlePrompt:
    """Hide a number in the prose of `seed` and ask for it.

    Args:
        tokenizer: cuts the text into tokens, called as those of Hugging Face are.
        tokens: length to fill, in tokens. The prompt never exceeds it and falls short of it by less than a sentence.
        depth: where to hide the number: 0 before the prose, 1 after it. It goes between the two sentences closest.
        seed: of the prose and of the number.

    Raises:
        ValueError: `depth` is outside 0 to 1, `seed` is negative, or `tokens` leaves no room for a sentence.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be from 0 (start of the prose) to 1 (its end), got {depth}; pass a share")
    _check_seed(seed)
    answer = "".join(random.Random(f"needle {seed}").sample("123456789", 7))
    needle = _NEEDLE.format(answer=answer)
    asking = len(tokenizer(f" {needle}{_QUESTION}")["input_ids"])
    sentences, ends = _cut_prose(tokenizer, seed, tokens - asking)

    # Counted apart and counted together differ by a token at a seam at most: a second pass is rare, a third rarer.
    for kept in range(len(sentences), 0, -1):
        before = min(range(kept + 1), key=lambda count: abs(ends[count] - depth * ends[kept]))
        text = " ".join([*sentences[:before], needle, *sentences[before:kept]]) + _QUESTION
        length = len(tokenizer(text)["input_ids"])
        if length <= tokens:
            return NeedlePrompt(text=text, answer=answer, depth=ends[before] / ends[kept], tokens=length)
    raise ValueError(
        f"tokens must leave room for a sentence beside the needle and the question, which take {asking} tokens here,"
        f" got {tokens}; ask for a longer prompt"
    )


def needle_grid(tokenizer: Tokenizer, *, tokens: int, count: int, seed: int) -> list[NeedlePrompt]:
    """Hide `count` numbers, each in prose of its own, at depths spread evenly from 0.05 to 0.95, shallowest first.

    Args:
        tokenizer: as in `needle_prompt`.
        tokens: length of each prompt, as in `needle_prompt`.
        count: how many prompts; a single one has its needle in the middle.
        seed: of the whole grid.

    Raises:
        ValueError: `count` is less than 1, or an argument is one that `needle_prompt` refuses.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}; pass how many prompts to compose")
    _check_seed(seed)
    seeds = random.Random(seed).sample(range(2**32), count)
    depths = [0.05 + 0.9 * i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    return [needle_prompt(tokenizer, tokens=tokens, depth=at, seed=own) for at, own in zip(depths, seeds, strict=True)]


def found(answer: str, completion: str) -> bool:
    """Say whether `completion` holds the number `answer`, and not merely as part of a longer one."""
    return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", completion) is not None


def _sentences(seed: int) -> Iterator[str]:
    """Yield sentences without end."""
    rng = random.Random(seed)
    pick = rng.choice
    while True:
        pattern = rng.randrange(4)
        if pattern == 0:
            yield f"The {pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)} {pick(_PLACES)}."
        elif pattern == 1:
            yield f"{pick(_TIMES)} the {pick(_PEOPLE)} {pick(_DEEDS)} {pick(_THINGS)}."
        elif pattern == 2:
            yield f"{pick(_TIMES)} {pick(_SCENES)} was {' and '.join(rng.sample(_LOOKS, 2))}."
        else:
            yield f"The {pick(_ANIMALS)} {pick(_RESTED)} {pick(_PLACES)}."


def _cut_prose(tokenizer: Tokenizer, seed: int, budget: int) -> tuple[list[str], list[int]]:
    """Take sentences until `budget` tokens are full, each sentence tokenised once.

    Returns:
        The sentences, and where each ends: `ends[k]` is the number of tokens in the first k of them.
    """
    source = _sentences(seed)
    sentences: list[str] = []
    ends = [0]
    while ends[-1] <= budget:
        batch = list(islice(source, max(1, budget // 8)))
        cut = tokenizer([f" {sentence}" for sentence in batch], add_special_tokens=False)["input_ids"]
        sentences += batch
        ends += list(accumulate(map(len, cut), initial=ends[-1]))[1:]
    kept = max(sum(end <= budget for end in ends) - 1, 0)
    return sentences[:kept], ends[: kept + 1]


def _check_seed(seed: int) -> None:
    # random.Random takes the absolute value: -1 and 1 would silently give the same text.
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}; pass a non-negative whole number")
