"""Many questions on one context: a snapshot of the compressed cache against a new cache for every question.

`python -m studies questions -o results/questions` reads a context once, and goes back to it by
`RocketKVCache.rollback` after each question; beside it stand the same two forwards (context, question) on a new cache
for each. Both must give the same tokens. What is timed is everything: forwards, new tokens, snapshot, ways back.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.config import RocketKVConfig
from rocketkv.environment import machine
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import write_atomically
from rocketkv.eval.tasks.text import prose
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.patch import patch

_ASKED = ("harbour", "mill", "orchard", "market", "chapel", "bridge", "school", "quarry", "inn", "forge")


@dataclass(frozen=True)
class Settings:
    """What is measured: lengths in tokens."""

    model: str = SMOLLM2
    context: int = 4096
    questions: int = 20
    new_tokens: int = 8
    budget: int = 512
    seed: int = 0


def context_of(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Tensor:
    """Return [1, tokens] ids of generated prose."""
    sentences = tokens // 4
    while len(ids := tokenizer(prose(seed, sentences), verbose=False)["input_ids"]) < tokens:
        sentences *= 2
    return torch.tensor([ids[:tokens]])


def questions_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Tensor]:
    """Return [1, n] ids of different questions, of different lengths."""
    texts = (
        f"\nQuestion {number + 1}: what is said of the {_ASKED[number % len(_ASKED)]}"
        f"{', and of those who work there' if number % 3 else ''}? Answer:"
        for number in range(count)
    )
    return [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]


def read(model: PreTrainedModel, config: RocketKVConfig, context: Tensor) -> RocketKVCache:
    """Return a cache that has read the context."""
    cache = RocketKVCache(model.config, config, prompt_length=context.shape[1])
    model(context, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    return cache


def answer(model: PreTrainedModel, cache: RocketKVCache, question: Tensor, new_tokens: int) -> list[int]:
    """Return the greedy tokens after a question."""
    found: list[int] = []
    given = question
    for _ in range(new_tokens):
        logits = model(given, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits
        given = logits[:, -1:].argmax(-1)
        found.append(int(given))
    return found


@torch.inference_mode()
def study(settings: Settings) -> dict[str, Any]:
    """Answer every question in both ways.

    Raises:
        ValueError: the ways differ in a token.
    """
    model, tokenizer = load_model(settings.model)
    context = context_of(tokenizer, settings.context, settings.seed)
    questions = questions_of(tokenizer, settings.questions)
    config = RocketKVConfig(token_budget=settings.budget)
    load_before = os.getloadavg()[0]
    with patch(model, config), Progress("reading the context", total=2 * len(questions)) as progress:
        start, start_cpu = time.perf_counter(), time.process_time()
        cache = read(model, config, context)
        snapshot = cache.snapshot()
        found = []
        for question in questions:
            progress.say("questions on one context")
            found.append(answer(model, cache, question, settings.new_tokens))
            cache.rollback(snapshot)
            progress.step()
        once, once_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        start, start_cpu = time.perf_counter(), time.process_time()
        for question, expected in zip(questions, found, strict=True):
            progress.say("a new cache for every question")
            new = answer(model, read(model, config, context), question, settings.new_tokens)
            if new != expected:
                raise ValueError(f"rolled back, the cache answers {expected}, and a new one {new}")
            progress.step()
        anew, anew_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "settings": asdict(settings),
        "machine": {
            **machine(),
            "transformers": transformers.__version__,
            "rocketkv": __version__,
            "load": [load_before, os.getloadavg()[0]],
        },
        "question_tokens": [question.shape[1] for question in questions],
        "answers": found,
        "seconds": {"one context": once, "new caches": anew},
        "processor_seconds": {"one context": once_cpu, "new caches": anew_cpu},
        "ratio": once / anew,
        "processor_ratio": once_cpu / anew_cpu,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    settings, seconds, cpu = result["settings"], result["seconds"], result["processor_seconds"]
    what = (
        f"{settings['questions']} questions on {settings['context']} tokens, {settings['new_tokens']} new tokens each, "
        f"budget {settings['budget']}; all tokens equal."
    )
    lines = [
        what,
        "",
        "| | seconds | processor seconds |",
        "|--|--|--|",
        *(f"| {name} | {seconds[name]:.1f} | {cpu[name]:.1f} |" for name in seconds),
        f"| ratio | {result['ratio']:.3f} | {result['processor_ratio']:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    defaults = Settings()
    parser.add_argument("--model", default=defaults.model, help="a hub name, a local folder, or smollm2 (the default)")
    for name, what in (
        ("context", "tokens of the context"),
        ("questions", "how many"),
        ("new-tokens", "of each answer"),
        ("budget", "tokens a decode step"),
        ("seed", "of the context"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to put OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = study(Settings(**{name: getattr(args, name) for name in asdict(defaults)}))
    write_atomically(args.output.with_name(f"{args.output.name}.json"), json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    write_atomically(args.output.with_name(f"{args.output.name}.md"), table)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
