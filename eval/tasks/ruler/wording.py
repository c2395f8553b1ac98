"""RULER's wording, from `templates.json`.

Only the wording comes from lm-eval's copy: where lm-eval departs from RULER's own program, samples follow the program.
"""

from __future__ import annotations

from typing import NamedTuple

from ..sources import templates


class Wording(NamedTuple):
    """Wording of a prompt, with fields in braces.

    Attributes:
        before: text before the context.
        after: text after the context: the question.
        prefix: start of the answer.
    """

    before: str
    after: str
    prefix: str


def wording(name: str) -> Wording:
    """Return the wording of `niah_one`, `niah_many` (one value asked for, or several), `vt`, `cwe`, `fwe` or `qa`."""
    entry = templates("ruler")[name]
    before, after = entry["template"].split("{context}")
    return Wording(before, after, entry["answer_prefix"])


def piece(name: str) -> str:
    """Return the sentence `needle`, the sentences `noise` or the heading `document`, of which contexts are made."""
    text: str = templates("ruler")[name]["template"]
    return text
