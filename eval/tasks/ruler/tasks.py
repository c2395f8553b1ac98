"""RULER (Hsieh et al., 2024): thirteen tasks made to any length, https://github.com/NVIDIA/RULER."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ..base import TOY, Preparation, Sample, Task, Turn, generated
from ..metrics import string_match_all, string_match_part
from .niah import NIAH, niah_sample
from .qa import FILES, qa_samples
from .synthetic import cwe_sample, fwe_sample, vt_sample

_SOURCE = (
    "RULER, NVIDIA/RULER scripts/data/synthetic and scripts/eval/synthetic (Apache-2.0), wording as in lm-eval; the"
    " samples are drawn by this project's program, each from its own generator, and filled to the length"
)
_EXAMPLE = "; with the worked example before the question, which lm-eval {}"
_ANY = "; one of the answers suffices, where lm-eval divides by their number"


def _task(
    name: str,
    samples: Callable[[Preparation], Sequence[Sample]],
    *,
    group: str = "ruler",
    version: int = 1,
    source: str = "",
    metric: str = "string_match_all",
) -> Task:
    match = string_match_part if metric == "string_match_part" else string_match_all

    def score(prediction: str, turn: Turn) -> float:
        return match(prediction, turn.answers)

    return Task(
        name=name, group=group, version=version, source=_SOURCE + source, metric=metric, samples=samples, score=score
    )


def _needle_tasks(name: str, *, essays: bool) -> list[Task]:
    """Return a needle task, and where its haystack is essays the same with generated prose."""
    task = _task(name, generated(functools.partial(niah_sample, name)), version=2 if essays else 1)
    if not essays:
        return [task]
    toy = generated(functools.partial(niah_sample, name, toy=True))
    return [task, _task(f"{name}{TOY}", toy, group="ruler_toy", source="; needles in generated prose, not in essays")]


TASKS = (
    *(task for name, needles in NIAH.items() for task in _needle_tasks(name, essays=needles.filler == "essay")),
    _task("vt", generated(vt_sample), source=_EXAMPLE.format("has too")),
    _task("cwe", generated(cwe_sample), source=_EXAMPLE.format("leaves out")),
    _task("fwe", generated(fwe_sample)),
    *(
        _task(name, functools.partial(qa_samples, name), version=2, source=_ANY, metric="string_match_part")
        for name in FILES
    ),
)
