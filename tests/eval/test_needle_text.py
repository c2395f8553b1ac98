"""Needle prompts: the length, the place of the number, and that nothing but the seed decides them."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from rocketkv.eval.tasks.needle_text import NeedlePrompt, found, needle_grid, needle_prompt, prose

LONGEST_SENTENCE = 16  # words


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


def test_prose_is_sentences_without_digits() -> None:
    text = prose(seed=3, sentences=500)
    assert re.fullmatch(r"(?:[A-Z][a-z ]+\.(?: |$))+", text)
    assert text.count(".") == 500
    assert max(len(sentence.split()) for sentence in text.split(". ")) <= LONGEST_SENTENCE


def test_prose_varies() -> None:
    sentences = prose(seed=3, sentences=500).split(". ")
    assert len(set(sentences)) > 450


def test_prose_is_decided_by_its_seed() -> None:
    assert prose(seed=5, sentences=40) == prose(seed=5, sentences=40)
    assert prose(seed=5, sentences=40) != prose(seed=6, sentences=40)
    assert prose(seed=5, sentences=40).startswith(prose(seed=5, sentences=39))
    assert prose(seed=5, sentences=0) == ""


def test_prose_is_the_same_on_every_machine() -> None:
    # Measured figures belong to prompts: should these change, so do the figures.
    assert prose(seed=1, sentences=3) == (
        "On market day the teacher moved the old lamp. The donkey played outside the school."
        " After lunch the musician carried the garden tools."
    )
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
from rocketkv.eval.tasks.needle_text import needle_prompt
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


def test_grid_refuses_an_empty_one() -> None:
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        needle_grid(Words(), tokens=100, count=0, seed=1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        needle_grid(Words(), tokens=100, count=2, seed=-1)


def test_prose_refuses() -> None:
    with pytest.raises(ValueError, match="sentences must be 0 or more, got -1"):
        prose(seed=1, sentences=-1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -2"):
        prose(seed=-2, sentences=1)
