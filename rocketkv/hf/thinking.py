"""Tags around a model's thinking, found from its tokenizer.

Models write them in several ways: `<think>`, `[THINK]`, `<|START_THINKING|>`, or the channels of GPT-OSS, whose answer
follows `<|channel|>final<|message|>`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_NAME = re.compile("think|thought|reasoning", re.IGNORECASE)
_IN_TEMPLATE = re.compile(r"</(think|thinking|thought|reasoning)>")
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_STARTS = (("END", "START"), ("END", "BEGIN"), ("end", "start"), ("end", "begin"))


class ThinkingTags(NamedTuple):
    """The texts between which a model thinks."""

    opening: str
    closing: str

    def left_open(self, text: str) -> bool:
        """Whether a prompt ends inside a thinking block, as some chat templates do."""
        return text.rstrip().endswith(self.opening)

    def closed(self, text: str) -> str:
        """Return a prompt that ends where the final answer begins, without thinking."""
        if self.left_open(text):
            return f"{text.rstrip()}\n\n{self.closing}\n\n"
        if self.opening == _CHANNEL and not text.endswith(self.closing):
            return text + self.closing  # without a channel, GPT-OSS would not begin an answer
        return text


def thinking_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkingTags | None:
    """Return the tags of a model's thinking, from the added tokens or else the chat template; None: it has none."""
    added = set(tokenizer.get_added_vocab())
    if {_CHANNEL, _MESSAGE} <= added:
        return ThinkingTags(_CHANNEL, f"{_CHANNEL}final{_MESSAGE}")
    for closing in sorted(filter(_NAME.search, added)):
        openings = [closing.replace("/", "", 1), *(closing.replace(end, start, 1) for end, start in _STARTS)]
        opening = next((text for text in openings if text != closing and text in added), None)
        if opening is not None:
            return ThinkingTags(opening, closing)
    match = _IN_TEMPLATE.search(str(tokenizer.chat_template or ""))
    return None if match is None else ThinkingTags(f"<{match[1]}>", match[0])
