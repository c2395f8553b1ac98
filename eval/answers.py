"""The answer in what a model writes: without its thinking, and of limited length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..hf.thinking import ThinkingTags

_RECENT = 16  # tokens in which a tag is looked for: more than any has


@dataclass(frozen=True, kw_only=True)
class Thought:
    """The thinking before an answer.

    Attributes:
        tokens: generated up to the end of the thinking, tags included.
        closed: whether it ended; the answer is empty where it did not.
        text: of the thinking, as far as it goes.
    """

    tokens: int
    closed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """A generated answer.

    Attributes:
        answer: its text, without the thinking before it.
        thought: that thinking; None: there is none.
        tokens: of both.
        cut: whether a limit ended it, not the model.
    """

    answer: str
    thought: Thought | None
    tokens: int
    cut: bool


def read_answer(
    tokens: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    tags: ThinkingTags | None,
    *,
    limit: int,
    thinking_limit: int = 0,
    inside: bool = False,
) -> Written:
    """Take tokens until the answer has `limit` of them, and separate it from the thinking before it.

    Args:
        tokens: as they are generated, at most `limit + thinking_limit`.
        tokenizer: decodes them.
        tags: of the thinking; None: the model has none.
        limit: tokens of the answer, those of the thinking not counted.
        thinking_limit: tokens of the thinking.
        inside: whether the prompt ended inside a thinking block.
    """

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    written: list[int] = []
    begin = 0  # of the answer
    thinking, closed, cut = inside, False, False
    for token in tokens:
        written.append(token)
        if tags is not None and not closed:
            recent = str(tokenizer.decode(written[-_RECENT:], skip_special_tokens=False))
            closed = tags.closing in recent
            thinking = thinking or closed or tags.opening in recent
            begin = len(written) if closed else 0
        if (closed or not thinking) and len(written) - begin >= limit:
            cut = True
            break
    cut = cut or len(written) >= limit + thinking_limit
    if not thinking:
        return Written(answer=text_of(written), thought=None, tokens=len(written), cut=cut)
    end = begin if closed else len(written)
    thought = Thought(tokens=end, closed=closed, text=text_of(written[:end]))
    answer = text_of(written[begin:]).lstrip("\n") if closed else ""
    return Written(answer=answer, thought=thought, tokens=len(written), cut=cut)
