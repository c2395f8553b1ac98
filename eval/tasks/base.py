"""Benchmark tasks: samples to ask a model, and a score for its answers.

A benchmark is a file with a tuple `TASKS` of `Task`, listed in `MODULES`; `find_tasks` finds tasks by name and group.
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

from ...hf.prompts import PLAIN, ChatOptions

TOY = "_toy"  # after the name of a task whose essays generated prose stands for
MODULES = ("instructions", "longbench", "longbench_v2", "longproc", "mathematics", "needle", "ruler.tasks", "scbench")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question about a context, and its answers.

    Attributes:
        question: follows the context in the user's message.
        answers: right answers; the scorer decides whether one or all are needed.
        max_new_tokens: largest number of tokens to generate.
        answer_prefix: start of the answer, put before the tokens that the model generates.
        extra: further input of the scorer, of JSON's types.
    """

    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context and the questions about it: one, or several turns of a conversation.

    Attributes:
        id: unique within its task and length.
        context: the user's message up to the question; query-agnostic evaluation compresses it before the question.
        turns: the questions, at least one.
        notes: facts for the record (depth of a needle, tokens cut, ...), of JSON's types.
    """

    id: str
    context: str
    turns: tuple[Turn, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Settings that samples are made with.

    Attributes:
        tokenizer: the model's.
        length: tokens of prompt and answer together, or None for the data's own length, cut at the model's.
        count: number of samples; the first of a larger number are the same.
        seed: of every random choice.
        data_dir: a folder with the benchmark's files in place of the hub, or None.
        chat: whether the prompt will be put into the model's chat template, whose tokens count too.
        chat_options: for the chat template.
        max_length: largest number of tokens of the model.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int | None
    count: int
    seed: int = 0
    data_dir: Path | None = None
    chat: bool = False
    chat_options: ChatOptions = PLAIN
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
        score: scores a generated text as the answer of a turn, from 0 to 100.
        sized: whether samples are made to a length; False where the data have their own.
        chat: whether the official rule applies the chat template; None leaves it to the user.
        require: called before any answer is generated; raises ImportError where the score needs a missing package.
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
    require: Callable[[], object] | None = None


def generated(sample: Callable[[Preparation, int], Sample]) -> Callable[[Preparation], Sequence[Sample]]:
    """Return the `samples` of a task whose samples are generated one by one, from their numbers."""
    return lambda prepared: [sample(prepared, index) for index in range(prepared.count)]


@functools.cache
def catalogue() -> Mapping[str, Task]:
    """Return every task of `MODULES` by name."""
    modules = (importlib.import_module(f".{name}", __package__) for name in MODULES)
    return MappingProxyType({task.name: task for module in modules for task in module.TASKS})


def with_toy_haystacks(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with those in their place whose haystack is generated prose, where there are such."""
    known = catalogue()
    return list({(found := known.get(f"{task.name}{TOY}", task)).name: found for task in tasks}.values())


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks by name or by group, in the order asked for, each once.

    Raises:
        ValueError: a name is of no task or group.
    """
    tasks = catalogue()
    groups = sorted({task.group for task in tasks.values()})
    result: dict[str, Task] = {}
    for name in names:
        members = {task.name: task for task in tasks.values() if name in (task.name, task.group)}
        if not members:
            near = difflib.get_close_matches(name, [*tasks, *groups], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no task or group {name!r}.{hint} Groups: {', '.join(groups)}")
        result |= members
    return list(result.values())
