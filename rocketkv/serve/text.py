"""The text of an answer while its tokens arrive: whole characters, and nothing that may become a stop text."""

from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # decodes bytes that are no whole character yet
_MOST_UNFINISHED = 8  # tokens that may wait for a whole character; more are no character at all


class AnswerText:
    """Text of generated tokens, in pieces that never change later.

    Args:
        tokenizer: the model's.
        stops: texts that end the answer.

    Attributes:
        stopped: whether a stop text has ended the answer.
    """

    def __init__(self, tokenizer: Any, stops: Collection[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        # Tokens are decoded after some earlier ones, which decide on spaces: from `_first` on; those before `_next`
        # are in the text.
        self._first = self._next = 0
        self._held = ""  # may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(_UNFINISHED) and len(self._tokens) - self._next < _MOST_UNFINISHED:
            return ""
        self._first, self._next = self._next, len(self._tokens)
        return self._until_stop(new)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        if self.stopped:
            return ""
        text = self._until_stop(self._new_text())
        held, self._held = self._held, ""  # nothing behind a stop text
        self._first = self._next = len(self._tokens)
        return text + held

    def _new_text(self) -> str:
        before, both = (self._decoded(self._tokens[self._first : end]) for end in (self._next, len(self._tokens)))
        return both[len(before) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _until_stop(self, new: str) -> str:
        """Return the held and the new text up to a stop text, without an end that may begin one."""
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text
