"""RULER's needle tasks: values of keys hidden in noise, in essays, or among others of their kind."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from itertools import islice
from typing import Literal, NamedTuple

from ..base import Preparation, Sample, Turn
from ..fill import fill, room
from ..haystack import haystack
from . import templates
from .words import english

NEW_TOKENS = 128

Kind = Literal["words", "numbers", "uuids"]


class Needles(NamedTuple):
    """What a needle task hides and asks for.

    Attributes:
        filler: what the needles lie in: repeated `noise`, `essay`, or `needles` that nobody asks for.
        key: kind of the keys.
        value: kind of the values.
        keys: how many are hidden.
        values: how many each key has.
        queries: how many keys are asked for.
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

# Where needles lie in essays, in percent: RULER's 40 depths.
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))


class _Hidden(NamedTuple):
    """A needle: its sentence, and whether it is asked for."""

    sentence: str
    asked: bool


def niah_samples(task: str, prepared: Preparation) -> list[Sample]:
    """Make the samples of a needle task.

    Args:
        task: its name, in `NIAH`.
        prepared: with the length.

    Raises:
        ValueError: the length is missing or too short.
        ImportError: `wonderwords` is not installed.
    """
    room(prepared, NEW_TOKENS)
    needles = NIAH[task]
    wording = templates.niah(one=needles.queries * needles.values == 1)
    sentence = templates.needle()
    noise = templates.noise()
    essay = haystack(prepared.data_dir, prepared.seed) if needles.filler == "essay" else None

    def sample(index: int) -> Sample:
        name = f"{task}/{prepared.length}/{prepared.seed}/{index}"
        keys, hidden, before, turn = _ask(needles, wording, sentence, random.Random(name))

        def build(count: int) -> Sample:
            # Drawn anew for each count: how often the length was tried out leaves no trace.
            rng = random.Random(f"{name}/filler")
            if essay is not None:
                pieces = essay.take(count)
                places = sorted(count * depth // 100 for depth in rng.sample(_DEPTHS, len(hidden)))
            else:
                places = sorted(rng.sample(range(count), len(hidden)))
                pieces = [noise] * count if needles.filler == "noise" else _others(needles, sentence, keys, count, rng)
            text = (" " if essay is not None else "\n").join(_insert(pieces, places, hidden))
            depths = [place / count for place, needle in zip(places, hidden, strict=True) if needle.asked]
            notes = {"haystack": needles.filler if essay is None else essay.kind}
            at = {"depth": depths[0]} if len(depths) == 1 else {"depths": depths}
            return Sample(id=str(index), context=before + text, turns=(turn,), notes=notes | at)

        return fill(prepared, build, least=len(hidden))

    return [sample(index) for index in range(prepared.count)]


def _ask(
    needles: Needles, wording: templates.Wording, sentence: str, rng: random.Random
) -> tuple[list[str], list[_Hidden], str, Turn]:
    """Draw keys and values; return the keys, the needles in the order of the text, its preface, and the question."""
    keys = _distinct(needles.key, needles.keys, rng)
    drawn = iter(_distinct(needles.value, needles.keys * needles.values, rng))
    values = {key: list(islice(drawn, needles.values)) for key in keys}
    asked = rng.sample(keys, needles.queries)
    hidden = [
        _Hidden(sentence.format(type_needle_v=needles.value, key=key, value=value), key in asked)
        for key in keys
        for value in values[key]
    ]
    rng.shuffle(hidden)
    one = needles.queries * needles.values == 1
    fields = {
        "type_needle_v": needles.value[:-1] if one else needles.value,
        "query": ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0],
    }
    turn = Turn(
        question=wording.after.format(**fields),
        answers=tuple(value for key in asked for value in values[key]),
        max_new_tokens=NEW_TOKENS,
        answer_prefix=wording.prefix.format(**fields),
    )
    return keys, hidden, wording.before.format(**fields), turn


def _insert(pieces: Sequence[str], places: Sequence[int], hidden: Sequence[_Hidden]) -> list[str]:
    """Put needles before the pieces with these numbers, which rise."""
    result: list[str] = []
    done = 0
    for place, needle in zip(places, hidden, strict=True):
        result += pieces[done:place]
        result.append(needle.sentence)
        done = place
    return [*result, *pieces[done:]]


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = english()
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _distinct(kind: Kind, count: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_draw(kind, rng)] = None
    return list(drawn)


def _others(needles: Needles, sentence: str, taken: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Make needles of other keys than those taken: with one of these, a question would have two answers."""
    made: list[str] = []
    while len(made) < count:
        key, value = _draw(needles.key, rng), _draw(needles.value, rng)
        if key not in taken:
            made.append(sentence.format(type_needle_v=needles.value, key=key, value=value))
    return made
