"""RULER's needle tasks: values of keys hidden in noise, in essays, or among other needles."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..base import Preparation, Sample, Turn
from ..length import fill
from ..text import distinct, english, haystack, insert_at, toy_haystack
from .wording import piece, wording

NEW_TOKENS = 128

Kind = Literal["words", "numbers", "uuids"]


class Needles(NamedTuple):
    """Settings of a needle task.

    Attributes:
        filler: text around the needles: repeated `noise`, `essay`, or `needles` that nobody asks for.
        key: kind of the keys.
        value: kind of the values.
        keys: number of hidden keys.
        values: values of each key.
        queries: number of keys asked for.
    """

    filler: Literal["noise", "essay", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}

# Depths of needles in essays, in percent: RULER's 40.
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))


def niah_sample(task: str, prepared: Preparation, index: int, *, toy: bool = False) -> Sample:
    """Make a sample of a needle task, a name in `NIAH`.

    Args:
        task: its name.
        prepared: with the length.
        index: number of the sample.
        toy: whether generated prose stands for the essays.

    Raises:
        FileNotFoundError: there are no essays.
        ValueError: the length is missing or too short.
        ImportError: `wonderwords` is not installed.
    """
    needles = NIAH[task]
    name = f"{task}/{prepared.length}/{prepared.seed}/{index}"
    rng = random.Random(name)
    keys = distinct(needles.keys, lambda: _draw(needles.key, rng))
    values = distinct(needles.keys * needles.values, lambda: _draw(needles.value, rng))
    values_of = {key: values[at * needles.values : (at + 1) * needles.values] for at, key in enumerate(keys)}
    asked = rng.sample(keys, needles.queries)
    hidden = [(key, value) for key in keys for value in values_of[key]]
    rng.shuffle(hidden)

    one = needles.queries * needles.values == 1
    before, after, prefix = wording("niah_one" if one else "niah_many")
    fields = {
        "type_needle_v": needles.value[:-1] if one else needles.value,
        "query": ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0],
    }
    turn = Turn(
        question=after.format(**fields),
        answers=tuple(value for key in asked for value in values_of[key]),
        max_new_tokens=NEW_TOKENS,
        answer_prefix=prefix.format(**fields),
    )
    essay = None
    if needles.filler == "essay":
        essay = toy_haystack(prepared.seed) if toy else haystack(prepared.data_dir)

    def build(count: int) -> Sample:
        # A new generator for each count: the number of attempts leaves no trace in the sample.
        rng = random.Random(f"{name}/filler")
        if essay is not None:
            pieces = essay.take(count)
            places = sorted(count * depth // 100 for depth in rng.sample(_DEPTHS, len(hidden)))
        else:
            places = sorted(rng.sample(range(count), len(hidden)))
            pieces = [piece("noise")] * count if needles.filler == "noise" else _others(needles, keys, count, rng)
        pieces = insert_at(pieces, places, [_sentence(needles, *needle) for needle in hidden])
        depths = [place / count for place, (key, _) in zip(places, hidden, strict=True) if key in asked]
        return Sample(
            id=str(index),
            context=before.format(**fields) + (" " if essay is not None else "\n").join(pieces),
            turns=(turn,),
            notes={"haystack": needles.filler if essay is None else essay.kind}
            | ({"depth": depths[0]} if len(depths) == 1 else {"depths": depths}),
        )

    return fill(prepared, build, least=len(hidden))


def _sentence(needles: Needles, key: str, value: str) -> str:
    return piece("needle").format(type_needle_v=needles.value, key=key, value=value)


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = english()
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _others(needles: Needles, keys: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Make needles with other keys than `keys`, so that a question has one answer."""
    sentences: list[str] = []
    while len(sentences) < count:
        key, value = _draw(needles.key, rng), _draw(needles.value, rng)
        if key not in keys:
            sentences.append(_sentence(needles, key, value))
    return sentences
