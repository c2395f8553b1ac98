"""The model for lm-eval's own tasks: `RocketKVLM`, registered as `rocketkv`.

Generation runs the compressed model's `generate`, in batches, with lm-eval's stop strings. Log-likelihoods come from
teacher-forced decoding: the context is the prompt, and a decode step reads each token of the continuation, since a
single forward over both would never read a compressed cache.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from unittest import mock

import lm_eval
import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from tqdm import tqdm

from ..budget import DEFAULT_METHOD
from ..config import RocketKVConfig
from ..hf.cache import cache_stats
from ..hf.loading import SMOLLM2, load_smollm2
from ..hf.models import CACHE_ARGUMENT
from .measures.kl import decode_logprobs
from .measures.memory import cache_cost
from .methods import FULL, Compressed, Full, Method, find_method
from .records import CostDict, SampleDict, digest


@register_model("rocketkv")
class RocketKVLM(huggingface.HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """A Hugging Face model that runs one of the methods.

    Args:
        pretrained: a hub name, a local folder or a model; `smollm2` for SmolLM2-135M-Instruct.
        method: see `methods.find_method`.
        token_budget: likewise; not for `full`.
        **kwargs: fields of `RocketKVConfig`, and arguments of `HFLM`.

    Raises:
        ValueError: the method is unknown, or a field has an impossible value.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str | Method = DEFAULT_METHOD,
        token_budget: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        names = {field.name for field in fields(RocketKVConfig)} & set(kwargs)
        settings = {name: kwargs.pop(name) for name in names}
        if isinstance(method, str):
            budget = None if token_budget is None else int(token_budget)
            if method != FULL and budget is None:
                budget = RocketKVConfig.token_budget
            method = find_method(method, budget, settings)
        if pretrained == SMOLLM2:
            pretrained, kwargs["tokenizer"] = load_smollm2(getattr(torch, str(kwargs.pop("dtype", "float32"))))
        super().__init__(pretrained, **kwargs)
        self.method: Method = method
        self.costs: dict[str, CostDict] = {}
        self._contexts: list[str] = []

    def get_model_info(self) -> dict[str, Any]:
        """Return the fields that lm-eval writes into its results, with method, budget and costs of generations."""
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "method": self.method.name,
            "token_budget": self.method.token_budget,
            "costs": list(self.costs.values()),
        }

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generate after a batch of prompts by the method and record the cache's size."""
        with self.method.attached(self.model):
            # The cache of a single row is made here, so that it can be measured; `generate` makes that of a batch.
            rows = context.shape[0] * kwargs.get("num_return_sequences", 1) * kwargs.get("num_beams", 1)
            if rows > 1 and not isinstance(self.method, (Full, Compressed)):
                raise ValueError(
                    f"method {self.method.name!r} makes a cache for one sequence, got {rows}; set batch_size to 1"
                )
            cache = self.method.new_cache(self.model, context.shape[1]) if rows == 1 else None
            if cache is not None:
                kwargs[CACHE_ARGUMENT] = cache
            output: torch.Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        cost: CostDict = {"prompt_tokens": context.shape[1], "new_tokens": output.shape[1] - context.shape[1]}
        if cache is not None:
            cost |= cache_cost(cache_stats(cache))
        self.costs |= dict.fromkeys(self._contexts, cost)
        return output

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode as `HFLM` does, and remember the prompts, whose costs come next."""
        self._contexts = list(strings)
        encoded: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return encoded

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations by teacher-forced decoding over the method's cache."""
        warnings.warn(
            "log-likelihoods are computed by teacher-forced decoding, a step a token: slower than lm-eval's one "
            "forward, which would not touch the compressed cache",
            stacklevel=2,
        )
        scored = []
        for names, context, continuation in tqdm(requests, desc=self.method.name, disable=disable_tqdm or None):
            room = max(1, self.max_length + 1 - len(continuation))
            logprobs = decode_logprobs(self.model, self.method, context[-room:], continuation)
            targets = torch.tensor(continuation)
            total = float(logprobs.gather(1, targets[:, None]).sum())
            greedy = bool((logprobs.argmax(1) == targets).all())
            scored.append((total, greedy))
            if names is not None:  # windows of a rolling log-likelihood are cached by their whole text
                self.cache_hook.add_partial("loglikelihood", names, scored[-1])
        return scored


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide lm-eval's progress bars inside the block where the output is piped; its logs and warnings are shown."""
    with mock.patch.object(lm_eval.api.task, "tqdm", _bar), mock.patch.object(huggingface, "tqdm", _bar):
        yield


