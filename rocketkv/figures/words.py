"""Texts of tokens, as figures and pages show them."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 90  # characters of a text that a label quotes
BLANK = "(space)"  # a token of white space


def token_texts(tokenizer: Any, ids: Tensor | Sequence[int]) -> list[str]:
    """Return the text of each token of a sequence.

    A character whose bytes span several tokens appears in the last of them.

    Args:
        tokenizer: the model's.
        ids: [S] or [1, S] token ids.
    """
    numbers = torch.as_tensor(ids).flatten().tolist()
    texts: list[str] = []
    before: list[int] = []
    begin = 0
    for end in range(1, len(numbers) + 1):
        own = numbers[begin:end]
        # Some tokenizers drop the space before the first token that they decode.
        earlier, both = (tokenizer.decode(part) for part in (before, before + own))
        text = both[len(earlier) :] if both.startswith(earlier) else tokenizer.decode(own)
        unfinished = text.endswith("\ufffd") and len(own) < 4  # a character has at most four bytes
        texts.append("" if unfinished else text)
        if not unfinished:
            begin, before = end, own
    return texts


def quoted(tokens: Sequence[str] | None, start: int, end: int) -> str:
    """Return the text of some tokens for a label of plotly, which reads some HTML tags; shortened in its middle."""
    if tokens is None:
        return ""
    text = " ".join("".join(tokens[start:end]).split())
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return html.escape(text)
