"""Needle prompts and the task `needle_grid`: lengths, depths, and that nothing but the seed decides them."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from rocketkv.eval.tasks.base import Preparation, Sample
from rocketkv.eval.tasks.needle import TASKS, NeedlePrompt, found, needle_grid, needle_prompt
from rocketkv.eval.tasks.text import prose

LONGEST_SENTENCE = 16  # words
(TASK,) = TASKS


class Words:
    """A tokenizer that cuts at white space, puts `specials` tokens of its own first, and counts its calls."""

    def __init__(self, specials: int = 0) -> None:
        self.specials = specials
        self.calls = 0

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        self.calls += 1
        if isinstance(text, list):
            return {"input_ids": [self._ids(one, add_special_tokens) for one in text]}
        return {"input_ids": self._ids(text, add_special_tokens)}

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0] * (self.specials if add_special_tokens else 0) + [len(word) for word in text.split()]


class MergingWords(Words):
    """Cuts a sentence on its own into fewer tokens than the same sentence in a text."""

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = super()._ids(text, add_special_tokens)
        return ids if add_special_tokens else ids[:-1]


def words_before_the_needle(prompt: NeedlePrompt) -> int:
    return len(prompt.text[: prompt.text.index("One special magic number")].split())


def test_answers_are_the_same_on_every_machine() -> None:
    # Measured figures belong to prompts: should these change, so do the figures.
    assert [prompt.answer for prompt in needle_grid(Words(), tokens=100, count=3, seed=1)] == [
        "7245913",
        "9178345",
        "4175628",
    ]


@pytest.mark.parametrize("tokens", [60, 61, 137, 4096])
@pytest.mark.parametrize("specials", [0, 1], ids=["plain", "start-token"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt_fills_the_length_and_never_exceeds_it(tokens: int, specials: int, depth: float) -> None:
    tokenizer = Words(specials)
    prompt = needle_prompt(tokenizer, tokens=tokens, depth=depth, seed=1)
    assert prompt.tokens == len(tokenizer(prompt.text)["input_ids"])
    assert tokens - LONGEST_SENTENCE < prompt.tokens <= tokens


@pytest.mark.parametrize("tokens", range(300, 316))
def test_prompt_stays_short_enough_when_sentences_grow_in_the_text(tokens: int) -> None:
    prompt = needle_prompt(MergingWords(), tokens=tokens, depth=0.5, seed=1)
    assert tokens - LONGEST_SENTENCE < prompt.tokens == len(prompt.text.split()) <= tokens


def test_long_prompt_is_tokenised_in_a_few_calls() -> None:
    tokenizer = Words()
    needle_prompt(tokenizer, tokens=20_000, depth=0.5, seed=1)
    assert tokenizer.calls <= 5


@pytest.mark.parametrize("depth", [0.0, 0.03, 0.25, 0.5, 0.8, 1.0])
def test_needle_lies_at_the_depth_asked_for(depth: float) -> None:
    prompt = needle_prompt(Words(), tokens=2000, depth=depth, seed=4)
    total = len(re.sub(r"One special magic number.*?\d+\.|\n\n.*", "", prompt.text).split())
    assert prompt.depth == pytest.approx(words_before_the_needle(prompt) / total)
    assert abs(prompt.depth - depth) * total <= LONGEST_SENTENCE / 2


def test_prose_around_the_needle_is_whole() -> None:
    prompt = needle_prompt(Words(), tokens=800, depth=0.4, seed=9)
    body, question = prompt.text.split("\n\n")
    left = body.replace(f" One special magic number is hidden here: the special magic number is: {prompt.answer}.", "")
    assert left == prose(seed=9, sentences=left.count("."))
    assert question.endswith("One special magic number is hidden here: the special magic number is:")


@pytest.mark.parametrize("seed", range(20))
def test_answer_is_the_only_number(seed: int) -> None:
    prompt = needle_prompt(Words(), tokens=500, depth=0.5, seed=seed)
    assert re.findall(r"\d+", prompt.text) == [prompt.answer]
    assert len(prompt.answer) == len(set(prompt.answer)) == 7


def test_prompt_is_decided_by_its_seed() -> None:
    first, again, other = (needle_prompt(Words(), tokens=400, depth=0.5, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first.answer != other.answer
    assert first.text.split(".")[0] != other.text.split(".")[0]


def test_prompt_does_not_depend_on_hash_randomisation() -> None:
    program = """
from rocketkv.eval.tasks.needle import needle_prompt
def cut(text, **_):
    return {"input_ids": [t.split() for t in text] if isinstance(text, list) else text.split()}
