"""Requests as turns: the token ids of a prompt, cut where the server can return to.

Each turn is one prompt of the cache, at whose end stage 1 runs, and after which the server may keep a snapshot. A
conversation is cut where the text of a message begins, except for messages after an answer (an answer and the next
question are one turn), and between the parts of a message. So the cuts depend on the request alone, and so does the
answer: not on what the server has in memory.
"""

import copy
import re
import threading
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..hf.prompts import chat_text, continued
from .errors import RequestError
from .schema import ChatRequest, CompletionRequest, Message

# Stands for the text of a message in a template; from Unicode's private use area, and refused in messages.
_MARK = "\ue0f1\ue0f2"
_BETWEEN = "\n\n"  # between a context's text and the question, as in `rocketkv ask`
_PROBE = ("system", "user", "assistant", "user")

Turns = tuple[tuple[int, ...], ...]


class Prompts:
    """Turns of requests, for one tokenizer; any thread may ask.

    Args:
        tokenizer: the model's; it is copied.
        vocabulary: tokens of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # a tokenizer can be used by one thread at a time
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self.chats = bool(self._tokenizer.chat_template)

    def of_chat(self, request: ChatRequest) -> Turns:
        """Return the turns of a conversation; with a context, without the context's own tokens.

        Raises:
            RequestError: the conversation does not end with a user's message, or the model's template refuses it.
        """
        if not self.chats:
            raise RequestError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        messages = request.messages
        if messages[-1].role != "user":
            raise RequestError(400, "the last message must be the user's", param="messages")
        if request.context is not None and messages[0].role != "user":
            raise RequestError(
                400,
                "with a context, the first message must be the user's: a context file begins with the system message "
                "that it was made with",
                param="messages",
            )
        for number, message in enumerate(messages):
            if any(_MARK[0] in part for part in message.parts):
                raise RequestError(400, "a message contains a character of the private use area", param="messages")
            if not message.parts and message.role != "assistant":
                raise RequestError(400, f"message {number} has no text", param="messages")
        with self._lock:
            pieces = self._pieces(messages, after_context=request.context is not None)
            return self._encoded(pieces, begins=request.context is None)

    def of_completion(self, request: CompletionRequest) -> Turns:
        """Return the single turn of a completion.

        Raises:
            RequestError: a token is none of the model's.
        """
        prompt, begins = request.prompt, request.context is None
        if isinstance(prompt, list):
            if max(prompt) >= self._vocabulary:
                raise RequestError(400, f"token ids must be below {self._vocabulary}", param="prompt")
            return (tuple(prompt),)
        with self._lock:
            ids = self._tokenizer(prompt)["input_ids"] if begins else continued(self._tokenizer, prompt)
        if not ids:
            raise RequestError(400, "the prompt has no tokens", param="prompt")
        return (tuple(ids),)

    def refuse_template(self) -> None:
        """Refuse a chat template in which messages cannot be found.

        Raises:
            ValueError: the template changes or moves messages; the message says so.
        """
        try:
            _starts(self._tokenizer, [{"role": role, "content": role} for role in _PROBE[1:]])
        except RequestError as error:
            raise ValueError(f"rocketkv serve cannot use this model's chat template: {error}") from error

    def _pieces(self, messages: Sequence[Message], *, after_context: bool) -> list[str]:
        """Return the text of each turn."""
        parts = [message.parts for message in messages]
        if after_context:
            parts[0] = [_MARK + _BETWEEN + parts[0][0], *parts[0][1:]]
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        talk = [{"role": role, "content": "".join(texts)} for role, texts in zip(roles, parts, strict=True)]
        text, starts = _starts(self._tokenizer, talk)
        cuts = set()
        for number, ((start, stripped), texts) in enumerate(zip(starts, parts, strict=True)):
            if number and roles[number - 1] != "assistant":
                cuts.add(start)
            end = start - stripped
            for part in texts[:-1]:
                end += len(part)
                cuts.add(max(start, end))
        begin = 0
        if after_context:
            begin = text.index(_MARK)
            text = text.replace(_MARK, "")
            cuts = {cut - len(_MARK) for cut in cuts}
        ends = [*sorted(cut for cut in cuts if begin < cut < len(text)), len(text)]
        return [text[first:last] for first, last in zip([begin, *ends], ends, strict=False)]

    def _encoded(self, pieces: Sequence[str], *, begins: bool) -> Turns:
        """Return the token ids of each piece, encoded apart, so that they depend on no later piece."""
        found = []
        for number, piece in enumerate(pieces):
            first = begins and number == 0
            ids = self._tokenizer(piece, add_special_tokens=False)["input_ids"] if first else None
            found.append(tuple(continued(self._tokenizer, piece) if ids is None else ids))
        return tuple(ids for ids in found if ids)


def _starts(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation in the chat template, and where each message's text begins.

    Its beginning is a position, and the number of blanks before it that the template has stripped. The template is
    rendered once more with marks in place of the texts, which tells what it writes around them.

    Raises:
        RequestError: the template refuses the conversation, or changes or moves its messages.
    """
    text = _rendered(tokenizer, talk)
    marked = [{**message, "content": f"{_MARK}{number}{_MARK}"} for number, message in enumerate(talk)]
    around = re.split(f"{_MARK}([0-9]+){_MARK}", _rendered(tokenizer, marked))
    if around[1::2] != [str(number) for number in range(len(talk))]:
        raise RequestError(400, "the model's chat template leaves messages out, or changes their order")
    starts, at = [], 0
    for number, (before, after) in enumerate(zip(around[0::2], around[2::2], strict=False)):
        at += len(before) if number == 0 else 0
        said = talk[number]["content"]
        # Some templates strip the texts.
        shown = next((each for each in (said, said.strip()) if text.startswith(each + after, at)), None)
        if shown is None or (number == 0 and not text.startswith(before)):
            raise RequestError(400, f"the model's chat template changes message {number}", param="messages")
        starts.append((at, 0 if shown == said else len(said) - len(said.lstrip())))
        at += len(shown) + len(after)
    return text, starts


def _rendered(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError  # imported here: transformers too needs it for templates only

    try:
        return chat_text(tokenizer, talk)
    except (TemplateError, ValueError, TypeError) as error:
        raise RequestError(400, f"the model's chat template refuses these messages: {error}") from error
