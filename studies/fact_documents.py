"""Documents with facts: numbers, each in a sentence among generated prose, and a question for each.

The prose is generated, so a document needs no download and is the same on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from rocketkv.eval.tasks.text import insert_at, prose

# Text of a fact before its number and after it, and the question. No two facts begin alike, and an answer begins like
# its fact, so the model only has to copy it: a small model does that from its full cache.
_STATEMENTS = (
    ("The library owns exactly", "books", "How many books does the library own?"),
    ("The bell tower was built with", "bricks", "With how many bricks was the bell tower built?"),
    ("The ferry carried a total of", "passengers", "How many passengers did the ferry carry?"),
    ("The theatre has sold", "tickets", "How many tickets has the theatre sold?"),
    ("In the museum there are", "coins", "How many coins are there in the museum?"),
    ("The brewery fills every year", "bottles", "How many bottles does the brewery fill every year?"),
    ("Out of the quarry came", "stones", "How many stones came out of the quarry?"),
    ("The lighthouse has flashed", "times", "How many times has the lighthouse flashed?"),
    ("Astronomers counted from the observatory", "stars", "How many stars did astronomers count?"),
    ("The printing house ordered", "sheets of paper", "How many sheets of paper did the printing house order?"),
    ("Beekeepers of the valley keep", "bees", "How many bees do the beekeepers of the valley keep?"),
    ("For the new railway they laid", "sleepers", "How many sleepers did they lay for the new railway?"),
)


class Fact(NamedTuple):
    """A number hidden in a document.

    Attributes:
        begin: text of its sentence before the number, and start of the answer.
        end: text of the sentence after the number.
        question: the question for it.
        number: seven different digits, none of them zero.
    """

    begin: str
    end: str
    question: str
    number: str

    @property
    def sentence(self) -> str:
        """The sentence without its full stop."""
        return f"{self.begin} {self.number} {self.end}"


@dataclass(frozen=True)
class Document:
    """A text, and its facts in the order of the questions."""

    text: str
    facts: tuple[Fact, ...]


def document(seed: int, facts: int, sentences: int) -> Document:
    """Hide facts in prose, spread evenly, and ask for them in random order.

    Args:
        seed: of prose, numbers and order.
        facts: number of facts.
        sentences: number of sentences of prose.

    Raises:
        ValueError: there are more facts than kinds of them or sentences, or none.
    """
    most = min(len(_STATEMENTS), sentences)
    if not 1 <= facts <= most:
        raise ValueError(f"facts must be from 1 to {most}, each of its own kind and after a sentence; got {facts}")
    rng = random.Random(f"retention {seed}")
    kinds = rng.sample(_STATEMENTS, facts)
    lines = prose(rng.getrandbits(32), sentences).removesuffix(".").split(". ")
    hidden = [Fact(*kind, "".join(rng.sample("123456789", 7))) for kind in kinds]
    places = [round((number + 0.5) / facts * sentences) for number in range(facts)]
    lines = insert_at(lines, places, [fact.sentence for fact in hidden])
    rng.shuffle(hidden)
    return Document(". ".join(lines) + ".", tuple(hidden))
