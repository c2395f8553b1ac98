"""RULER's wording, from `templates.json`.

Only the wording comes from lm-eval's copy: where lm-eval departs from RULER's own program, samples follow the program.
"""

from __future__ import annotations

from ..sources import templates


def wording(name: str) -> tuple[str, str, str]:
    """Return the text before the context, the question after it, and the start of the answer, with fields in braces.

    Args:
        name: `niah_one` (one value asked for), `niah_many` (several), `vt`, `cwe`, `fwe` or `qa`.
    """
    entry = templates("ruler")[name]
    before, after = entry["template"].split("{context}")
    return before, after, entry["answer_prefix"]


def piece(name: str) -> str:
    """Return a part of contexts: the sentence `needle`, the sentences `noise`, or the heading `document`."""
    text: str = templates("ruler")[name]["template"]
    return text
