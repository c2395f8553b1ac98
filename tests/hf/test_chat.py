"""Messages in token ids: where a chat template's system message ends, and where each message begins."""

from __future__ import annotations

from typing import Any

import pytest

from chatml import CHATML, ids_of, tokenizer_of
from rocketkv.hf.chat import ChatMarks, chat_marks, occurrences, row_marks
from rocketkv.state.protection import RowMarks

# The default system message is written where a conversation has none, as SmolLM2's template does.
LLAMA3 = (
    "<|begin|>{% for message in messages %}<|head|>{{ message.role }}<|/head|>\n\n{{ message.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|/turn|>\n{% endfor %}"
)
SKIPPING = (
    "{% for message in messages %}{% if message.role != 'system' %}<|turn|>{{ message.role }}\n{{ message.content }}"
    "<|/turn|>\n{% endif %}{% endfor %}"
)
RULES = "Answer in French.\nNever swear."
CHAT = [
    {"role": "system", "content": RULES},
    {"role": "user", "content": "Where is the harbour?"},
    {"role": "assistant", "content": "At the river."},
    {"role": "user", "content": "And the lighthouse?"},
]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>")])
def test_the_system_message_is_all_up_to_the_users_own_words(template: str, end: str) -> None:
    tokenizer = tokenizer_of(template)
    marks, ids = chat_marks(tokenizer), ids_of(tokenizer, CHAT)
    [(first, stop)] = marks.system(ids)
    assert first == 0
    found = tokenizer.decode(ids[:stop])
    assert found.count(RULES) == 1
    assert found.count(end) == 1
    assert tokenizer.decode(ids[stop:]).startswith("Where is the harbour?")


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_every_message_begins_behind_what_ends_the_one_before(template: str) -> None:
    tokenizer = tokenizer_of(template)
    marks, ids = chat_marks(tokenizer), ids_of(tokenizer, CHAT)
    begins = marks.messages(ids)
    # The user's, the assistant's, the user's, and the answer to come.
    assert len(begins) == 4
    texts = [tokenizer.decode(ids[a:b]) for a, b in zip((0, *begins), (*begins, len(ids)), strict=True)]
    for text, message in zip(texts, CHAT, strict=False):
        assert message["content"] in text
    assert not any(message["content"] in texts[4] for message in CHAT)


def test_a_conversation_without_a_system_message_protects_nothing_but_the_templates_own() -> None:
    chat = CHAT[1:]
    tokenizer = tokenizer_of(LLAMA3)
    assert chat_marks(tokenizer).system(ids_of(tokenizer, chat)) == ()
    assert chat_marks(tokenizer).system(tokenizer("Where?")["input_ids"]) == ()
    tokenizer = tokenizer_of(CHATML)  # writes one of its own
    ids = ids_of(tokenizer, chat)
    [(_, stop)] = chat_marks(tokenizer).system(ids)
    assert "You are helpful." in tokenizer.decode(ids[:stop])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "tokenizer has no chat template.*give ranges to protect"),
        (REFUSING, "refuses a conversation with a system message .System role not supported.*give ranges"),
        (SKIPPING, "leaves the message 'Alpha' out.*give ranges"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        chat_marks(tokenizer_of(template))


@pytest.mark.parametrize("merged", [(":", "A"), ("a", ";")])
def test_ids_that_depend_on_what_a_message_says_are_refused(merged: tuple[str, str]) -> None:
    template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    assert chat_marks(tokenizer_of(template, [("s", "y")])).opening
    with pytest.raises(ValueError, match="depend on the messages; give ranges"):
        chat_marks(tokenizer_of(template, [merged]))


def test_smollm2s_own_template(smollm2_tokenizer: Any) -> None:
    marks, ids = chat_marks(smollm2_tokenizer), ids_of(smollm2_tokenizer, CHAT)
    [(first, stop)] = marks.system(ids)
    assert first == 0
    assert smollm2_tokenizer.decode(ids[:stop]).endswith(f"{RULES}<|im_end|>\n<|im_start|>user\n")
    assert len(marks.messages(ids)) == 4


def test_occurrences_may_overlap() -> None:
    assert occurrences([1, 2, 1, 2, 1, 1, 2], (1, 2, 1)) == [0, 2]
    assert occurrences([1, 2], (1, 2, 3)) == []


MARKS = ChatMarks(opening=(1,), after_system=(2, 3), between=((4,), (5,)))


def test_a_rows_first_prompt_is_marked_from_its_first_token() -> None:
    ids = [1, 9, 2, 3, 9, 4, 9]
    common: dict[str, Any] = {"fair_shares": True, "chat": MARKS}
    assert row_marks(ids, None, 3, protect="system", **common) == RowMarks(((3, 7),), (5, 8))
    assert row_marks(ids, None, 3, protect=((1, 2), (4, 6)), **common) == RowMarks(((4, 5), (7, 9)), (5, 8))
    assert row_marks(ids, None, 3, protect=None, **common) == RowMarks((), (5, 8))
    assert row_marks(ids, None, 3, protect=None, fair_shares=False, chat=None) == RowMarks()


def test_a_later_prompt_adds_messages_and_protects_no_more() -> None:
    before = RowMarks(((0, 4),), (2, 5, 21))  # the last one from a chunk that is read again with the next
    found = row_marks([4, 9, 5, 1, 2, 3], before, 20, protect="system", fair_shares=True, chat=MARKS)
    assert found == RowMarks(((0, 4),), (2, 5, 20, 22, 24))
