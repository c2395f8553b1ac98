"""Scores of an answer: LongBench's official metrics and RULER's, from 0 to 100.

Each takes one prediction and its right answers. They follow the official programs to the letter, oddities included, so
that scores can be set beside published ones: LongBench's (THUDM/LongBench, `LongBench/metrics.py` and `eval.py`) and
RULER's (NVIDIA/RULER, `scripts/eval`).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from .sources import INSTALL

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_CONTROL = re.compile(r"[\x00-\x1f]")


def first_line(prediction: str) -> str:
    """Return the first line after leading line feeds: all of an answer that counts in trec, triviaqa and samsum."""
    return prediction.lstrip("\n").split("\n")[0]


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words shared with an answer, the best of several.

    Case, ASCII punctuation and English articles do not count; a word counts as often as both texts have it.
    """
    return _best(_word_f1, prediction, answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L F1 as the `rouge` package has it (summary level, sentences split at full stops), the best of several.

    0 where the package fails, as in the official program: for a text without words, and for one whose sentences are
    longer than its recursion goes.

    Raises:
        ImportError: `rouge` is not installed.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ImportError(f"ROUGE-L needs the rouge package; run: {INSTALL}") from error
    scorer = Rouge(metrics=["rouge-l"])

    def score(prediction: str, answer: str) -> float:
        try:
            return float(scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
        except (ValueError, RecursionError):
            return 0.0

    return _best(score, prediction, answers)


def classification(prediction: str, answers: Sequence[str], all_classes: Sequence[str]) -> float:
    """Score the naming of the right class: 100 over the number of classes named, 0 where it is not among them.

    A class whose name is part of the right one's does not count as named.
    """

    def score(prediction: str, answer: str) -> float:
        named = [name for name in all_classes if name in prediction]
        # The official program takes names out of the list that it walks through, and so passes over the one behind.
        position = 0
        while position < len(named):
            if named[position] in answer and named[position] != answer:
                del named[position]
            position += 1
        return 1 / len(named) if answer in named else 0.0

    return _best(score, prediction, answers)


def count(prediction: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the answer, the best of several."""
    return _best(_number_share, prediction, answers)


def retrieval(prediction: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the right paragraph's, the best of several.

    Raises:
        ValueError: an answer names no paragraph.
    """

    def score(prediction: str, answer: str) -> float:
        right = re.search(r"Paragraph (\d+)", answer)
        if right is None:
            raise ValueError(
                f"answers must each name a paragraph as 'Paragraph 7' does, got {answer!r}; check the data"
            )
        return _number_share(prediction, right.group(1))

    return _best(score, prediction, answers)


def code_sim(prediction: str, answers: Sequence[str]) -> float:
    """Edit similarity of the first line of code to an answer, in whole percents, the best of several.

    The line is the first, after leading line feeds, with no backquote, `#` or `//` in it. The official program calls
    `fuzz.ratio` of fuzzywuzzy, which is difflib's ratio rounded; RapidFuzz's function of that name is another measure.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")

    def score(code: str, answer: str) -> float:
        return 1.0 if code == answer else round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100

    return _best(score, code, answers)


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that the prediction holds, in whatever case, inside longer words too (RULER but for QA).

    Raises:
        ValueError: there are no answers.
    """
    held = _held(prediction, answers)
    return 100 * sum(held) / len(held)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction holds any of the answers, in whatever case, inside longer words too (RULER's QA).

    Raises:
        ValueError: there are no answers.
    """
    return 100.0 if any(_held(prediction, answers)) else 0.0


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return 100 * max((score(prediction, answer) for answer in answers), default=0.0)


def _word_f1(prediction: str, answer: str) -> float:
    ours, right = _words(prediction), _words(answer)
    shared = sum((Counter(ours) & Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    # Punctuation goes before articles are looked for: `the-end` is one word, and keeps its article.
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _number_share(prediction: str, right: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def _held(prediction: str, answers: Sequence[str]) -> list[bool]:
    if not answers:
        raise ValueError("answers must hold at least one, got none; check the data")
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]
