"""SCBench's scores of an answer, from 0 to 100.

Each takes one prediction and its right answers. They follow the official program (microsoft/MInference, MIT,
`scbench/compute_scores.py`) to the letter, oddities included, so that scores can be set beside published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .sources import INSTALL

_SPACED = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_LEADS = ("answer is:", "answer:", "answer is", "option is")  # in the order in which they are looked for


def held(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction holds the answer, case and all (`kv` and `prefix_suffix`)."""
    return 100.0 * (answers[0] in prediction)


def any_held(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction holds any of the answers, in whatever case (`qa_eng` and `many_shot`).

    Where the answer is one text, as in `many_shot`, the official program looks for any single character of it, which
    nearly every prediction holds; here it is looked for as a whole.
    """
    text = prediction.strip().upper()
    return 100.0 * any(answer.upper() in text for answer in answers)


def share_held(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction holds, in whatever case, rounded to per cents (`vt`)."""
    text = prediction.lower()
    return 100.0 * round(sum(answer.lower() in text for answer in answers) / len(answers), 2)


def choice(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction chooses an answer, by its text or its letter (`choice_eng`).

    What decides is the first there is of: a capital A to D at the very start; an answer's text and nothing else; what
    stands one character after `answer is:` or the like; the first word of capitals that is a part of `ABCD`.
    """
    text = prediction.strip()
    if text and text[0] in "ABCD":
        return 100.0 * (text[0] in answers)
    if text in answers:
        return 100.0
    text = re.sub(" +", " ", text.translate(_SPACED))
    for lead in _LEADS:
        _, found, after = text.partition(lead)
        if found:
            return 100.0 * after[1:].startswith(tuple(answers))
    named = next((word for word in text.split() if word in "ABCD"), "")
    return 100.0 * (named in answers)


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """100 where the first number of the prediction, its sign apart, is the answer (`mf`).

    Where the answer is a whole number, what the prediction has after the decimal point does not count.
    """
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None or not math.isfinite(number := float(found[0])):
        return 0.0
    if re.fullmatch(r"-?\d+", answers[0]):
        return 100.0 * (int(number) == int(answers[0]))
    return 100.0 * (number == float(answers[0]))


def first_digits(prediction: str, answers: Sequence[str]) -> float:
    """100 where the first run of the digits 0 to 9 in the prediction is the answer (`passkey`)."""
    found = re.search("[0-9]+", prediction)
    return 100.0 * ((found[0] if found else "") == answers[0])


def rouge_lsum(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum F1 as the package `rouge_score` has it, lines as sentences, without stemming (`summary`).

    Raises:
        ImportError: `rouge_score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE-Lsum needs the package rouge-score, which is missing; run: {INSTALL}") from error
    scores = RougeScorer(["rougeLsum"]).score_multi(list(answers), prediction)
    return 100.0 * float(scores["rougeLsum"].fmeasure)
