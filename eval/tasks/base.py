"""What a benchmark is to the harness: samples to ask, and a rule that scores an answer.

A benchmark is one file, with a tuple `TASKS` of `Task`, that `MODULES` lists; `find_tasks` knows them by name and by
group.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

MODULES = ("instructions", "longbench", "longbench_v2", "longproc", "needle", "ruler.tasks", "scbench")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question on a context, and what answers it.

    Attributes:
        question: what follows the context in the user's message.
        answers: right answers; what several mean is the scorer's.
        max_new_tokens: tokens to generate at most.
        answer_prefix: how the answer begins; written for the model, and not part of what it generates.
        extra: what the scorer needs besides, of JSON's types.
    """

    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context and the questions on it: one, or several turns of a conversation.

    Attributes:
        id: unique within its task and length.
        context: the user's message up to the question; what a method compresses before it has seen the question, where
            the evaluation is question-agnostic.
        turns: the questions, at least one.
        notes: how it was made (depth of a needle, tokens cut, ...), of JSON's types, for the record.
    """

    id: str
    context: str
    turns: tuple[Turn, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What samples are made for.

    Attributes:
        tokenizer: the model's.
        length: tokens that prompt and answer may fill together, or None for the data's own, cut at the model's.
        count: samples to make; the first of a larger number are the same.
        seed: of all that is drawn.
        data_dir: a folder with the benchmark's files in place of the hub, or None.
        chat: whether the prompt will be put into the model's chat template, whose tokens count too.
        max_length: tokens that the model takes at most.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int | None
    count: int
    seed: int = 0
    data_dir: Path | None = None
    chat: bool = False
    max_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark task.

    Attributes:
        name: unique, as in the literature.
        group: the benchmark that it belongs to.
        version: raised whenever prompts or scores change: records of different versions are not compared.
        source: the official definition that it follows, or that it is ours.
        metric: name of the score.
        samples: makes the samples.
        score: the score of a generated text as the answer of a turn, from 0 to 100.
        sized: whether samples are made to a length; False where the data have their own.
        chat: whether the official rule applies the chat template; None leaves it to the user.
    """

    name: str
    group: str
    version: int
    source: str
    metric: str
    samples: Callable[[Preparation], Sequence[Sample]]
    score: Callable[[str, Turn], float]
    sized: bool = True
    chat: bool | None = None


@functools.cache
def catalogue() -> Mapping[str, Task]:
    """Return every task by name: those of each module in `MODULES`."""
    found = [task for name in MODULES for task in importlib.import_module(f".{name}", __package__).TASKS]
    tasks = {task.name: task for task in found}
    if len(tasks) < len(found):
        raise RuntimeError("two tasks have one name")
    return MappingProxyType(tasks)


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks by name or by group, in the order asked for, each once.

    Raises:
        ValueError: there is no such task or group.
    """
    tasks = catalogue()
    groups = sorted({task.group for task in tasks.values()})
    found: dict[str, Task] = {}
    for name in names:
        members = [task for task in tasks.values() if name in (task.name, task.group)]
        if not members:
            near = difflib.get_close_matches(name, [*tasks, *groups], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no task or group {name!r}.{hint} Groups: {', '.join(groups)}")
        found.update((task.name, task) for task in members)
    return list(found.values())
