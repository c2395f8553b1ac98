"""A made-up tokenizer, so that tests of samples need no vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Words:
    """Cuts at white space, and puts one token of its own first."""

    chat_template = None

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[len(word) for word in one.split()] for one in text]}
        return {"input_ids": [0] * add_special_tokens + [len(word) for word in text.split()]}
