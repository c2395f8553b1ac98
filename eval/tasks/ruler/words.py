"""The English words that RULER draws from: the lists of the package `wonderwords` (MIT)."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
from typing import NamedTuple

from ..sources import INSTALL


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
    """Read the lists.

    Raises:
        ImportError: `wonderwords` is not installed.
    """
    if importlib.util.find_spec("wonderwords") is None:
        raise ImportError(
            f"RULER draws from the words of the package wonderwords, which is not installed; run: {INSTALL}"
        )
    folder = importlib.resources.files("wonderwords") / "assets"
    lists = ((folder / f"{part}list.txt").read_text(encoding="utf-8") for part in ("noun", "adjective", "verb"))
    return Words(*(tuple(sorted({word.strip() for word in text.splitlines()} - {""})) for text in lists))
