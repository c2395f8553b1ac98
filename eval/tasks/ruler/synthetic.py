"""RULER's tasks of words and variables: chains of assignments, the most common words, the most frequent coded words."""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Sequence

from ..base import Preparation, Sample, Turn
from ..length import fill, prompt_limit
from ..text import distinct, english, insert_at
from .wording import piece, wording

VT_NEW_TOKENS = 30
CWE_NEW_TOKENS = 120
FWE_NEW_TOKENS = 50

_HOPS = 4  # assignments of one variable to the next: five variables have the value
_EXAMPLE_TOKENS = 500  # most tokens of `vt`'s worked example with its answer
_COMMON = 10  # words that `cwe` asks for
_SHORT = 4096  # tokens below which `cwe` repeats its words less often
_CODED = 6  # letters of a coded word
_ZETA_2 = math.pi**2 / 6  # norm of the zeta distribution of exponent 2, which the frequencies of `fwe` follow
_FEWEST = 100  # coded words from which on the third answer is more frequent than all other words


def vt_sample(prepared: Preparation, index: int) -> Sample:
    """Make a sample of variable tracking: one chain of four hops, after a worked example.

    Raises:
        ValueError: the length is missing or too short.
    """
    noise = piece("noise") + "\n"
    name = f"vt/{prepared.length}/{prepared.seed}/{index}"
    rng = random.Random(name)
    example = _vt_example([noise] * _example_lines(prepared, noise), rng)
    names, chain, value = _chain(5, rng)
    turn = _vt_turn(names, value)

    def build(count: int) -> Sample:
        text, places = _hide_chain(chain, [noise] * count, random.Random(f"{name}/places"))
        return Sample(
            id=str(index),
            context=f"{example}\n\n\n\n{wording('vt')[0]}{text}",
            turns=(turn,),
            notes={"haystack": "noise", "depths": [place / count for place in places]},
        )

    return fill(prepared, build, least=_HOPS + 2)


def _vt_turn(names: list[str], value: str) -> Turn:
    _, after, prefix = wording("vt")
    return Turn(
        question=after.format(query=value),
        answers=tuple(names),
        max_new_tokens=VT_NEW_TOKENS,
        answer_prefix=prefix.format(query=value, num_v=len(names)),
    )


def _chain(letters: int, rng: random.Random) -> tuple[list[str], list[str], str]:
    """Return a chain's variables, its statements in order, and the value."""
    names = _random_words(_HOPS + 1, string.ascii_uppercase, letters, rng)
    value = str(rng.randrange(10_000, 99_999))
    hops = [f"VAR {target} = VAR {source} " for source, target in itertools.pairwise(names)]
    return names, [f"VAR {names[0]} = {value}", *hops], value


def _random_words(count: int, alphabet: str, letters: int, rng: random.Random) -> list[str]:
    return distinct(count, lambda: "".join(rng.choices(alphabet, k=letters)))


def _hide_chain(chain: list[str], lines: list[str], rng: random.Random) -> tuple[str, list[int]]:
    """Return lines with a chain's statements inserted, and before which lines they stand."""
    places = sorted(rng.sample(range(len(lines)), len(chain)))
    return " ".join(insert_at(lines, places, chain)), places


def _vt_example(lines: list[str], rng: random.Random) -> str:
    """Return a worked example: a chain of variables of three letters, and the answer."""
    names, chain, value = _chain(3, rng)
    turn = _vt_turn(names, value)
    text, _ = _hide_chain(chain, lines, rng)
    return f"{wording('vt')[0]}{text}{turn.question}{turn.answer_prefix} {' '.join(names)}"


def _example_lines(prepared: Preparation, noise: str) -> int:
    """Return the lines of noise in the worked example: the most that fit 500 tokens in steps of five, at least ten."""
    lines = 10
    while True:
        example = _vt_example([noise] * (lines + 5), random.Random("vt/example"))
        if len(prepared.tokenizer(example)["input_ids"]) + VT_NEW_TOKENS > _EXAMPLE_TOKENS:
            return lines
        lines += 5


def cwe_sample(prepared: Preparation, index: int) -> Sample:
    """Make a sample of common words extraction: a numbered list with ten common words, after a worked example.

    Raises:
        ValueError: the length is missing, too short, or too long for the number of words.
        ImportError: `wonderwords` is not installed.
    """
    short = prompt_limit(prepared, CWE_NEW_TOKENS) + CWE_NEW_TOKENS < _SHORT
    example_words, example_repeats, repeats = (20, (3, 1), (6, 1)) if short else (40, (10, 3), (30, 3))
    before, after, prefix = wording("cwe")
    words = english().all
    name = f"cwe/{prepared.length}/{prepared.seed}/{index}"
    rng = random.Random(name)
    drawn = rng.sample(words, example_words)
    listed = _numbered(drawn[:_COMMON], drawn[_COMMON:], *example_repeats, rng)
    example = before + listed + after + prefix + _enumerate(drawn[:_COMMON])
    drawn = rng.sample(words, len(words))
    common, uncommon = drawn[:_COMMON], drawn[_COMMON:]
    turn = Turn(question=after, answers=tuple(common), max_new_tokens=CWE_NEW_TOKENS, answer_prefix=prefix)

    def build(count: int) -> Sample:
        # Where the words run out they repeat, still less often than the common ones.
        if math.ceil(count / len(uncommon)) * repeats[1] >= repeats[0]:
            raise ValueError(
                f"length must be shorter for cwe: with {prepared.length} tokens the {len(uncommon)} uncommon words"
                " would be as common as the answers; ask for a shorter one"
            )
        filler = list(itertools.islice(itertools.cycle(uncommon), count))
        listed = _numbered(common, filler, *repeats, random.Random(f"{name}/order"))
        return Sample(
            id=str(index),
            context=f"{example}\n{before}{listed}",
            turns=(turn,),
            notes={"words": _COMMON + min(count, len(uncommon))},
        )

    return fill(prepared, build, least=_COMMON)


def _numbered(common: list[str], uncommon: list[str], often: int, seldom: int, rng: random.Random) -> str:
    """Return a numbered list of words in random order, each repeated `often` or `seldom` times."""
    words = common * often + uncommon * seldom
    rng.shuffle(words)
    return _enumerate(words)


def _enumerate(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def fwe_sample(prepared: Preparation, index: int) -> Sample:
    """Make a sample of frequent words extraction: coded words whose frequencies follow a zeta distribution.

    Raises:
        ValueError: the length is missing or too short.
    """
    length = prompt_limit(prepared, FWE_NEW_TOKENS) + FWE_NEW_TOKENS
    before, after, prefix = wording("fwe")
    ranks = range(1, max(length // 50, 5) + 1)
    name = f"fwe/{length}/{prepared.seed}/{index}"
    coded = _random_words(len(ranks) - 1, string.ascii_lowercase, _CODED, random.Random(name))
    words = ["...", *coded]  # the most frequent is noise; the question says to ignore it
    turn = Turn(question=after, answers=tuple(words[1:4]), max_new_tokens=FWE_NEW_TOKENS, answer_prefix=prefix)

    def build(count: int) -> Sample:
        shares = (rank**-2.0 / _ZETA_2 for rank in ranks)
        text = [word for word, share in zip(words, shares, strict=True) for _ in range(int(count * share))]
        random.Random(f"{name}/order").shuffle(text)
        return Sample(id=str(index), context=before + " ".join(text), turns=(turn,), notes={"words": len(text)})

    return fill(prepared, build, least=_FEWEST)
