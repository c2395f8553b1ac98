"""Needles by budget: each prompt is read once by the stock model, and every method continues from there.

A prefill is dense attention in every method, so an arm's answer is the one after its own prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.eval.intervals import wilson
from rocketkv.eval.methods import FULL, Method, find_method
from rocketkv.eval.prefill import ReadPrompt, read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.eval.tasks.needle import found, needle_grid

from .settings import StudySettings, journal_of, option

VERSION = 2
NEW_TOKENS = 16
ARMS = (FULL, "rocketkv:64", "rocketkv:128", "rocketkv:256", "rocketkv+:64", "rocketkv+:128", "rocketkv+:256")


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    tokens: tuple[int, ...] = option((4096, 8064), "of the prompts")
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


def answer(model: PreTrainedModel, method: Method, prompt: ReadPrompt, new_tokens: int) -> list[int]:
    """Return the greedy tokens after a prompt by one method."""
    with method.attached(model):
        return list(start(model, method, prompt).greedy(new_tokens))


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Return the right answers of each length and arm; the journal keeps the answers."""
    journal, methods = journal_of(folder), {arm: method_of(arm) for arm in settings.arms}
    right: dict[str, dict[str, list[bool]]] = {str(length): {arm: [] for arm in methods} for length in settings.tokens}
    total = len(settings.tokens) * settings.prompts * len(methods)
    with Progress("composing prompts", total=total) as progress:
        for length in settings.tokens:
            for prompt in needle_grid(tokenizer, tokens=length, count=settings.prompts, seed=settings.seed):
                ids = list(tokenizer(prompt.text)["input_ids"])
                shared: ReadPrompt | None = None
                for arm, method in methods.items():
                    progress.say(f"{length} tokens: {arm}")
                    key = digest([VERSION, __version__, settings.model, arm, ids])
                    if journal.get(key) is None:
                        shared = read_prompt(model, [ids]) if shared is None else shared
                        journal.put(key, str(tokenizer.decode(answer(model, method, shared, NEW_TOKENS))))
                    right[str(length)][arm].append(found(prompt.answer, journal.get(key)))
                    progress.step()
    return {"version": VERSION, "right": right}


def markdown(result: dict[str, Any]) -> str:
    """Return a table: a row an arm, with the right answers of each length and a 95 % interval of their share."""
    right = result["right"]
    arms = list(next(iter(right.values())))
    lines = ["| | " + " | ".join(f"{length} tokens" for length in right) + " |", "|--" * (len(right) + 1) + "|"]
    for arm in arms:
        cells = []
        for answers in right.values():
            hits, asked = sum(answers[arm]), len(answers[arm])
            low, high = wilson(hits, asked)
            cells.append(f"{hits}/{asked} ({low:.2f}-{high:.2f})")
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
