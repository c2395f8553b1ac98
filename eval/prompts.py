"""From a sample to the tokens that a model reads: chat template, middle truncation, and where the context ends."""

from __future__ import annotations

from datetime import date
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .tasks.base import Preparation, Sample

UNBOUNDED = 2**31 - 1  # of a model whose configuration has no number of positions
# Some templates print the date: the same one in every record, or two days' would not compare.
DAY = date(2026, 1, 1)
# In place of the clock that templates are given, and that no argument can replace.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f"|replace('{code}', '{DAY.strftime(code)}')"
        for code in ("%Y", "%y", "%B", "%b", "%m", "%d", "%A", "%a", "%H", "%M", "%S")
    )
    + " }}{%- endmacro -%}"
)
# Put where the context ends, or an answer, to find it again in what a chat template makes of the text. From the private
# use area of Unicode: no text has them, and no template strips them.
_MARK = "\ue0f1\ue0f2"
_SPACE = "\u2581"  # how SentencePiece writes a space


class Prompt(NamedTuple):
    """A prompt in two parts.

    Attributes:
        head: up to the end of the context: what is compressed first where the evaluation is question-agnostic.
        tail: the rest: the question, and how the answer begins.
        special: whether the tokenizer is to add its special tokens: a chat template writes them itself.
    """

    head: str
    tail: str
    special: bool

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.tail


def render(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, answer_prefix: str = "", *, chat: bool = False
) -> Prompt:
    """Make a prompt of a context and its question, in the model's chat template or as they are.

    Raises:
        ValueError: a chat template is asked for that the tokenizer does not have.
    """
    if not chat:
        return Prompt(context, question + answer_prefix, special=True)
    head, tail = _chat(tokenizer, [{"role": "user", "content": context + _MARK + question}]).split(_MARK)
    return Prompt(head, tail + answer_prefix, special=False)


def follow_up(tokenizer: PreTrainedTokenizerBase, question: str, answer_prefix: str = "", *, chat: bool = False) -> str:
    """Return what follows an answer when the next question is asked.

    Raises:
        ValueError: a chat template is asked for that the tokenizer does not have.
    """
    if not chat:
        return f"\n\n{question}{answer_prefix}"
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"a{_MARK}"},
        {"role": "user", "content": question},
    ]
    return _chat(tokenizer, talk).split(_MARK)[1] + answer_prefix


def _chat(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; evaluate without one (--no-chat)")
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "date_string": f"{DAY:%d %b %Y}"}
    if "strftime_now" in str(tokenizer.chat_template):
        settings["chat_template"] = _CLOCK + tokenizer.get_chat_template()
    return str(tokenizer.apply_chat_template(talk, **settings))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, apart: bool = False) -> tuple[list[int], int]:
    """Return a prompt's token ids, and how many of them are its head's.

    Args:
        tokenizer: the model's.
        prompt: what to encode.
        apart: encode head and tail apart, so that the head's tokens do not depend on the question; otherwise all is
            encoded as one, as a model is asked in use, and the number is that of the head's by itself.
    """
    head = list(tokenizer(prompt.head, add_special_tokens=prompt.special)["input_ids"])
    if apart:
        return head + continued(tokenizer, prompt.tail), len(head)
    return list(tokenizer(prompt.text, add_special_tokens=prompt.special)["input_ids"]), len(head)


def continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text that goes on after another: without the space that some put before every text."""

    def ids(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    if not str(tokenizer.convert_ids_to_tokens(ids("a")[:1])[0]).startswith(_SPACE):
        return ids(text)
    # After a character that no vocabulary has, and so no token has with others.
    return ids(_MARK[0] + text)[len(ids(_MARK[0])) :]


def longest(config: PretrainedConfig) -> int:
    """Return how many tokens a model takes at most, as its configuration has it, rotary scaling counted."""
    config = config.get_text_config()
    stated = int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or factor is None:
        return stated
    return max(stated, int(factor * scaling.get("original_max_position_embeddings", stated)))


def sample_tokens(prepared: Preparation, sample: Sample) -> int:
    """Return the tokens of a sample's first prompt, chat template included where there is one."""
    turn = sample.turns[0]
    prompt = render(prepared.tokenizer, sample.context, turn.question, turn.answer_prefix, chat=prepared.chat)
    return len(encode(prepared.tokenizer, prompt)[0])


def truncate_middle(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> tuple[str, int]:
    """Cut a text of more than `tokens` tokens in its middle, as LongBench does: the first half and the last half stay.

    Args:
        tokenizer: the model's; special tokens count, and are left out of what comes back.
        text: to cut.
        tokens: how many may stay.

    Returns:
        The text, and how many tokens were cut, 0 where it fits.

    Raises:
        ValueError: fewer than 2 tokens may stay.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, one for each half, got {tokens}; give the prompt more room")
    ids = tokenizer(text, truncation=False)["input_ids"]
    if len(ids) <= tokens:
        return text, 0
    half = tokens // 2
    first, last = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[-half:]))
    return first + last, len(ids) - 2 * half
