"""RULER's tasks of words and variables: chains of assignments, the most common words, the most frequent coded words."""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Sequence

from ..base import Preparation, Sample, Turn
from ..fill import fill, room
from . import templates
from .words import english

VT_NEW_TOKENS = 30
CWE_NEW_TOKENS = 120
FWE_NEW_TOKENS = 50

_HOPS = 4  # assignments of one variable to the next: five variables have the value
_EXAMPLE_TOKENS = 500  # of `vt`'s worked example and its answer, at most
_COMMON = 10  # words that `cwe` asks for
_SHORT = 4096  # tokens: below, `cwe` repeats its words less often
_CODED = 6  # letters of a coded word
_ZETA_2 = math.pi**2 / 6  # what the numbers of `fwe` fall off with: a zeta distribution of exponent 2
_FEWEST = 100  # coded words: with so many, the third of the answers is more frequent than what follows


def vt_samples(prepared: Preparation) -> list[Sample]:
    """Make samples of variable tracking: one chain of four hops, and a worked example before it.

    Raises:
        ValueError: the length is missing or too short.
    """
    room(prepared, VT_NEW_TOKENS)
    wording = templates.variable_tracking()
    noise = templates.noise() + "\n"
    example_noise = [noise] * _example_lines(prepared, wording, noise)

    def sample(index: int) -> Sample:
        name = f"vt/{prepared.length}/{prepared.seed}/{index}"
        rng = random.Random(name)
        example = _vt_example(wording, example_noise, rng)
        names, chain, value = _chain(5, rng)
        turn = _vt_turn(wording, names, value)

        def build(count: int) -> Sample:
            text, places = _hide_chain(chain, [noise] * count, random.Random(f"{name}/places"))
            return Sample(
                id=str(index),
                context=f"{example}\n\n\n\n{wording.before}{text}",
                turns=(turn,),
                notes={"haystack": "noise", "depths": [place / count for place in places]},
            )

        return fill(prepared, build, least=_HOPS + 2)

    return [sample(index) for index in range(prepared.count)]


def _vt_turn(wording: templates.Wording, names: list[str], value: str) -> Turn:
    return Turn(
        question=wording.after.format(query=value),
        answers=tuple(names),
        max_new_tokens=VT_NEW_TOKENS,
        answer_prefix=wording.prefix.format(query=value, num_v=len(names)),
    )


