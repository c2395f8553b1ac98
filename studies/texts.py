"""Texts of six kinds, made offline and from a seed, and pieces of files.

- `prose`: sentences about everyday scenes, as in task `kl`;
- `manual`: Python's language reference, which comes with Python (`pydoc_data.topics`), from some place on;
- `code`: the source of a module of Python's standard library, from some place on;
- `dialogue`: two people who take turns and come back to what was said;
- `lists`: numbered tables of names and values, in random order;
- `facts`: prose with numbers that are repeated at the end, so that the prediction depends on distant tokens.

Manual, code and lists depend on the version of Python; records contain a hash.
"""

from __future__ import annotations

import argparse  # its source is a text
import html.entities
import inspect
import locale
import mimetypes
import pydoc_data.topics
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rocketkv.eval.measures.kl import Window, start_tokens, texts
from rocketkv.eval.tasks.base import Preparation
from rocketkv.eval.tasks.text import prose

from .fact_documents import document

KINDS = ("prose", "manual", "code", "dialogue", "lists", "facts")
_FACTS = 12
_SPEAKERS = ("Ann", "Ben")
_REPLIES = ("I did not know that", "You told me so before", "Tell me more", "Are you sure", "That is what I heard")


def made_texts(
    tokenizer: PreTrainedTokenizerBase, length: int, seed: int, kinds: Sequence[str] = KINDS
) -> list[Window]:
    """Return a text of each kind, of `length` tokens, the model's start token included.

    Raises:
        ValueError: a kind is unknown, or no text is that long.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"there are no texts {', '.join(unknown)}; there are {', '.join(KINDS)}")
    start = start_tokens(tokenizer)
    room = length - len(start)
    found = []
    for kind in kinds:
        rng = random.Random(f"texts {kind} {seed}")
        if kind == "prose":
            ids = texts(Preparation(tokenizer=tokenizer, length=length, count=1, seed=seed), None)[0].ids
            ids = ids[len(start) :]
        elif kind == "facts":
            ids = _recalled(tokenizer, room, rng.getrandbits(32))
        else:
            ids = _piece(tokenizer, _source(kind, rng, length), room, rng, kind)
        found.append(Window(kind, start + ids, {"text": kind}))
    return found


def file_texts(tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path], length: int, seed: int) -> list[Window]:
    """Return a piece of each file, of `length` tokens, the model's start token included.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is too short, or two have the same name.
    """
    if len({path.name for path in paths}) < len(paths):
        raise ValueError("texts must have different names: they stand for them in the tables")
    start = start_tokens(tokenizer)
    found = []
    for path in paths:
        rng = random.Random(f"texts {path.name} {seed}")
        ids = _piece(tokenizer, path.read_text(encoding="utf-8"), length - len(start), rng, path.name)
        found.append(Window(path.name, start + ids, {"text": path.name}))
    return found


def _source(kind: str, rng: random.Random, length: int) -> str:
    """Return the whole text of a kind, of which a piece is taken."""
    if kind == "manual":
        return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    if kind == "code":
        return inspect.getsource(argparse)
    if kind == "lists":
        tables = (html.entities.html5, locale.locale_alias, mimetypes.types_map)
        rows = [row for table in tables for row in rng.sample(sorted(table.items()), min(len(table), length // 8))]
        return "\n".join(f"{number}. {name}: {value!r}" for number, (name, value) in enumerate(rows, 1))
    said = prose(rng.getrandbits(32), length // 6).removesuffix(".").split(". ")
    lines = []
    for number, sentence in enumerate(said):
        earlier = f"{rng.choice(_REPLIES)}: {rng.choice(said[:number])}. " if number and rng.random() < 0.4 else ""
        lines.append(f"{_SPEAKERS[number % 2]}: {earlier}{sentence}.")
    return "\n".join(lines)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, length: int, rng: random.Random, name: str) -> list[int]:
    """Return `length` tokens of a text from some line on."""
    starts = [place + 1 for place, letter in enumerate(text) if letter == "\n"] or [0]
    # Some twelve letters a token are more than any tokenizer takes of a text.
    last = max(0, len(text) - 12 * length)
    start = rng.choice([place for place in starts if place <= last] or [0])
    ids = _tokens(tokenizer, text[start : start + 12 * length])[:length]
    if len(ids) < length:
        raise ValueError(f"the text {name} must have at least {length} tokens from letter {start} on, got {len(ids)}")
    return ids


def _recalled(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[int]:
    """Return prose with facts in it, and at its end the facts in another order."""
    ids: list[int] = []
    end: list[int] = []
    sentences = _FACTS
    while len(ids) + len(end) < length:
        # Prose as long as is missing, so that the facts are spread over all of it.
        sentences += (length - len(ids) - len(end)) // 20 + 1
        made = document(seed, _FACTS, sentences)
        ids = _tokens(tokenizer, made.text)
        end = _tokens(tokenizer, " In short: " + ". ".join(fact.sentence for fact in made.facts) + ".")
    if len(end) >= length:
        raise ValueError(f"length must be more than the {len(end)} tokens of facts that are said again, got {length}")
    return (ids + end)[-length:]
