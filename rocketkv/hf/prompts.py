"""Prompts of a context and a question: chat template, tokens, and truncation in the middle."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from datetime import date
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .thinking import thinking_tags

UNBOUNDED = 2**31 - 1  # for a model whose configuration has no number of positions
# Some templates print the date: it is fixed, so that prompts of different days are equal.
DAY = date(2026, 1, 1)
# Replaces the clock that transformers passes to templates: no argument does.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f"|replace('{code}', '{DAY.strftime(code)}')"
        for code in ("%Y", "%y", "%B", "%b", "%m", "%d", "%A", "%a", "%H", "%M", "%S")
    )
    + " }}{%- endmacro -%}"
)
# Marks the end of a context or an answer, to find it again in the output of a chat template. From Unicode's private use
# area: texts do not contain it, and templates do not strip it.
_MARK = "\ue0f1\ue0f2"
_SPACE = "\u2581"  # how SentencePiece writes a space


class ChatOptions(NamedTuple):
    """Options of prompts in a chat template.

    Attributes:
        arguments: variables of the template, such as `enable_thinking`.
        thinking: whether the model may think before it answers. The start of the answer is then left to the model;
            otherwise it follows a thinking block that the template opens, and which is closed without a thought.
    """

    arguments: Mapping[str, Any] = MappingProxyType({})
    thinking: bool = False


PLAIN = ChatOptions()


class Prompt(NamedTuple):
    """A prompt in two parts.

    Attributes:
        head: the text up to the end of the context, which query-agnostic compression reads first.
        tail: the question and the beginning of the answer.
        special: whether the tokenizer adds its special tokens; a chat template writes them itself.
    """

    head: str
    tail: str
    special: bool

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.tail


def render(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    answer_prefix: str = "",
    *,
    chat: bool = False,
    options: ChatOptions = PLAIN,
) -> Prompt:
    """Return a prompt of a context and its question, in the model's chat template or as plain text.

    Args:
        tokenizer: the model's.
        context: the user's message up to the question.
        question: the rest of it.
        answer_prefix: start of the answer.
        chat: whether to use the chat template.
        options: for the chat template.

    Raises:
        ValueError: `chat` is set, and the tokenizer has no chat template.
    """
    if not chat:
        return Prompt(context, question + answer_prefix, special=True)
    talk = [{"role": "user", "content": context + _MARK + question}]
    head, tail = chat_text(tokenizer, talk, options.arguments).split(_MARK)
    return Prompt(head, _begun(tokenizer, tail, answer_prefix, options), special=False)


def question_prompt(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> Prompt:
    """Return a prompt of a text and a question about it, in the model's chat template if it has one."""
    return render(tokenizer, text, f"\n\n{question}", chat=tokenizer.chat_template is not None)


def follow_up(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer_prefix: str = "",
    *,
    chat: bool = False,
    options: ChatOptions = PLAIN,
) -> str:
    """Return the text between an answer and the next answer: the next question, in the chat template if `chat`.

    Raises:
        ValueError: `chat` is set, and the tokenizer has no chat template.
    """
    if not chat:
        return f"\n\n{question}{answer_prefix}"
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"a{_MARK}"},
        {"role": "user", "content": question},
    ]
    return _begun(tokenizer, chat_text(tokenizer, talk, options.arguments).split(_MARK)[1], answer_prefix, options)


def check_chat_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Check that variables for a chat template are ones that it reads.

    Raises:
        ValueError: the template does not name one, or the tokenizer sets it itself.
    """
    template = str(tokenizer.chat_template or "")
    reserved = {"messages", "strftime_now", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in arguments:
        if name in reserved or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"a chat template argument must be a variable of the model's chat template, got {name!r}; see"
                " tokenizer.chat_template for those that it reads"
            )


def _begun(tokenizer: PreTrainedTokenizerBase, text: str, answer_prefix: str, options: ChatOptions) -> str:
    """Return the end of a prompt in a chat template, with the start of the answer outside of a thinking block."""
    if not answer_prefix:
        return text
    tags = thinking_tags(tokenizer)
    if tags is None:
        return text + answer_prefix
    return text if options.thinking else tags.closed(text) + answer_prefix


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    talk: list[dict[str, str]],
    arguments: Mapping[str, Any] = PLAIN.arguments,
) -> str:
    """Return messages in the model's chat template, up to where the next answer begins; its date is `DAY`.

    Args:
        tokenizer: the model's.
        talk: messages, with `role` and `content`.
        arguments: variables of the template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; evaluate without one (--no-chat)")
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "date_string": f"{DAY:%d %b %Y}"}
    if "strftime_now" in str(tokenizer.chat_template):
        settings["chat_template"] = _CLOCK + tokenizer.get_chat_template()
    return str(tokenizer.apply_chat_template(talk, **(settings | dict(arguments))))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, apart: bool = False) -> tuple[list[int], int]:
    """Return a prompt's token ids, and the number of tokens of its head.

    Args:
        tokenizer: the model's.
        prompt: the prompt.
        apart: whether to encode head and tail separately, so that the head's tokens do not depend on the question.
            Otherwise the prompt is encoded as one text, and the number is that of the head encoded alone.
    """
    head = list(tokenizer(prompt.head, add_special_tokens=prompt.special)["input_ids"])
    if apart:
        return head + continued(tokenizer, prompt.tail), len(head)
    return list(tokenizer(prompt.text, add_special_tokens=prompt.special)["input_ids"]), len(head)


def continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text that continues another: without the space that some tokenizers prepend."""

    def ids(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    if not str(tokenizer.convert_ids_to_tokens(ids("a")[:1])[0]).startswith(_SPACE):
        return ids(text)
    # Encode after a character that no vocabulary has, so that no token joins the two.
    return ids(_MARK[0] + text)[len(ids(_MARK[0])) :]


def longest(config: PretrainedConfig) -> int:
    """Return the most tokens that a model accepts by its configuration, rotary scaling included."""
    config = config.get_text_config()
    stated = int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or factor is None:
        return stated
    return max(stated, int(factor * scaling.get("original_max_position_embeddings", stated)))


def truncate_middle(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> tuple[str, int]:
    """Cut a text of more than `tokens` tokens in its middle, as LongBench does: keep the first and the last half.

    Args:
        tokenizer: the model's; special tokens count towards `tokens` and are removed from the result.
        text: the text.
        tokens: the most tokens to keep.

    Returns:
        The text, and the number of tokens that were cut, 0 if it fits.

    Raises:
        ValueError: `tokens` is less than 2.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, one for each half, got {tokens}; give the prompt more room")
    ids = tokenizer(text, truncation=False)["input_ids"]
    if len(ids) <= tokens:
        return text, 0
    half = tokens // 2
    first, last = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[-half:]))
    return first + last, len(ids) - 2 * half