def _chain(letters: int, rng: random.Random) -> tuple[list[str], list[str], str]:
    """Return a chain's variables, its statements in their order, and the value."""
    drawn: dict[str, None] = {}
    while len(drawn) < _HOPS + 1:
        drawn["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    names = list(drawn)
    value = str(rng.randrange(10_000, 99_999))
    hops = [f"VAR {to} = VAR {source} " for source, to in itertools.pairwise(names)]
    return names, [f"VAR {names[0]} = {value}", *hops], value


def _hide_chain(chain: list[str], lines: list[str], rng: random.Random) -> tuple[str, list[int]]:
    """Return lines with a chain's statements before some of them, and before which."""
    places = sorted(rng.sample(range(len(lines)), len(chain)))
    text = lines.copy()
    for place, statement in reversed(list(zip(places, chain, strict=True))):
        text.insert(place, statement)
    return " ".join(text), places


def _vt_example(wording: templates.Wording, lines: list[str], rng: random.Random) -> str:
    """Return a worked example: a chain of variables of three letters, and the answer."""
    names, chain, value = _chain(3, rng)
    turn = _vt_turn(wording, names, value)
    text, _ = _hide_chain(chain, lines, rng)
    return f"{wording.before}{text}{turn.question}{turn.answer_prefix} {' '.join(names)}"


def _example_lines(prepared: Preparation, wording: templates.Wording, noise: str) -> int:
    """Return the lines of noise in the worked example: the fives of them that RULER's 500 tokens take, ten at least."""
    fives = 2
    while True:
        example = _vt_example(wording, [noise] * (5 * fives + 5), random.Random("vt/example"))
        if len(prepared.tokenizer(example)["input_ids"]) + VT_NEW_TOKENS > _EXAMPLE_TOKENS:
            return 5 * fives
        fives += 1


def cwe_samples(prepared: Preparation) -> list[Sample]:
    """Make samples of common words extraction: a numbered list in which ten words are common, with a worked example.

    Raises:
        ValueError: the length is missing, too short, or too long for the words that there are.
        ImportError: `wonderwords` is not installed.
    """
    short = room(prepared, CWE_NEW_TOKENS) + CWE_NEW_TOKENS < _SHORT
    example_words, example_repeats, repeats = (20, (3, 1), (6, 1)) if short else (40, (10, 3), (30, 3))
    wording = templates.word_extraction("cwe")
    words = english().all

    def sample(index: int) -> Sample:
        name = f"cwe/{prepared.length}/{prepared.seed}/{index}"
        rng = random.Random(name)
        common, uncommon = _split(rng.sample(words, example_words))
        listed = _numbered(common, uncommon, *example_repeats, rng)
        example = wording.before + listed + wording.after + wording.prefix + _enumerate(common)
        common, uncommon = _split(rng.sample(words, len(words)))
        turn = Turn(
            question=wording.after,
            answers=tuple(common),
            max_new_tokens=CWE_NEW_TOKENS,
            answer_prefix=wording.prefix,
        )

        def build(count: int) -> Sample:
            # Where there are too few words they are listed again, still less often than the common ones.
            if math.ceil(count / len(uncommon)) * repeats[1] >= repeats[0]:
                raise ValueError(
                    f"length must be shorter for cwe: with {prepared.length} tokens the {len(uncommon)} uncommon words"
                    " would be as common as the answers; ask for a shorter one"
                )
            filler = list(itertools.islice(itertools.cycle(uncommon), count))
            listed = _numbered(common, filler, *repeats, random.Random(f"{name}/order"))
            return Sample(
                id=str(index),
                context=f"{example}\n{wording.before}{listed}",
                turns=(turn,),
                notes={"words": _COMMON + min(count, len(uncommon))},
            )

        return fill(prepared, build, least=_COMMON)

    return [sample(index) for index in range(prepared.count)]


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    return words[:_COMMON], words[_COMMON:]


def _numbered(common: list[str], uncommon: list[str], often: int, seldom: int, rng: random.Random) -> str:
    """Return a numbered list of words, the common ones repeated often, in random order."""
    words = common * often + uncommon * seldom
    rng.shuffle(words)
    return _enumerate(words)


def _enumerate(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def fwe_samples(prepared: Preparation) -> list[Sample]:
    """Make samples of frequent words extraction: coded words whose numbers fall off as a zeta distribution.

    Raises:
        ValueError: the length is missing or too short.
    """
    length = room(prepared, FWE_NEW_TOKENS) + FWE_NEW_TOKENS
    wording = templates.word_extraction("fwe")
    ranks = range(1, max(length // 50, 5) + 1)
    shares = [rank**-2.0 / _ZETA_2 for rank in ranks]

    def sample(index: int) -> Sample:
        name = f"fwe/{length}/{prepared.seed}/{index}"
        rng = random.Random(name)
        coded: dict[str, None] = {}
        while len(coded) < len(ranks) - 1:
            coded["".join(rng.choices(string.ascii_lowercase, k=_CODED))] = None
        words = ["...", *coded]  # the most frequent is noise, which the question says to ignore
        turn = Turn(
            question=wording.after,
            answers=tuple(words[1:4]),
            max_new_tokens=FWE_NEW_TOKENS,
            answer_prefix=wording.prefix,
        )

        def build(count: int) -> Sample:
            text = [word for word, share in zip(words, shares, strict=True) for _ in range(int(count * share))]
            random.Random(f"{name}/order").shuffle(text)
            return Sample(
                id=str(index), context=wording.before + " ".join(text), turns=(turn,), notes={"words": len(text)}
            )

        return fill(prepared, build, least=_FEWEST)

    return [sample(index) for index in range(prepared.count)]
