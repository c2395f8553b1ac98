"""Stacked instructions: six rules for the answer, spread through a long prompt, and a short request at its end.

A task of this project after IFEval (Zhou et al., 2023, arXiv:2311.07911): code alone decides whether an answer follows
a rule. The question names a needle, so the model can look for it; nothing names a rule, and a rule that the cache lost
is broken. Rules that hardly any answer breaks, such as a forbidden word or a largest number of words alone, are left
out: their loss would not show.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from .base import Preparation, Sample, Task, Turn, generated
from .length import fill
from .sources import templates
from .text import insert_at, prose_sentences

RULES = 6
_MAX_NEW_TOKENS = 256

_INTRODUCTION = (
    "You answer letters for a village archive. What follows are notes from the village. Between them stand rules for"
    " your answers; each begins with the words Standing rule. Every answer must keep all the rules at once.\n\n"
)
_REQUEST = (
    "\n\nWrite a short letter about {topic}. Keep every standing rule that was given between the notes."
    " Write the letter alone, with nothing before or after it.\n\nLetter:\n"
)
_TOPICS, _WORDS = (templates("instructions")[part] for part in ("topics", "words"))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _in_quotes(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"'


def _bullet_lines(text: str) -> int:
    return sum(line.lstrip(' "').startswith("- ") for line in text.splitlines())


# The rules' texts, and checks of a stripped answer with at least one word. Any of the rules can be combined.
_WORDING: Mapping[str, str] = {
    "lower_case": "write in lower case letters only.",
    "no_commas": "do not use a comma.",
    "first_word": "begin with the word {word}.",
    "last_word": "end with the word {word}.",
    "keyword": "use the word {word} exactly twice.",
    "word_range": "use at least {least} and at most {most} words.",
    "bullet_lines": "include exactly {count} lines that start with a hyphen and a space.",
    "double_quotes": "put the whole answer in one pair of double quotes.",
    "number": "mention the number {number}.",
    "exclamation": "use exactly one exclamation mark.",
}
_CHECKS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "lower_case": lambda text, _: text == text.lower(),
    "no_commas": lambda text, _: "," not in text,
    "first_word": lambda text, rule: _words(text)[0] == rule["word"],
    "last_word": lambda text, rule: _words(text)[-1] == rule["word"],
    "keyword": lambda text, rule: _words(text).count(rule["word"]) == 2,
    "word_range": lambda text, rule: bool(rule["least"] <= len(_words(text)) <= rule["most"]),
    "bullet_lines": lambda text, rule: _bullet_lines(text) == rule["count"],
    "double_quotes": lambda text, _: _in_quotes(text),
    "number": lambda text, rule: str(rule["number"]) in _words(text),
    "exclamation": lambda text, _: text.count("!") == 1,
}


def keeps(answer: str, rule: Mapping[str, Any]) -> bool:
    """Return whether an answer keeps a rule of a turn's `extra["rules"]`; an answer without a word keeps none."""
    text = answer.strip()
    return bool(_words(text)) and _CHECKS[rule["rule"]](text, rule)


def score(prediction: str, turn: Turn) -> float:
    """Return the share of the rules that an answer keeps, times 100."""
    rules = turn.extra["rules"]
    return 100.0 * sum(keeps(prediction, rule) for rule in rules) / len(rules)


def _draw_rules(rng: random.Random) -> list[dict[str, Any]]:
    first, last, keyword = rng.sample(_WORDS, 3)
    least = rng.randrange(30, 41)
    drawn: dict[str, dict[str, Any]] = {
        "first_word": {"word": first},
        "last_word": {"word": last},
        "keyword": {"word": keyword},
        "word_range": {"least": least, "most": least + 40},
        "bullet_lines": {"count": rng.randrange(2, 5)},
        "number": {"number": rng.randrange(21, 100)},
    }
    return [{"rule": name} | drawn.get(name, {}) for name in rng.sample(sorted(_WORDING), RULES)]


def _sample(prepared: Preparation, index: int) -> Sample:
    """Make a prompt: the first rule before all sentences, the last after them, the others evenly between."""
    rng = random.Random(f"stacked_instructions {prepared.seed} {index}")
    topic, rules, seed = rng.choice(_TOPICS), _draw_rules(rng), rng.randrange(2**32)
    texts = [f"Standing rule: {_WORDING[rule['rule']].format_map(rule)}" for rule in rules]
    turn = Turn(
        question=_REQUEST.format(topic=topic), answers=(), max_new_tokens=_MAX_NEW_TOKENS, extra={"rules": rules}
    )

    def build(count: int) -> Sample:
        places = [round(number * count / (RULES - 1)) for number in range(RULES)]
        pieces = insert_at(list(islice(prose_sentences(seed), count)), places, texts)
        # depth: share of the sentences before the rule
        notes = [
            {"rule": rule["rule"], "depth": round(place / count, 4)} for rule, place in zip(rules, places, strict=True)
        ]
        return Sample(id=str(index), context=_INTRODUCTION + " ".join(pieces), turns=(turn,), notes={"rules": notes})

    return fill(prepared, build, least=RULES - 1)  # one sentence between each rule and the next


TASKS = (
    Task(
        name="stacked_instructions",
        group="instructions",
        version=1,
        source="ours, after IFEval (arXiv:2311.07911)",
        metric="rules_kept",
        samples=generated(_sample),
        score=score,
    ),
)
