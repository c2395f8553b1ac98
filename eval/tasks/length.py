"""Fit prompts to a length: add filler to generated ones, cut given ones in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...hf.prompts import encode, render, truncate_middle
from .base import Preparation, Sample

_NEAR = 0.98  # of the limit: full enough to stop the search
_AIM = 0.99  # of the limit: target of a guess, so that it seldom overshoots


def prompt_limit(prepared: Preparation, new_tokens: int) -> int:
    """Return the tokens that a prompt may have when `new_tokens` are generated after it.

    Raises:
        ValueError: no length is given, or it leaves no tokens for a prompt.
    """
    if prepared.length is None:
        raise ValueError("length must be a number of tokens for a task whose samples are made to a length, got None")
    if prepared.length <= new_tokens:
        raise ValueError(
            f"length must leave room for a prompt and the {new_tokens} tokens of an answer, got {prepared.length};"
            " ask for a longer one"
        )
    return prepared.length - new_tokens


def sample_tokens(prepared: Preparation, sample: Sample) -> int:
    """Return the number of tokens of a sample's first prompt, chat template included if there is one."""
    turn = sample.turns[0]
    options: dict[str, Any] = {"chat": prepared.chat, "options": prepared.chat_options}
    prompt = render(prepared.tokenizer, sample.context, turn.question, turn.answer_prefix, **options)
    return len(encode(prepared.tokenizer, prompt)[0])


def fill(prepared: Preparation, build: Callable[[int], Sample], *, least: int) -> Sample:
    """Return the sample with as many pieces of filler as fit the length.

    Prompt (chat template included) and answer never exceed the length; they fall short of it by at most 2 % or one
    piece of filler.

    Args:
        prepared: with the length.
        build: makes the sample with a given number of pieces; more pieces are more tokens.
        least: smallest number of pieces.

    Raises:
        ValueError: no length is given, or `least` pieces exceed it.
    """
    low, best = least, build(least)
    limit = prompt_limit(prepared, best.turns[0].max_new_tokens)
    low_tokens = sample_tokens(prepared, best)
    if low_tokens > limit:
        raise ValueError(
            f"length must be at least {low_tokens + best.turns[0].max_new_tokens} tokens for this sample,"
            f" got {prepared.length}; ask for a longer one"
        )
    high: int | None = None  # fewest pieces known to be too many
    guess = 4 * least + 16
    while low_tokens < _NEAR * limit and (high is None or high - low > 1):
        sample = build(guess)
        tokens = sample_tokens(prepared, sample)
        slope = max((tokens - low_tokens) / (guess - low), 0.01)  # tokens per piece
        if tokens <= limit:
            low, low_tokens, best = guess, tokens, sample
        else:
            high = guess
        guess = low + max(1, int((_AIM * limit - low_tokens) / slope))
        if high is not None:
            guess = min(guess, high - 1)
    return best


class Truncated(NamedTuple):
    """A prompt that fits.

    Attributes:
        context: up to the end of the document.
        question: the rest.
        tokens_cut: tokens removed from the middle.
        tokens_kept: limit that the prompt was cut to.
    """

    context: str
    question: str
    tokens_cut: int
    tokens_kept: int


def truncate(prepared: Preparation, context: str, question: str, max_new_tokens: int) -> Truncated:
    """Cut a prompt in the middle as LongBench does: context and question together, before the chat template.

    The limit is `prepared.length`, as papers state it (31500 and 127500 are usual), and never more than
    `prepared.max_length` minus the chat template and the answer. Where the question is longer than the last half, the
    context ends at the cut.

    Args:
        prepared: tokenizer, lengths and chat template.
        context: the prompt up to the end of the document.
        question: the rest.
        max_new_tokens: tokens of the answer.

    Raises:
        ValueError: fewer than 2 tokens fit.
    """
    tokenizer, prompt = prepared.tokenizer, context + question
    bare = render(tokenizer, "", "", chat=True, options=prepared.chat_options) if prepared.chat else None
    template = 0 if bare is None else len(encode(tokenizer, bare)[0])
    room = prepared.max_length - max_new_tokens - template
    kept = room if prepared.length is None else min(prepared.length, room)
    while True:
        text, cut = truncate_middle(tokenizer, prompt, kept)
        # Encoding the joined halves again may take a few tokens more.
        excess = len(tokenizer(text)["input_ids"]) - room if cut else 0
        if excess <= 0:
            break
        kept -= excess
    if not cut:
        return Truncated(context, question, 0, kept)
    if text.endswith(question):
        return Truncated(text[: len(text) - len(question)], question, cut, kept)

    # The question was cut, or decodes to other text: count its tokens from the end.
    asked = min(len(tokenizer(question, add_special_tokens=False)["input_ids"]), kept // 2)
    ids = tokenizer(prompt, truncation=False)["input_ids"]
    end = len(text) - len(tokenizer.decode(ids[-asked:], skip_special_tokens=True))
    return Truncated(text[:end], text[end:], cut, kept)
