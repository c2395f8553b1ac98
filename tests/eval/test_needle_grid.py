"""The needle grid: every depth in few samples, prompts of the length asked for, a number that is there to be found."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from rocketkv.eval.tasks import needle
from rocketkv.eval.tasks.base import Preparation, Sample

(TASK,) = needle.TASKS


class Words:
    """A tokenizer that cuts at white space; its chat template adds nine words."""

    chat_template: str | None = "yes"

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
        return f"you are one of us . user {talk[0]['content']} end assistant"


def make(length: int | None = 500, count: int = 1, **others: Any) -> list[Sample]:
    prepared = Preparation(**{"tokenizer": Words(), "length": length, "count": count} | others)
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
