"""Where the messages of a conversation begin in its token ids, by a tokenizer's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..state.protection import Ranges, RowMarks, shifted

# What messages of a probe say: nothing that a template writes itself, or that a tokenizer joins with its neighbours.
_SAID = ("Alpha", "Bravo", "Charlie", "Delta")
_ROLES = ("system", "user", "assistant", "user")


@dataclass(frozen=True)
class ChatMarks:
    """What a chat template writes before and between messages, in token ids.

    Attributes:
        opening: before a system message, at the beginning of a conversation.
        after_system: between a system message and the user's first.
        between: what separates messages of the user and the assistant, in both orders.
    """

    opening: tuple[int, ...]
    after_system: tuple[int, ...]
    between: tuple[tuple[int, ...], ...]

    def system(self, ids: Sequence[int]) -> Ranges:
        """Return the range of the system message with which ids begin, or nothing where they begin with none."""
        if tuple(ids[: len(self.opening)]) != self.opening:
            return ()
        ends = occurrences(ids, self.after_system)
        return ((0, ends[0] + len(self.after_system)),) if ends else ()

    def messages(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return where messages begin, but for the first one at the beginning."""
        return tuple(sorted({at for marks in (self.after_system, *self.between) for at in occurrences(ids, marks)}))


def occurrences(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return where a sequence of ids occurs in another."""
    size, wanted = len(wanted), list(wanted)
    return [i for i, token in enumerate(ids) if token == wanted[0] and list(ids[i : i + size]) == wanted]


def chat_marks(tokenizer: Any) -> ChatMarks:
    """Return what a tokenizer's chat template writes around messages.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.

    Raises:
        ValueError: it has none, the template knows no system message, or its marks depend on what a message says.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer has no chat template, by which messages could be found; give ranges to protect")
    from jinja2 import TemplateError  # only here: transformers too needs it for templates alone

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
    """Return what is marked in a row once a prompt of it is known.

    Args:
        ids: the prompt's token ids, without padding.
        before: what was marked in earlier prompts of the row, or None for the first.
        start: position in the sequence of the first of those ids.
        protect: `system`, ranges from the row's first token on, or None.
        fair_shares: whether each message is to have its share.
        chat: of the tokenizer's template, where those need it.
    """
    protected: Ranges = () if before is None else before.protected
    if before is None and protect == "system" and chat is not None:
        protected = shifted(chat.system(ids), start)
    elif before is None and protect is not None and not isinstance(protect, str):
        protected = shifted(protect, start)
    # A prompt in chunks is looked through again with each: what was found in it comes anew.
    messages = () if before is None else tuple(at for at in before.messages if at < start)
    if fair_shares and chat is not None:
        messages += tuple(start + at for at in chat.messages(ids))
    return RowMarks(protected, messages)
