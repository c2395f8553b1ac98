"""Scores of an answer, from 0 to 100: the official metrics of LongBench, of RULER, and of SCBench, in this order.

Each takes one prediction and its right answers; those of LongBench return the best answer's score. They follow the
official programs exactly, oddities included, so that scores compare with published ones: LongBench (THUDM/LongBench,
`LongBench/metrics.py` and `eval.py`), RULER (NVIDIA/RULER, `scripts/eval`), SCBench (microsoft/MInference,
`scbench/compute_scores.py`).
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ..optional import optional

Metric = Callable[[str, Sequence[str]], float]
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_LEADS = ("answer is:", "answer:", "answer is", "option is")  # in order of preference


def first_line(prediction: str) -> str:
    """Return the first line after leading line feeds: the part that counts in trec, triviaqa and samsum."""
    return prediction.lstrip("\n").split("\n")[0]


def _best_of(score: Callable[[str, str], float]) -> Metric:
    """Return the metric of several right answers: 100 times the best score of a prediction with one of them."""

    @functools.wraps(score)
    def metric(prediction: str, answers: Sequence[str]) -> float:
        return 100 * max((score(prediction, answer) for answer in answers), default=0.0)

    return metric


@_best_of
def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words shared with an answer.

    Case, ASCII punctuation and English articles are ignored; repeated words count as often as both texts have them.
    """

    def words(text: str) -> Counter[str]:
        # Punctuation goes before articles are removed: `the-end` is one word, and keeps its article.
        return Counter(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())

    predicted, right = words(prediction), words(answer)
    total = predicted.total() + right.total()
    return 2 * (predicted & right).total() / total if total else 0.0


@_best_of
def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1 of the `rouge` package (summary level, sentences split at full stops).

    0 where the package fails, as in the official program: for a text without words, and for sentences longer than its
    recursion limit.

    Raises:
        ImportError: `rouge` is not installed.
    """
    scorer = optional("rouge").Rouge(metrics=["rouge-l"])
    try:
        return float(scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def classification(prediction: str, answers: Sequence[str], all_classes: Sequence[str]) -> float:
    """100 over the number of classes in the prediction, 0 where the right one is not among them.

    A class whose name is part of the right one's does not count.
    """

    @_best_of
    def score(prediction: str, answer: str) -> float:
        named = [name for name in all_classes if name in prediction]
        # The official program removes names from the list that it iterates over, and so skips the next one.
        position = 0
        while position < len(named):
            if named[position] in answer and named[position] != answer:
                del named[position]
            position += 1
        return 1 / len(named) if answer in named else 0.0

    return score(prediction, answers)


@_best_of
def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the prediction that equal the right paragraph's, the best of several.

    Raises:
        ValueError: an answer names no paragraph.
    """
    paragraphs = [re.search(r"Paragraph (\d+)", answer) for answer in answers]
    if None in paragraphs:
        raise ValueError(f"answers must each name a paragraph as 'Paragraph 7' does, got {answers}; check the data")
    return count(prediction, [match[1] for match in paragraphs if match])


@_best_of
def code_sim(prediction: str, answer: str) -> float:
    """Edit similarity of the first line of code to an answer, in whole percents.

    The line is the first, after leading line feeds, without a backquote, `#` or `//`. The official program calls
    `fuzz.ratio` of fuzzywuzzy, which is difflib's ratio rounded; RapidFuzz's function of that name is another measure.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return 1.0 if code == answer else round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers contained in the prediction, ignoring case, inside longer words too (RULER, all but QA).

    Raises:
        ValueError: there are no answers.
    """
    matches = _matches(prediction, answers)
    return 100 * sum(matches) / len(matches)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction contains any of the answers, ignoring case, inside longer words too (RULER's QA).

    Raises:
        ValueError: there are no answers.
    """
    return 100.0 * any(_matches(prediction, answers))


def _matches(prediction: str, answers: Sequence[str]) -> list[bool]:
    if not answers:
        raise ValueError("answers must hold at least one, got none; check the data")
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]


def contains(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction contains the answer, in the same case (SCBench's `kv` and `prefix_suffix`)."""
    return 100.0 * (answers[0] in prediction)


def contains_any(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction contains any of the answers, ignoring case (SCBench's `qa_eng` and `many_shot`).

    Where the answer is one text, as in `many_shot`, the official program looks for any single character of it, which
    nearly every prediction contains; here the whole text is required.
    """
    text = prediction.strip().upper()
    return 100.0 * any(answer.upper() in text for answer in answers)


def share_contained(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers contained in the prediction, ignoring case, rounded to percents (SCBench's `vt`)."""
    text = prediction.lower()
    return 100.0 * round(sum(answer.lower() in text for answer in answers) / len(answers), 2)


def choice(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction chooses an answer, by its text or its letter (SCBench's `choice_eng`).

    The first of these decides: a capital A to D at the very start; an answer's text and nothing else; the text one
    character after `answer is:` or the like; the first word that is a substring of `ABCD`.
    """
    text = prediction.strip()
    if text and text[0] in "ABCD":
        return 100.0 * (text[0] in answers)
    if text in answers:
        return 100.0
    text = re.sub(" +", " ", text.translate(_SPACED))
    for lead in _LEADS:
        _, separator, after = text.partition(lead)
        if separator:
            return 100.0 * after[1:].startswith(tuple(answers))
    return 100.0 * (next((word for word in text.split() if word in "ABCD"), "") in answers)


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """100 where the first number of the prediction, without its sign, is the answer (SCBench's `mf`).

    Where the answer is a whole number, the prediction's digits after the decimal point are ignored.
    """
    match = re.search(r"\d+\.\d+|\d+", prediction)
    if match is None or not math.isfinite(number := float(match[0])):
        return 0.0
    if re.fullmatch(r"-?\d+", answers[0]):
        return 100.0 * (int(number) == int(answers[0]))
    return 100.0 * (number == float(answers[0]))


def first_digits(prediction: str, answers: Sequence[str]) -> float:
    """100 where the first run of the digits 0 to 9 in the prediction is the answer (SCBench's `passkey`)."""
    match = re.search("[0-9]+", prediction)
    return 100.0 * ((match[0] if match else "") == answers[0])


def rouge_lsum(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum F1 of the package `rouge_score`, one sentence per line, without stemming (SCBench's `summary`).

    Raises:
        ImportError: `rouge_score` is not installed.
    """
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    scores = scorer.score_multi(list(answers), prediction)
    return 100.0 * float(scores["rougeLsum"].fmeasure)