print(needle_prompt(cut, tokens=300, depth=0.5, seed=2).text)
"""
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(texts) == 1


def test_grid_spreads_its_depths() -> None:
    grid = needle_grid(Words(), tokens=4096, count=20, seed=1)
    depths = [prompt.depth for prompt in grid]
    assert depths[0] == pytest.approx(0.05, abs=0.005)
    assert depths[-1] == pytest.approx(0.95, abs=0.005)
    assert all(after - before == pytest.approx(0.9 / 19, abs=0.01) for before, after in pairwise(depths))
    # A window over the last tenth of the prompt, which drops the rest, can answer no more than these.
    assert sum(depth > 0.89 for depth in depths) == 2


def test_grid_hides_another_number_in_other_prose_each_time() -> None:
    grid = needle_grid(Words(), tokens=200, count=20, seed=1)
    assert len({prompt.answer for prompt in grid}) == 20
    assert len({prompt.text.split("number")[0].split(".")[0] for prompt in grid}) > 15
    assert grid == needle_grid(Words(), tokens=200, count=20, seed=1)
    assert {p.answer for p in grid}.isdisjoint(p.answer for p in needle_grid(Words(), tokens=200, count=20, seed=2))


def test_grid_of_one_asks_in_the_middle() -> None:
    (prompt,) = needle_grid(Words(), tokens=1000, count=1, seed=1)
    assert prompt.depth == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 1234567", True),
        ("1234567.", True),
        (" 9876543. No, 1234567", True),
        ("number1234567number", True),
        (" 123456", False),
        (" 12345678", False),
        (" 01234567", False),
        (" 1234576", False),
        (" 123 4567", False),
        ("", False),
    ],
)
def test_found_wants_the_whole_number(completion: str, right: bool) -> None:
    assert found("1234567", completion) is right


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": -0.1}, r"depth must be from 0 .* to 1 .*, got -0.1"),
        ({"depth": 1.5}, r"depth must be from 0 .* to 1 .*, got 1.5"),
        ({"depth": float("nan")}, r"depth must be from 0 .* to 1 .*, got nan"),
        ({"seed": -1}, r"seed must be 0 or more, got -1"),
        ({"tokens": 0}, r"tokens must leave room .* got 0; ask for a longer prompt"),
        ({"tokens": -5}, r"tokens must leave room .* got -5; ask for a longer prompt"),
        ({"tokens": 37}, r"tokens must leave room .* which take 35 tokens here, got 37"),
    ],
    ids=["negative-depth", "deep", "nan-depth", "negative-seed", "no-tokens", "negative-tokens", "few-tokens"],
)
def test_prompt_refuses(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": 100, "depth": 0.5, "seed": 1} | changed
    with pytest.raises(ValueError, match=message):
        needle_prompt(Words(), **arguments)


class ChatWords:
    """A tokenizer that cuts at white space; its chat template adds nine words."""

    chat_template: str | None = "yes"

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [len(word) for word in text.split()]}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
        return f"you are one of us . user {talk[0]['content']} end assistant"


def make(length: int | None = 500, count: int = 1, **others: Any) -> list[Sample]:
    prepared = Preparation(**{"tokenizer": ChatWords(), "length": length, "count": count} | others)
    return list(TASK.samples(prepared))


def test_eleven_samples_have_eleven_depths_and_few_are_spread() -> None:
    depths = [sample.notes["depth"] for sample in make(300, 23)]
    assert sorted(depths[:11]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert depths[11:22] == depths[:11]
    assert depths[22] == depths[0]
    for count in range(3, 11):  # the widest gap, the ends included
        few = sorted([0.0, *depths[:count], 1.0])
        assert max(high - low for low, high in pairwise(few)) < 0.45


def test_the_needle_lies_at_its_depth() -> None:
    for sample in make(2000, 11):
        (turn,) = sample.turns
        words = sample.context.split()
        (at,) = (at for at, word in enumerate(words) if word.startswith(turn.answers[0]))
        assert at / len(words) == pytest.approx(sample.notes["depth"], abs=0.02)
        assert sample.notes["placed"] == pytest.approx(sample.notes["depth"], abs=0.02)
        assert re.findall(r"\d+", sample.context) == list(turn.answers)
        assert re.fullmatch(r"\n\n[^?]+\?", turn.question)
        assert turn.answer_prefix.endswith(" the special magic number is:")


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("length", [150, 500, 4096])
def test_prompt_and_answer_fill_their_length(length: int, chat: bool) -> None:
    for sample in make(length, 3, chat=chat):
        (turn,) = sample.turns
        whole = len((sample.context + turn.question + turn.answer_prefix).split()) + (9 if chat else 0)
        assert length - 16 <= whole + turn.max_new_tokens <= length  # a sentence has 16 words at most


def test_a_sample_depends_on_its_seed_and_place_alone() -> None:
    state = random.getstate()
    four = make(count=4)
    assert random.getstate() == state
    random.seed(7)
    assert make(count=2) == four[:2]
    assert make(count=1, seed=1)[0].context != four[0].context
    assert make(600)[0].turns[0].answers != four[0].turns[0].answers
    assert len({sample.turns[0].answers for sample in four}) == 4


def test_scores() -> None:
    (turn,) = make()[0].turns
    (answer,) = turn.answers
    assert TASK.score(f" {answer}. The baker", turn) == 100.0
    assert TASK.score(f" {answer}1", turn) == 0.0
    assert TASK.score("", turn) == 0.0


def test_lengths_that_cannot_be_filled_are_refused() -> None:
    with pytest.raises(ValueError, match="got None"):
        make(None)
    for length in (16, 40):
        with pytest.raises(ValueError, match="ask for a longer"):
            make(length)
