"""The benchmark of whole decode steps of a model on a CPU (see `cli`)."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from ...config import RocketKVConfig
from ...hf.cache import cache_stats
from ...hf.loading import gguf_file, load_model
from ...hf.patch import patch
from ..generate import DecodeLoop
from ..measures.latency import check_within_budget
from ..methods import Compressed, Full, Method
from ..prefill import Prefills, after_prompt
from ..progress import Progress
from ..tasks.needle import found, needle_grid
from .cli import ROUNDS, STEPS
from .cpu import result_of, table
from .gpu_timing import alternate
from .openvino_arms import OpenVinoArm, installed

SHORT = 16  # tokens of the prompt of the arm whose attention costs nothing
SEED = 1  # of the needles
ANSWER_TOKENS = 16
INT8 = "rocketkv, int8, compiled"


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print it; returns the exit code."""
    torch.set_num_threads(args.threads)
    sizes = {"context": args.context, "token_budget": args.budget, "rounds": args.rounds, "steps": args.steps}
    result = bench_decode(args.model, **sizes, dtype=args.dtype, int8=args.int8, prompts=args.prompts)
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
    int8: bool = False,
    prompts: int = 1,
) -> dict[str, Any]:
    """Time whole decode steps of a model after a prompt with a needle, and count the needles that each arm finds.

    The arms are the compressed methods, the stock model, whose cache copies itself each step, dense attention over a
    preallocated cache, and the stock model after 16 tokens, which no method can pass by much. For SmolLM2, where
    OpenVINO GenAI is installed, its dense and its evicting pipeline read and answer the same prompts.

    Args:
        model_name: a hub name or folder, or None for SmolLM2-135M-Instruct.
        context: prompt tokens, at most; None for 8192 less the decoded tokens.
        token_budget: t.
        rounds: alternating rounds.
        steps: decode steps a round; a round's time is their mean.
        dtype: dtype of the weights.
        int8: add `rocketkv` over weights of 8 bits, its steps under `torch.compile`.
        prompts: with a needle each; every arm answers all of them, and the times are those after the first.

    Raises:
        WrongResultError: within its budget a method does not give the stock model's logits, in float32; nothing is
            timed then.
        ImportError: weights of 8 bits are asked for, and torchao is not installed.
    """
    room = (rounds + 1) * steps + ANSWER_TOKENS
    length = 8192 - room if context is None else context
    model, tokenizer = load_model(model_name, dtype)
    settings = RocketKVConfig(method="rocketkv", token_budget=token_budget)
    methods: dict[str, Method] = {
        "rocketkv": Compressed(settings),
        "rocketkv+": Compressed(RocketKVConfig(method="rocketkv+", token_budget=token_budget)),
        "stock": Full(),
        "dense preallocated": Compressed(RocketKVConfig(method="full")),
        f"stock, {SHORT} tokens": Full(),
    }
    short = list(methods)[-1]
    models, precisions = dict.fromkeys(methods, model), dict.fromkeys(methods, dtype)
    if int8:
        models[INT8], precisions[INT8] = _int8_model(model_name, dtype), f"weights int8, activations {dtype}"
        methods[INT8] = _compiled(models[INT8], replace(settings, decode_capacity=room))
    needles = needle_grid(tokenizer, tokens=length, count=prompts, seed=SEED)
    ids: list[list[int]] = [tokenizer(needle.text)["input_ids"] for needle in needles]
    loops: dict[str, DecodeLoop] = {}
    answers: dict[str, list[list[int]]] = {}
    for name, method in methods.items():
        if precisions[name] == "float32":
            check_within_budget(models[name], method, ids[0][:512])
        prompt = ids[0][:SHORT] if name == short else ids[0]
        with method.attached(models[name]):
            loops[name] = DecodeLoop(model=models[name], cache=method.new_cache(models[name], len(prompt)))
            loops[name].prefill([prompt])
            loops[name].forward = getattr(method, "forward", None)
            answers[name] = [list(loops[name].greedy(ANSWER_TOKENS))]

    def step_seconds(name: str) -> float:
        with methods[name].attached(models[name]):
            for _ in range(steps):
                loops[name].step(loops[name].token)
        return fmean(loops[name].seconds[-steps:])

    arms: dict[str, Callable[[], float]] = {name: partial(step_seconds, name) for name in methods}
    rivals: dict[str, OpenVinoArm] = {}
    if model_name is None and installed():
        for name, evicts in (("OpenVINO", False), ("OpenVINO, eviction", True)):
            rivals[name] = OpenVinoArm(gguf_file(), torch.get_num_threads(), evicts=evicts)
            precisions[name] = rivals[name].precision
            arms[name] = partial(rivals[name].step_seconds, ids[0], ANSWER_TOKENS)
    seconds = alternate(arms, rounds)
    shape = {"context": len(ids[0]), "token_budget": token_budget, "dtype": dtype}
    result = result_of("decode", shape, seconds, rounds, steps)
    result["kv_bytes"] = {name: cache_stats(loop.cache).total_bytes for name, loop in loops.items()}
    result["first_token_seconds"] = {name: loop.seconds[0] for name, loop in loops.items()}
    result["first_token_seconds"] |= {name: fmean(rival.first_token_seconds) for name, rival in rivals.items()}
    loops.clear()  # their memory is needed for other prompts
    del answers[short], methods[short]
    answers |= {name: [rival.written] for name, rival in rivals.items()}
    _answer_rest(ids[1:], methods, models, rivals, answers)
    result["needles"] = prompts
    result["needles_found"] = {}
    for name, given in answers.items():
        texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in given]
        pairs = zip(needles, texts, strict=True)
        result["needles_found"][name] = sum(found(needle.answer, text) for needle, text in pairs)
    result["precision"] = precisions
    return result


