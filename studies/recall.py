"""Needles by budget: each prompt is read once by the stock model, and every method continues from there.

A prefill is dense attention in every method, so an arm's answer is the one after its own prefill. The prompts are this
project's, or those of RULER's needle tasks; an answer's score is the share of its numbers that were given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.eval.conversation import end_tokens
from rocketkv.eval.intervals import mean_interval
from rocketkv.eval.methods import FULL, Method, find_method
from rocketkv.eval.prefill import ReadPrompt, read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.eval.tasks.base import TOY, Preparation, Turn, find_tasks
from rocketkv.eval.tasks.needle import found, needle_grid
from rocketkv.hf.prompts import encode, render

from .settings import StudySettings, journal_of, option

VERSION = 3
NEEDLE = "needle"
# Tokens of an answer: one number of seven digits, or four. RULER allows 128, which models fill with repetitions.
NEW_TOKENS = {NEEDLE: 16, "niah_multikey_1": 24, "niah_multivalue": 64}
ARMS = (FULL, "rocketkv:64", "rocketkv:128", "rocketkv:256", "rocketkv+:64", "rocketkv+:128", "rocketkv+:256")


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    task: str = option(NEEDLE, "of the prompts", choices=tuple(NEW_TOKENS))
    data_dir: str = option("", "with RULER's essays, haystack.txt; without it, generated prose")
    tokens: tuple[int, ...] = option((4096, 8064), "of the prompts; for RULER's tasks, with room for 128 more")
    prompts: int = option(20, "of each length")
    seed: int = option(1, "of the prompts")
    arms: tuple[str, ...] = option(ARMS, "full, or METHOD:BUDGET")


def method_of(arm: str) -> Method:
    """Return the method that an arm names: METHOD:BUDGET, or `full`.

    Raises:
        ValueError: the method is unknown, or the budget is not a number.
    """
    name, _, budget = arm.rpartition(":") if arm != FULL else (arm, "", "")
    if arm != FULL and not (name and budget.isdecimal()):
        raise ValueError(f"arms must be {FULL} or METHOD:BUDGET, as rocketkv:256; got {arm!r}")
    return find_method(name, int(budget) if budget else None)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt's tokens, and the score of an answer, from 0 to 1."""

    ids: list[int]
    score: Callable[[str], float]


def questions(tokenizer: PreTrainedTokenizerBase, settings: Settings, length: int) -> Iterator[Question]:
    """Yield the prompts of a length.

    Raises:
        ValueError: the length is too short.
        FileNotFoundError: the folder has no essays.
    """
    if settings.task == NEEDLE:
        for prompt in needle_grid(tokenizer, tokens=length, count=settings.prompts, seed=settings.seed):
            yield Question(ids=list(tokenizer(prompt.text)["input_ids"]), score=partial(found, prompt.answer))
        return
    folder = Path(settings.data_dir) if settings.data_dir else None
    task = find_tasks([settings.task if folder else settings.task + TOY])[0]
    prepared = Preparation(
        tokenizer=tokenizer, length=length, count=settings.prompts, seed=settings.seed, data_dir=folder
    )

    def score(turn: Turn, text: str) -> float:
        return task.score(text, turn) / 100

    for sample in task.samples(prepared):
        (turn,) = sample.turns
        ids, _ = encode(tokenizer, render(tokenizer, sample.context, turn.question, turn.answer_prefix))
        yield Question(ids=ids, score=partial(score, turn))


def answer(
    model: PreTrainedModel, method: Method, prompt: ReadPrompt, new_tokens: int, ends: Collection[int] = ()
) -> list[int]:
    """Return the greedy tokens after a prompt by one method, up to one of `ends`."""
    with method.attached(model):
        return list(start(model, method, prompt).greedy(new_tokens, ends))


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Return the scores of each length and arm; the journal keeps the answers."""
    journal, methods = journal_of(folder), {arm: method_of(arm) for arm in settings.arms}
    scores: dict[str, dict[str, list[float]]] = {
        str(length): {arm: [] for arm in methods} for length in settings.tokens
    }
    total = len(settings.tokens) * settings.prompts * len(methods)
    new_tokens = NEW_TOKENS[settings.task]
    ends = () if settings.task == NEEDLE else end_tokens(model, tokenizer)
    with Progress("composing prompts", total=total) as progress:
        for length in settings.tokens:
            for question in questions(tokenizer, settings, length):
                shared: ReadPrompt | None = None
                for arm, method in methods.items():
                    progress.say(f"{length} tokens: {arm}")
                    key = digest([VERSION, __version__, *settings.weights, arm, new_tokens, question.ids])
                    if journal.get(key) is None:
                        shared = read_prompt(model, [question.ids]) if shared is None else shared
                        given = answer(model, method, shared, new_tokens, ends)
                        journal.put(key, str(tokenizer.decode(given)))
                    scores[str(length)][arm].append(float(question.score(journal.get(key))))
                    progress.step()
    return {"version": VERSION, "scores": scores}


def markdown(result: dict[str, Any]) -> str:
    """Return a table: a row an arm, with the mean score of each length, in percent, and its 95 % interval."""
    scores = result["scores"]
    arms = list(next(iter(scores.values())))
    lines = ["| | " + " | ".join(f"{length} tokens" for length in scores) + " |", "|--" * (len(scores) + 1) + "|"]
    for arm in arms:
        cells = []
        for by_arm in scores.values():
            percent = [100 * score for score in by_arm[arm]]
            low, high = mean_interval(percent) or (0.0, 100.0)
            cells.append(f"{fmean(percent):.1f} of {len(percent)} ({low:.0f}-{high:.0f})")
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
