"""Seconds of a sweep's work on a model, measured at two prompt lengths and scaled to others.

A few prompts of random tokens are read and decoded from by the same code that answers samples, in the model's own dtype
and on its own device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..measures.memory import is_out_of_memory
from ..methods import Method
from ..prefill import Prefills, after_prompt
from ..records import CellDict, canonical
from .units import attempt, free_memory

_FIRST = 256  # tokens of the first prompt; each further one has twice as many
_PATIENCE = 20.0  # seconds that the longest prefill of the probe may take: the longer, the less is extrapolated
STEPS = 9  # decode steps of each method and length; the first warms up


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured seconds.

    Attributes:
        lengths: tokens of the two prompts.
        prefills: seconds of each prefill, without what a method does at its end.
        starts: by arm, seconds between the read prompt and the first decode step, for each prompt: stage 1 and index;
            of a method that reads the prompt itself also the prefill.
        steps: by arm, seconds of a decode step after each prompt.
        errors: by arm, the error of a method that cannot run.
    """

    lengths: tuple[int, int]
    prefills: tuple[float, float]
    starts: Mapping[str, tuple[float, float]]
    steps: Mapping[str, tuple[float, float]]
    errors: Mapping[str, str]

    def prefill(self, length: float) -> float:
        """Return the seconds of a prefill: a linear part, and a quadratic one, the attention's."""
        return _curve(self.lengths, self.prefills, length)

    def start(self, arm: str, length: float) -> float:
        """Return the seconds of an arm between the read prompt and its first decode step."""
        return _curve(self.lengths, self.starts[arm], length)

    def step(self, arm: str, length: float) -> float:
        """Return the seconds of a decode step after `length` tokens: a constant and a linear part, as far as both rise.

        Noise could make the line fall, or rise faster than the length.
        """
        (short, long), (first, second) = self.lengths, self.steps[arm]
        if second <= first:
            return (first + second) / 2
        slope = min((second - first) / (long - short), second / long)
        return second + slope * (length - long)


def _curve(lengths: tuple[int, int], seconds: tuple[float, float], length: float) -> float:
    """Return a x + c x^2 through two points, with a and c of at least 0."""
    (x, y), (first, second) = lengths, seconds
    square = max(0.0, (second / y - first / x) / (y - x))
    linear = max(0.0, second / y - square * y)
    square = (second / y - linear) / y
    return linear * length + square * length**2


def arm_key(cell: CellDict) -> str:
    """Return what cells of one method, budget and settings have in common."""
    return canonical([cell["method"], cell["token_budget"], cell["settings"]]).decode()


def probe(model: PreTrainedModel, methods: Mapping[str, Method], longest: int) -> Speed:
    """Measure prefills of more and more tokens until one takes seconds, then every method at the last two lengths.

    Args:
        model: a model to which no method is attached.
        methods: by arm.
        longest: tokens of the longest prompt of the sweep, at least 2.
    """
    lengths: list[int] = []
    seconds: list[float] = []
    prefills = Prefills(model)
    length = max(1, min(_FIRST, longest // 2))
    prefills.read(_random_ids(model, length))  # warms up
    while True:
        found, error = attempt(partial(_seconds_of_prefill, prefills, _random_ids(model, length)))
        if error is not None:
            if len(lengths) < 2 or not is_out_of_memory(error):
                raise error
            free_memory()
            break
        lengths.append(length)
        seconds.append(found)
        if length == longest or (4 * found > _PATIENCE and len(lengths) > 1):
            break
        length = min(2 * length, longest)
    measured: dict[str, list[tuple[float, float]]] = {arm: [] for arm in methods}
    errors: dict[str, str] = {}
    for length in lengths[:-3:-1]:  # the longest has just been read
        ids = _random_ids(model, length)
        for arm, method in methods.items():
            if arm in errors:
                continue
            pair, error = attempt(partial(_start_and_step, model, method, ids, prefills))
            if error is None:
                measured[arm].insert(0, pair)
            else:
                errors[arm] = (str(error) or type(error).__name__).splitlines()[0]
                error.__traceback__ = None
                free_memory()
    known = {arm: pairs for arm, pairs in measured.items() if arm not in errors}
    return Speed(
        lengths=_two(lengths),
        prefills=_two(seconds),
        starts={arm: _two([start for start, _ in pairs]) for arm, pairs in known.items()},
        steps={arm: _two([step for _, step in pairs]) for arm, pairs in known.items()},
        errors=errors,
    )


def _two(values: Sequence[Any]) -> tuple[Any, Any]:
    return values[-2], values[-1]


def _random_ids(model: PreTrainedModel, length: int) -> list[int]:
    embedding: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(0, embedding.num_embeddings, (length,), generator=generator).tolist()
    return ids


def _seconds_of_prefill(prefills: Prefills, ids: list[int]) -> float:
    begin = time.perf_counter()
    prefills.read(ids)
    return time.perf_counter() - begin


def _start_and_step(model: PreTrainedModel, method: Method, ids: list[int], prefills: Prefills) -> tuple[float, float]:
    prefills.read(ids)
    begin = time.perf_counter()
    with after_prompt(model, method, ids, prefills) as loop:
        start = time.perf_counter() - begin
        for _ in range(STEPS):
            loop.step(loop.token)
        return start, median(loop.seconds[1 - STEPS :])
