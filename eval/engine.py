"""lm-eval as the engine of tasks: ours, given as objects, and its own, by name."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..hf.prompts import render
from .lm import SAMPLE, RocketKVLM
from .records import SampleDict, digest
from .tasks.base import Sample, Task

_LOUD = ("lm_eval", "datasets")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what lm-eval logs below an error, inside the block, to itself, and where output is piped its bars too."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    piped = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with piped:
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def ask_all(
    lm: RocketKVLM, task: Task, samples: Sequence[Sample], answer: Callable[[Sample], Mapping[str, Any]], *, chat: bool
) -> list[SampleDict]:
    """Ask every sample of a task of ours through lm-eval, and score the answers.

    Args:
        lm: the model, with the method bound.
        task: scores the answers.
        samples: what to ask.
        answer: asks one sample; returns `predictions`, a text a turn, and fields of `SampleDict`: `prompt_sha256`,
            `cost` and `trace`.
        chat: whether prompts are in the chat template; for what lm-eval logs.

    Raises:
        RuntimeError: lm-eval's mean of the scores is not ours.
    """
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    by_id = {sample.id: sample for sample in samples}
    answered: dict[str, Mapping[str, Any]] = {}

    def ask_one(name: str) -> Sequence[str]:
        answered[name] = answer(by_id[name])
        predictions: Sequence[str] = answered[name]["predictions"]
        return predictions

    def text(document: Mapping[str, Any]) -> str:
        sample = by_id[document[SAMPLE]]
        turn = sample.turns[0]
        return render(lm.tokenizer, sample.context, turn.question, turn.answer_prefix, chat=chat).text

    def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        turns = by_id[document[SAMPLE]].turns
        return {"score": fmean(map(task.score, json.loads(results[0]), turns))}

    lm.bind(lm.method, ask_one)
    settings = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{SAMPLE: sample.id} for sample in samples])},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": "",
        "process_results": score,
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": task.version},
    }
    with quiet():
        results = lm_eval.evaluate(lm, {"tasks": {task.name: ConfigurableTask(config=settings)}}, bootstrap_iters=0)
    found: list[SampleDict] = []
    for sample in samples:
        made = answered[sample.id]
        pairs = list(zip(made["predictions"], sample.turns, strict=True))
        scores = [float(task.score(prediction, turn)) for prediction, turn in pairs]
        found.append(
            {
                "id": sample.id,
                "prompt_sha256": made["prompt_sha256"],
                "score": fmean(scores),
                "turns": [
                    {"prediction": prediction, "answers": list(turn.answers), "score": value}
                    for (prediction, turn), value in zip(pairs, scores, strict=True)
                ],
                "cost": made["cost"],
                "notes": dict(sample.notes),
                "trace": made["trace"],
            }
        )
    mean, theirs = fmean(sample["score"] for sample in found), results["results"][task.name]["score,none"]
    if abs(mean - theirs) > 1e-6:
        raise RuntimeError(f"the mean score of {task.name} is {mean}, but lm-eval has {theirs}")
    return found


def ask_stock(lm: RocketKVLM, name: str, *, samples: int, chat: bool, max_new_tokens: int | None) -> list[SampleDict]:
    """Run a stock generation task of lm-eval, one sequence at a time, in the order of its documents.

    Args:
        lm: the model, with the method bound.
        name: of the task.
        samples: how many of its documents.
        chat: whether to use the chat template.
        max_new_tokens: instead of the task's own, or None.

    Raises:
        ValueError: it is no generation task, or has no metric between 0 and 1.
    """
    import lm_eval

    generation = None if max_new_tokens is None else {"max_gen_toks": max_new_tokens}
    with quiet():
        results = lm_eval.simple_evaluate(
            lm, tasks=[name], limit=samples, apply_chat_template=chat, gen_kwargs=generation, bootstrap_iters=0
        )
    if list(results["samples"]) != [name]:
        raise ValueError(f"{name!r} must be a single task of lm-eval, got {', '.join(results['samples'])}")
    logged_rows = results["samples"][name]
    kept = logged_rows[0].get("filter", "none")  # lm-eval logs a row a filter; the task's first one counts
    found: list[SampleDict] = []
    for logged in (row for row in logged_rows if row.get("filter", "none") == kept):
        metric = next((key for key in logged["metrics"] if isinstance(logged[key], (int, float))), None)
        response = logged["resps"][0][0]
        if metric is None or not isinstance(response, str):
            raise ValueError(f"{name!r} must generate text and score it with a number; it has {logged['metrics']}")
        if not results["higher_is_better"][name].get(metric, True) or not 0 <= float(logged[metric]) <= 1:
            raise ValueError(
                f"{name!r} must have a score from 0 to 1 of which more is better, got {metric} {logged[metric]}"
            )
        score = 100.0 * float(logged[metric])
        prompt = str(logged["arguments"][0][0])
        cost = lm.costs.get(prompt, {})
        found.append(
            {
                "id": str(logged["doc_id"]),
                "prompt_sha256": digest(prompt),
                "score": score,
                "turns": [{"prediction": response, "answers": [str(logged["target"])], "score": score}],
                "cost": {key: value for key, value in cost.items() if key != "trace"},  # type: ignore[typeddict-item]
                "notes": {"metric": metric, "filter": kept, "task_version": results["versions"].get(name)},
                "trace": cost.get("trace", []),
            }
        )
    return found
