"""The benchmark of whole decode steps of a model on a CPU (see `cli`)."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import torch

from ...config import RocketKVConfig
from ...hf.cache import cache_stats
from ...hf.loading import gguf_file, load_model
from ..generate import DecodeLoop
from ..measures.latency import check_within_budget
from ..methods import Compressed, Full, Method
from ..tasks.needle import found, needle_prompt
from .cli import ROUNDS, STEPS
from .cpu import result_of, table
from .gpu_timing import alternate
from .openvino_arms import OpenVinoArm, installed

SHORT = 16  # tokens of the prompt of the arm whose attention costs nothing
NEEDLE = {"depth": 0.4, "seed": 1}
ANSWER_TOKENS = 16


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print it; returns the exit code."""
    torch.set_num_threads(args.threads)
    sizes = {"context": args.context, "token_budget": args.budget, "rounds": args.rounds, "steps": args.steps}
    result = bench_decode(args.model, **sizes, dtype=args.dtype)
    sys.stdout.write((json.dumps(result, indent=2) if args.json else _table(result)) + "\n")
    return 0


def bench_decode(
    model_name: str | None,
    *,
    context: int | None,
    token_budget: int,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time whole decode steps of a model after a prompt with a needle, and look whether each arm finds it.

    The arms are the compressed methods, the stock model, whose cache copies itself each step, dense attention over a
    preallocated cache, and the stock model after 16 tokens, which no method can pass by much. For SmolLM2, where
    OpenVINO GenAI is installed, its dense and its evicting pipeline read and answer the same prompt.

    Args:
        model_name: a hub name or folder, or None for SmolLM2-135M-Instruct.
        context: prompt tokens, at most; None for 8192 less the decoded tokens.
        token_budget: t.
        rounds: alternating rounds.
        steps: decode steps a round; a round's time is their mean.
        dtype: dtype of the weights.

    Raises:
        WrongResultError: within its budget a method does not give the stock model's logits; nothing is timed then.
    """
    length = 8192 - (rounds + 1) * steps if context is None else context
    model, tokenizer = load_model(model_name, dtype)
    methods: dict[str, Method] = {
        "rocketkv": Compressed(RocketKVConfig(token_budget=token_budget)),
        "rocketkv+": Compressed(RocketKVConfig(method="rocketkv+", token_budget=token_budget)),
        "stock": Full(),
        "dense preallocated": Compressed(RocketKVConfig(method="full")),
        f"stock, {SHORT} tokens": Full(),
    }
    short = list(methods)[-1]
    needle = needle_prompt(tokenizer, tokens=length, depth=NEEDLE["depth"], seed=int(NEEDLE["seed"]))
    prompt: list[int] = tokenizer(needle.text)["input_ids"]
    loops: dict[str, DecodeLoop] = {}
    answers: dict[str, list[int]] = {}
    for name, method in methods.items():
        if dtype == "float32":
            check_within_budget(model, method, prompt[:512])
        ids = prompt[:SHORT] if name == short else prompt
        loops[name] = DecodeLoop(model=model, cache=method.new_cache(model, len(ids)))
        with method.attached(model):
            loops[name].prefill([ids])
            answers[name] = list(loops[name].greedy(min(ANSWER_TOKENS, steps + 1)))

    def step_seconds(name: str) -> float:
        with methods[name].attached(model):
            for _ in range(steps):
                loops[name].step(loops[name].token)
        return fmean(loops[name].seconds[-steps:])

    arms: dict[str, Callable[[], float]] = {name: partial(step_seconds, name) for name in methods}
    precisions = dict.fromkeys(methods, dtype)
    rivals: dict[str, OpenVinoArm] = {}
    if model_name is None and installed():
        for name, evicts in (("OpenVINO", False), ("OpenVINO, eviction", True)):
            rivals[name] = OpenVinoArm(gguf_file(), torch.get_num_threads(), evicts=evicts)
            precisions[name] = rivals[name].precision
            arms[name] = partial(rivals[name].step_seconds, prompt, ANSWER_TOKENS)
    seconds = alternate(arms, rounds)
    settings = {"context": len(prompt), "token_budget": token_budget, "dtype": dtype}
    result = result_of("decode", settings, seconds, rounds, steps)
    result["kv_bytes"] = {name: cache_stats(loop.cache).total_bytes for name, loop in loops.items()}
    answers |= {name: rival.written for name, rival in rivals.items()}
    texts = {name: str(tokenizer.decode(ids, skip_special_tokens=True)) for name, ids in answers.items()}
    result["needle_found"] = {name: found(needle.answer, text) for name, text in texts.items() if name != short}
    result["precision"] = precisions
    result["first_token_seconds"] = {name: loop.seconds[0] for name, loop in loops.items()}
    result["first_token_seconds"] |= {name: fmean(rival.first_token_seconds) for name, rival in rivals.items()}
    return result


def _table(result: dict[str, Any]) -> str:
    lines = [table(result), f"{'':20} {'needle':>7}  precision"]
    for name, precision in result["precision"].items():
        right = {True: "found", False: "missed", None: ""}[result["needle_found"].get(name)]
        lines.append(f"{name:20} {right:>7}  {precision}")
    return "\n".join(lines)
