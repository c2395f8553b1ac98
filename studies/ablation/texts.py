"""Four texts of different kinds, each made offline and from a seed.

- `prose`: sentences about everyday scenes, as in task `kl`;
- `manual`: Python's language reference, which comes with Python (`pydoc_data.topics`), from some place on;
- `code`: the source of a module of Python's standard library, from some place on;
- `facts`: prose with numbers that are repeated at the end, so that the prediction depends on distant tokens.

Manual and code depend on the version of Python; records contain a hash.
"""

from __future__ import annotations

import argparse  # its source is a text
import inspect
import pydoc_data.topics
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rocketkv.eval.measures.kl import Window, texts
from rocketkv.eval.tasks.base import Preparation

from ..fact_documents import document

KINDS = ("prose", "manual", "code", "facts")
_FACTS = 12


def four_texts(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[Window]:
    """Return a text of each kind, of `length` tokens.

    Raises:
        ValueError: no text is that long.
    """
    rng = random.Random(f"ablation {seed}")
    manual = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    found = []
    for kind in KINDS:
        if kind == "prose":
            ids = texts(Preparation(tokenizer=tokenizer, length=length, count=1, seed=seed), None)[0].ids
        elif kind == "facts":
            ids = _recalled(tokenizer, length, rng.getrandbits(32))
        else:
            ids = _piece(tokenizer, manual if kind == "manual" else inspect.getsource(argparse), length, rng, kind)
        found.append(Window(kind, ids, {"text": kind}))
    return found


def file_texts(tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path], length: int, seed: int) -> list[Window]:
    """Return a piece of each file, of `length` tokens.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is too short, or two have the same name.
    """
    if len({path.name for path in paths}) < len(paths):
        raise ValueError("texts must have different names: they stand for them in the tables")
    rng = random.Random(f"ablation {seed}")
    return [
        Window(
            path.name, _piece(tokenizer, path.read_text(encoding="utf-8"), length, rng, path.name), {"text": path.name}
        )
        for path in paths
    ]


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
