"""Find the messages of a conversation in its token ids, by a tokenizer's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..state.protection import Ranges, RowMarks, shifted

# Contents of the probe's messages: no template writes these words, and no tokenizer joins them with their neighbours.
_SAID = ("Alpha", "Bravo", "Charlie", "Delta")
_ROLES = ("system", "user", "assistant", "user")


@dataclass(frozen=True)
class ChatMarks:
    """Token ids that a chat template writes before and between messages.

    Attributes:
        opening: ids before a system message at the beginning of a conversation.
        after_system: ids between a system message and the first user message.
        between: ids between messages of the user and the assistant, in both orders.
    """

    opening: tuple[int, ...]
    after_system: tuple[int, ...]
    between: tuple[tuple[int, ...], ...]

    def system(self, ids: Sequence[int]) -> Ranges:
        """Return the range of the system message at the beginning of ids, or () without one."""
        if tuple(ids[: len(self.opening)]) != self.opening:
            return ()
        ends = occurrences(ids, self.after_system)
        return ((0, ends[0] + len(self.after_system)),) if ends else ()

    def messages(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the start of every message except for the first."""
        return tuple(sorted({at for marks in (self.after_system, *self.between) for at in occurrences(ids, marks)}))


def occurrences(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return the positions at which `wanted` occurs in `ids`."""
    size, wanted = len(wanted), list(wanted)
    return [i for i, token in enumerate(ids) if token == wanted[0] and list(ids[i : i + size]) == wanted]


def chat_marks(tokenizer: Any) -> ChatMarks:
    """Return the token ids that a tokenizer's chat template writes around messages.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.

    Raises:
        ValueError: there is no template, it has no system message, or its token ids depend on the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer has no chat template, by which messages could be found; give ranges to protect")
    from jinja2 import TemplateError  # imported here: transformers too needs it for templates only

    probe = [{"role": role, "content": said} for role, said in zip(_ROLES, _SAID, strict=True)]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses a conversation with a system message ({error}); give ranges to protect"
        ) from error
    pieces, rest = [], text
    for said in _SAID:
        before, found, rest = rest.partition(said)
        if not found:
            raise ValueError(
                f"the chat template leaves the message {said!r} out, or moves it (has it a system message?); give "
                "ranges to protect"
            )
        pieces.append(tuple(tokenizer(before, add_special_tokens=False)["input_ids"]))
    ids, end = tokenizer(text, add_special_tokens=False)["input_ids"], 0
    for piece in pieces:
        at = [start for start in occurrences(ids, piece) if start >= end] if piece else []
        end = at[0] + len(piece) if at else len(ids) + 1
    if end > len(ids) or tuple(ids[: len(pieces[0])]) != pieces[0]:
        raise ValueError(
            "the token ids that the chat template writes around messages depend on the messages; give ranges to protect"
        )
    return ChatMarks(pieces[0], pieces[1], (pieces[2], pieces[3]))


def row_marks(
    ids: Sequence[int],
    before: RowMarks | None,
    start: int,
    *,
    protect: str | Ranges | None,
    fair_shares: bool,
    chat: ChatMarks | None,
) -> RowMarks:
    """Return the marks of a row, including its present prompt.

    Args:
        ids: the prompt's token ids, without padding.
        before: marks of the row's earlier prompts, or None for the first prompt.
        start: position in the sequence of the first id.
        protect: `system`, ranges from the row's first token on, or None.
        fair_shares: whether each message gets its fair share.
        chat: marks of the tokenizer's chat template, or None.
    """
    protected: Ranges = () if before is None else before.protected
    if before is None and protect == "system" and chat is not None:
        protected = shifted(chat.system(ids), start)
    elif before is None and protect is not None and not isinstance(protect, str):
        protected = shifted(protect, start)
    # Each chunk of a prompt searches the whole prompt again: drop the messages found in its earlier chunks.
    messages = () if before is None else tuple(at for at in before.messages if at < start)
    if fair_shares and chat is not None:
        messages += tuple(start + at for at in chat.messages(ids))
    return RowMarks(protected, messages)
