"""What a model is given to read: prompts, further turns, what is cut where, and which tasks are meant."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eval_case import END, know_tasks, made_task, sample, tokenizer, words
from rocketkv.eval.prompts import encode, follow_up, longest, render, sample_tokens, truncate_middle
from rocketkv.eval.tasks.base import MODULES, Preparation, catalogue, find_tasks

WORDS = tokenizer()
PLAIN = tokenizer(chat=False)


def ids_of(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


def test_a_prompt_is_parted_where_the_context_ends() -> None:
    plain = render(WORDS, "the context", " a question", " an answer")
    assert plain == ("the context", " a question an answer", True)
    assert plain.text == "the context a question an answer"
    chat = render(WORDS, "the context", " a question", " an answer", chat=True)
    assert chat == ("<|user|>the context", f" a question{END}<|assistant|> an answer", False)
    whole = [{"role": "user", "content": "the context a question"}]
    assert chat.text == WORDS.apply_chat_template(whole, tokenize=False, add_generation_prompt=True) + " an answer"


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_between_head_and_tail() -> None:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>"], initial_alphabet=[chr(i) for i in range(32, 127)] + ["\u2581"]
    )
    made.train_from_iterator(["a doc is what you read"], trainer)
    spaced = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids, head = encode(spaced, render(spaced, "a doc", "what? yes"), apart=True)
    assert spaced.decode(ids) == "a docwhat? yes"
    assert head == len(spaced("a doc")["input_ids"])


def test_every_day_has_the_same_prompt() -> None:
    dated = tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }} {{ date_string }} {{ messages[0].content }}"
    assert render(dated, "the", " grass", chat=True).text == "01 Jan 2026 01 Jan 2026 the grass"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}}, 256),
        ({}, 256),
    ],
)
def test_the_longest_prompt_counts_rotary_scaling(fields: dict[str, Any], expected: int) -> None:
    assert longest(LlamaConfig(max_position_embeddings=256, **fields)) == expected


def test_encoded_apart_the_heads_tokens_do_not_depend_on_the_question() -> None:
    for question in ("green", " is", "", "\n"):
        prompt = render(WORDS, "the gre", question)
        apart, head = encode(WORDS, prompt, apart=True)
        assert head == len(ids_of("the gre"))
        assert apart == ids_of("the gre") + ids_of(question)
        together, same = encode(WORDS, prompt)
        assert (together, same) == (ids_of(f"the gre{question}"), head)
    # which is a difference: the two halves of a word are one token together
    assert (
        encode(WORDS, render(WORDS, "the gr", "een"))[0] != encode(WORDS, render(WORDS, "the gr", "een"), apart=True)[0]
    )


def test_special_tokens_are_added_once_and_not_to_a_chat_template() -> None:
    class Starting:
        chat_template = WORDS.chat_template
        apply_chat_template = WORDS.apply_chat_template
        convert_ids_to_tokens = WORDS.convert_ids_to_tokens

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + ids_of(text)}

    starting: PreTrainedTokenizerBase = Starting()  # type: ignore[assignment]
    for apart in (True, False):
        plain, head = encode(starting, render(starting, "the", " grass"), apart=apart)
        assert (plain, head) == ([7, *ids_of("the grass")], 1 + len(ids_of("the")))
        talk, _ = encode(starting, render(starting, "the", " grass", chat=True), apart=apart)
        assert talk == ids_of(f"<|user|>the grass{END}<|assistant|>")


def test_a_further_turn_is_what_the_template_puts_between_two_answers() -> None:
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ANSWER"},
        {"role": "user", "content": "two"},
    ]
    whole = str(WORDS.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    assert follow_up(WORDS, "two", " it is", chat=True) == whole.split("ANSWER")[1] + " it is"
    assert follow_up(PLAIN, "two", " it is") == "\n\ntwo it is"
    for make in (follow_up, lambda t, q, *, chat: render(t, "c", q, chat=chat)):
        call: Callable[..., Any] = make
        with pytest.raises(ValueError, match="no chat template"):
            call(PLAIN, "two", chat=True)


def test_a_samples_tokens_count_its_chat_template() -> None:
    made = sample(turns=2)
    text = f"{made.context}{made.turns[0].question}"
    for chat, whole in ((False, text), (True, f"<|user|>{text}{END}<|assistant|>")):
        prepared = Preparation(tokenizer=WORDS, length=None, count=1, chat=chat)
        assert sample_tokens(prepared, made) == len(ids_of(f"{whole} the number is"))


@pytest.mark.parametrize("keep", [2, 3, 10, 31, 58, 59])
def test_a_text_is_cut_in_its_middle(keep: int) -> None:
    text = words(3, 60)
    ids = ids_of(text)
    assert len(ids) > 59
    # LongBench, pred.py: half = int(max_length/2); decode(ids[:half]) + decode(ids[-half:])
    half = int(keep / 2)
    expected = WORDS.decode(ids[:half]) + WORDS.decode(ids[-half:])
    assert truncate_middle(WORDS, text, keep) == (expected, len(ids) - 2 * half)


def test_a_text_that_fits_is_left_alone() -> None:
    text = words(3, 60)
    assert truncate_middle(WORDS, text, len(ids_of(text))) == (text, 0)
    assert truncate_middle(WORDS, "", 2) == ("", 0)
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        truncate_middle(WORDS, text, 1)


def test_tasks_are_found_by_name_and_group_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (importlib.import_module(f"rocketkv.eval.tasks.{name}") for name in MODULES)
    names = sorted(task.name for module in modules for task in module.TASKS)
    assert sorted(catalogue()) == names  # no two tasks have one name
    assert len(names) > 20
    know_tasks(monkeypatch, made_task("a", group="x"), made_task("b", group="y"), made_task("c", group="x"))
    assert [task.name for task in find_tasks(["b", "x", "a"])] == ["b", "a", "c"]
    assert find_tasks([]) == []
    with pytest.raises(ValueError, match=r"no task or group 'z'. Groups: x, y"):
        find_tasks(["a", "z"])
