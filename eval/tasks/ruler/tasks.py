"""RULER (Hsieh et al., 2024): thirteen tasks made to any length, https://github.com/NVIDIA/RULER."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ..base import Preparation, Sample, Task, Turn
from ..metrics import string_match_all, string_match_part
from .niah import NIAH, niah_samples
from .qa import FILES, qa_samples
from .synthetic import cwe_samples, fwe_samples, vt_samples

_SOURCE = (
    "RULER, NVIDIA/RULER scripts/data/synthetic and scripts/eval/synthetic (Apache-2.0); wording read from lm-eval;"
    " the samples are drawn by our own program, each from a generator of its own, and filled to the length"
)
_EXAMPLE = "; with the worked example before the question, which lm-eval {}"


def _all(prediction: str, turn: Turn) -> float:
    return string_match_all(prediction, turn.answers)


def _part(prediction: str, turn: Turn) -> float:
    return string_match_part(prediction, turn.answers)


def _task(
    name: str, samples: Callable[[Preparation], Sequence[Sample]], *, part: bool = False, source: str = ""
) -> Task:
    return Task(
        name=name,
        group="ruler",
        version=1,
        source=_SOURCE + source,
        metric="string_match_part" if part else "string_match_all",
        samples=samples,
        score=_part if part else _all,
    )


TASKS = (
    *(_task(name, functools.partial(niah_samples, name)) for name in NIAH),
    _task("vt", vt_samples, source=_EXAMPLE.format("has too")),
    _task("cwe", cwe_samples, source=_EXAMPLE.format("leaves out")),
    _task("fwe", fwe_samples),
    *(
        _task(
            name,
            functools.partial(qa_samples, name),
            part=True,
            source="; one of the answers suffices, where lm-eval divides by their number",
        )
        for name in FILES
    ),
)