@dataclass(frozen=True)
class _Compiled(Compressed):
    """A method on a model that stays patched, because attaching it anew would compile its forward anew."""

    forward: Callable[..., Any]

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Leave the model as it is."""
        yield


def _compiled(model: PreTrainedModel, config: RocketKVConfig) -> _Compiled:
    """Patch a model for good, and compile its steps without CUDA graphs, which are of no use on a CPU."""
    return _Compiled(config, patch(model, config).compile_step(mode="default"))


def _answer_rest(
    prompts: list[list[int]],
    methods: dict[str, Method],
    models: dict[str, PreTrainedModel],
    rivals: dict[str, OpenVinoArm],
    answers: dict[str, list[list[int]]],
) -> None:
    """Let every arm answer more prompts, and add its tokens to its answers."""
    prefills = {id(model): Prefills(model) for model in models.values()}
    with Progress("needles", total=len(prompts)) as progress:
        for prompt in prompts:
            for name, method in methods.items():
                # The prefill's own patch of a model that stays patched leaves that one's settings as they were.
                with after_prompt(models[name], method, prompt, prefills[id(models[name])]) as loop:
                    loop.forward = getattr(method, "forward", None)
                    answers[name].append(list(loop.greedy(ANSWER_TOKENS)))
            for name, rival in rivals.items():
                rival.step_seconds(prompt, ANSWER_TOKENS)
                answers[name].append(rival.written)
            progress.step()


def _int8_model(name: str | None, dtype: str) -> PreTrainedModel:
    """Return the model with the weights of its linear layers in 8 bits, a scale a row.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        quantization: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ImportError("weights of 8 bits need torchao, which is not installed: pip install torchao") from error
    model, _ = load_model(name, dtype)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _table(result: dict[str, Any]) -> str:
    lines = [table(result), f"{'':24} {'needles':>8}  precision"]
    for name, precision in result["precision"].items():
        count = result["needles_found"].get(name)
        right = "" if count is None else f"{count} of {result['needles']}"
        lines.append(f"{name:24} {right:>8}  {precision}")
    return "\n".join(lines)