def _bar(*args: Any, **kwargs: Any) -> tqdm:
    return tqdm(*args, **{**kwargs, "disable": None})


def check_stock_task(name: str) -> None:
    """Check that a task of lm-eval can run as a cell; its data are read.

    Raises:
        ValueError: there is no such task, it is a group of several, or it does not generate text.
    """
    from lm_eval.tasks import TaskManager  # imported where it runs: with it comes the library of datasets

    manager = TaskManager()
    if name not in manager.all_subtasks:
        groups = name in manager.all_groups or name in manager.all_tags
        kind = "is a group of lm-eval: name its tasks one by one" if groups else "is no task of lm-eval"
        raise ValueError(f"a stock task must be a single task, but {name!r} {kind}; `lm_eval ls tasks` lists them")
    kind = manager.load([name])["tasks"][name].OUTPUT_TYPE
    if kind != "generate_until":
        raise ValueError(f"{name!r} must generate text and score it with a number; its output type is {kind}")


def evaluate_stock_task(
    lm: RocketKVLM, name: str, *, samples: int, chat: bool, max_new_tokens: int | None
) -> list[SampleDict]:
    """Run a generation task of lm-eval, one sequence at a time, in the order of its documents.

    Args:
        lm: the model.
        name: of the task.
        samples: number of its documents.
        chat: whether to use the chat template.
        max_new_tokens: most tokens of each answer; None for the task's own.

    Raises:
        ValueError: it is not a single generation task with a metric between 0 and 1.
    """
    generation = None if max_new_tokens is None else {"max_gen_toks": max_new_tokens}
    with without_bars():
        results = lm_eval.simple_evaluate(
            lm, tasks=[name], limit=samples, apply_chat_template=chat, gen_kwargs=generation, bootstrap_iters=0
        )
    if list(results["samples"]) != [name]:
        raise ValueError(f"{name!r} must be a single task of lm-eval, got {', '.join(results['samples'])}")
    rows = results["samples"][name]
    kept = rows[0].get("filter", "none")  # lm-eval logs a row a filter; the task's first filter counts
    evaluated: list[SampleDict] = []
    for row in (row for row in rows if row.get("filter", "none") == kept):
        metric = next((key for key in row["metrics"] if isinstance(row[key], (int, float))), None)
        response = row["resps"][0][0]
        if metric is None or not isinstance(response, str):
            raise ValueError(f"{name!r} must generate text and score it with a number; it has {row['metrics']}")
        if not results["higher_is_better"][name].get(metric, True) or not 0 <= float(row[metric]) <= 1:
            raise ValueError(
                f"{name!r} must have a score from 0 to 1 of which more is better, got {metric} {row[metric]}"
            )
        score = 100.0 * float(row[metric])
        prompt = str(row["arguments"][0][0])
        evaluated.append(
            {
                "id": str(row["doc_id"]),
                "prompt_sha256": digest(prompt),
                "score": score,
                "turns": [{"prediction": response, "answers": [str(row["target"])], "score": score}],
                "cost": lm.costs.get(prompt, {}),
                "notes": {"metric": metric, "filter": kept, "task_version": results["versions"].get(name)},
            }
        )
    return evaluated
