"""The parts of a server by themselves: text from tokens, turns from messages."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chatml import CHATML, ids_of, tokenizer_of
from rocketkv.serve.errors import RequestError
from rocketkv.serve.prompts import Prompts
from rocketkv.serve.schema import ChatRequest
from rocketkv.serve.text import AnswerText

STRIPPING = CHATML.replace("{{ message.content }}", "{{ message.content | trim }}")
LOSING = CHATML.replace("{{ message.content }}", "{{ message.content | replace('s', 'z') }}")


def pieces(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    tokenizer = tokenizer_of(None)
    answer = AnswerText(tokenizer, stops)
    found = [answer.add(token) for token in tokenizer(text)["input_ids"]]
    return [*found, answer.finish()], answer.stopped


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🚀 end", "🚀", "  two  spaces\n\n"])
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    found, stopped = pieces(text)
    assert "".join(found) == text
    assert not stopped
    assert "\ufffd" not in "".join(found)
    assert len([piece for piece in found if piece]) >= len(text) - 1


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    tokenizer = tokenizer_of(None)
    byte = tokenizer("é")["input_ids"][0]
    answer = AnswerText(tokenizer, ())
    found = [answer.add(byte) for _ in range(40)]
    assert len([piece for piece in found if piece]) >= 4
    assert "".join([*found, answer.finish()]) == "\ufffd" * 40


def test_a_stop_text_is_cut_off_wherever_it_begins() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randint(1, 12)))
        stops = tuple("".join(rng.choice("ab\n") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 3)))
        # The first moment at which some stop text is complete ends the answer.
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        found, stopped = pieces(text, stops)
        assert stopped == bool(ends)
        if ends:
            cut = min(text[: ends[0]].find(stop) for stop in stops if stop in text[: ends[0]])
            assert "".join(found) == text[:cut]
        else:
            assert "".join(found) == text


def turns(template: str, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    tokenizer = tokenizer_of(template)
    request = ChatRequest.model_validate({"model": "m", "messages": messages, **more})
    found = Prompts(tokenizer, len(tokenizer)).of_chat(request)
    if not more:
        talk = [{**m, "content": m["content"] if isinstance(m["content"], str) else
                 "".join(part["text"] for part in m["content"])} for m in messages]  # fmt: skip
        assert [token for turn in found for token in turn] == ids_of(tokenizer, talk)
    return [str(tokenizer.decode(turn)) for turn in found]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_conversation_is_cut_before_texts_but_not_after_answers() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "D"},
        {"role": "user", "content": [text_part("E"), text_part("F")]},
        {"role": "assistant", "content": "A<|im_end|>\n<|im_start|>user\nnot me"},
        {"role": "user", "content": "Q"},
    ]
    user, end = "<|im_start|>user\n", "<|im_end|>\n"
    assert turns(CHATML, messages) == [
        f"<|im_start|>system\nS{end}{user}",
        f"D{end}{user}",
        "E",
        f"F{end}<|im_start|>assistant\n",
        f"A{end}{user}not me{end}{user}Q{end}<|im_start|>assistant\n",
    ]


@pytest.mark.parametrize(("first", "second"), [("  D ", "E  "), ("\n", "E"), ("D", " \n ")])
def test_a_template_may_strip_texts(first: str, second: str) -> None:
    found = turns(STRIPPING, [{"role": "user", "content": [text_part(first), text_part(second)]}])
    assert "".join(found).endswith(f"user\n{(first + second).strip()}<|im_end|>\n<|im_start|>assistant\n")
    if first.strip():
        assert found[0].endswith(f"user\n{first.lstrip()}") or not second.strip()


def test_a_context_stands_before_the_first_question() -> None:
    question = [{"role": "user", "content": [text_part("P"), text_part("Q")]}]
    assert turns(CHATML, question, context="c") == ["\n\nP", "Q<|im_end|>\n<|im_start|>assistant\n"]


def test_a_template_that_changes_texts_is_refused() -> None:
    with pytest.raises(RequestError, match="changes message 0"):
        turns(LOSING, [{"role": "user", "content": "seven"}])
    with pytest.raises(ValueError, match="cannot use this model's chat template"):
        Prompts(tokenizer_of(LOSING), 10).refuse_template()
