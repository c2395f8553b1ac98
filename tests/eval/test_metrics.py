"""Scores: LongBench's against the official program's, RULER's against values worked out from its definition."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rocketkv.eval.tasks import metrics
from rocketkv.eval.tasks.base import Turn
from rocketkv.eval.tasks.longbench import TASKS

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden", "longbench_metrics.json").read_text(encoding="utf-8"))
SCORED = {task.name: task for task in TASKS}
needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge") is None, reason="needs the extra `eval`")


def case(pair: dict[str, Any], number: int) -> Any:
    rouge = SCORED[pair["task"]].metric == "rouge_l"
    return pytest.param(pair, id=f"{pair['task']}-{number}", marks=[needs_rouge] if rouge else [])


@pytest.mark.parametrize("pair", [case(pair, number) for number, pair in enumerate(GOLDEN["pairs"])])
def test_longbench_scores_are_the_official_programs(pair: dict[str, Any]) -> None:
    extra = {"all_classes": pair["all_classes"]}
    turn = Turn(question="", answers=tuple(pair["answers"]), max_new_tokens=1, extra=extra)
    assert SCORED[pair["task"]].score(pair["prediction"], turn) == pytest.approx(pair["score"], abs=1e-4)


def test_the_golden_pairs_reach_every_metric() -> None:
    assert len(GOLDEN["pairs"]) == 81
    assert {SCORED[pair["task"]].metric for pair in GOLDEN["pairs"]} == {task.metric for task in TASKS}


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("12 and 34", ["12", "34"], 100),
        ("\n\n34", ["12", "34"], 50),
        ("1, 3", ["1", "2", "3"], 200 / 3),
        ("7", ["7", "7", "8"], 200 / 3),  # as often as it is listed
        ("", ["12"], 0),
        (" \n ", [" "], 0),  # what surrounds a prediction is cut, what surrounds an answer is not
        ("?!,.", ["a", "b"], 0),
        ("the CAT sat", ["Cat"], 100),
        ("concatenate", ["cat"], 100),
        ("12\t34", ["12\n34"], 100),  # control characters become line feeds
        ("12 34", ["12\n34"], 0),
    ],
)
def test_ruler_match_of_all_is_the_share_of_answers_held(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.string_match_all(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("It was Paris.", ["Rome", "Paris", "London"], 100),
        ("\nROME", ["rome"], 100),
        ("It was Oslo.", ["Rome", "Paris"], 0),
        ("", ["Rome"], 0),
        ("?!,.", ["Rome", "Paris"], 0),
        ("Romeo", ["Rome"], 100),
        ("Rom", ["Rome"], 0),
        ("New\x00York", ["new\nyork"], 100),
    ],
)
def test_ruler_match_of_part_needs_one_answer(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.string_match_part(prediction, answers) == score


@pytest.mark.parametrize("match", [metrics.string_match_all, metrics.string_match_part])
def test_ruler_refuses_a_question_without_answers(match: Callable[[str, Sequence[str]], float]) -> None:
    with pytest.raises(ValueError, match="answers must hold at least one"):
        match("12", [])


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("the-end", "the end", 0),  # one word, `theend`, against `end`
        ("A cat; a CAT", "cat cat cat", 80),  # 2 of 2 and 2 of 3 words
        ("don't", "dont", 100),
    ],
)
def test_words_are_counted_without_case_articles_and_punctuation(prediction: str, answer: str, score: float) -> None:
    assert metrics.qa_f1(prediction, [answer]) == pytest.approx(score)


def test_no_answers_score_nothing_in_longbench() -> None:
    assert metrics.qa_f1("cat", []) == 0


def test_similarity_of_code_is_rounded_to_whole_percents() -> None:
    assert metrics.code_sim("abcd", ["bcde"]) == 75  # 2 * 3 / 8
    assert metrics.code_sim("x1234567", ["xabcdefg"]) == 12  # 2 / 16, halves to the even number
    assert metrics.code_sim("", [""]) == 100


def test_taking_a_class_out_passes_over_the_next() -> None:
    # The official loop: `a` goes, `ab` moves into its place and is not looked at, so two are left.
    assert metrics.classification("abc", ["abc"], ["a", "ab", "abc"]) == 50
    assert metrics.classification("abc", ["abc"], ["a", "abc"]) == 100


def test_an_answer_that_names_no_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="'Paragraph 7'"):
        metrics.retrieval("7", ["7"])


@needs_rouge
@pytest.mark.parametrize("prediction", ["", ".", " ", "word " * 1200])
def test_rouge_is_0_where_the_package_fails(prediction: str) -> None:
    assert metrics.rouge_l(prediction, ["one two three"]) == 0


@needs_rouge
def test_rouge_takes_the_best_answer() -> None:
    assert metrics.rouge_l("one two", ["three", "one two"]) == pytest.approx(100, abs=1e-4)


def test_rouge_names_the_extra_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ImportError, match=r"rocketkv\[eval\]"):
        metrics.rouge_l("a", ["a"])
