"""The measured parts: needles, divergence, bytes, memory and time by prompt length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from rocketkv.config import RocketKVConfig
from rocketkv.eval.intervals import mean_interval
from rocketkv.eval.measures.apart import measure_apart
from rocketkv.eval.measures.arms import find_arm
from rocketkv.eval.measures.latency import LatencyResult, measure_latency
from rocketkv.eval.methods import FULL, Compressed
from rocketkv.eval.prefill import read_prompt, start
from rocketkv.eval.tasks.needle import needle_prompt
from rocketkv.hf.cache import cache_stats
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.plan import load_config

from .studies import Study

SEED = 1
# Prompts of 4096 and of 8064 tokens, which with the answer fit SmolLM2's context. RULER counts the answer's room.
SHORT, LONG = 4096, 8064
TASKS = {"needle": {SHORT: SHORT, LONG: LONG}, "niah_multikey_1": {SHORT: SHORT, LONG: 8192}}
ARMS = {
    "needle": (FULL, "rocketkv+:128", "rocketkv+:256", "rocketkv:256", "rocketkv:512", "snapkv:256", "streaming:512"),
    "niah_multikey_1": (FULL, "rocketkv+:128", "rocketkv+:256", "rocketkv:128", "rocketkv:256", "rocketkv:512"),
}
METHODS, BUDGETS = ("rocketkv+", "rocketkv", "snapkv"), (64, 128, 256, 512)
TEXTS = ("prose", "manual", "code", "dialogue", "lists", "facts")
PRESS = "kvpress:ExpectedAttentionPress"  # keeps as many tokens of a prompt as the budget has, and reads them all
MEMORY_LENGTHS, MEMORY_ARMS = (1024, 2048, 4096, 8064), (FULL, "rocketkv+:256")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of a measurement.

    Attributes:
        model: a hub name, a folder or `smollm2`.
        dtype: of the weights for needles, memory and time; divergence is measured in float32 on a CPU.
        device: of the weights.
        threads: of PyTorch in what is timed; on a CPU also the number of studies at a time, which get one thread each.
        prompts: of each length of a needle task, by the first length of `TASKS`.
    """

    model: str
    dtype: str
    device: str
    threads: int
    prompts: dict[int, int]

    def options(self, dtype: str) -> list[str]:
        """Return the options of a study."""
        named = {"model": self.model, "dtype": dtype, "device": self.device, "seed": SEED, "threads": 1}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def config_of(arm: str) -> RocketKVConfig:
    """Return the settings of an arm, METHOD:BUDGET."""
    method, _, budget = arm.rpartition(":")
    return RocketKVConfig(method=method, token_budget=int(budget))


def needle_study(folder: Path, setting: Setting, task: str, near: int) -> Study:
    """Return the study in which every arm answers the same prompts of a needle task at one length of `TASKS`."""
    tokens, prompts = TASKS[task][near], setting.prompts[near]
    asked = ["--task", task, "--tokens", str(tokens), "--prompts", str(prompts), "--arms", *ARMS[task]]
    return Study(
        name="recall",
        folder=folder / f"{task}-{tokens}",
        options=(*setting.options(setting.dtype), *asked),
        results=prompts * len(ARMS[task]),
    )


def needles(setting: Setting, task: str, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return scores in percent with their 95 % intervals from the results of a task's studies by length."""
    lengths = {}
    for near, result in results.items():
        scores = result["scores"][str(TASKS[task][near])]
        percents = {arm: [100 * score for score in given] for arm, given in scores.items()}
        lengths[str(near)] = {
            "prompts": setting.prompts[near],
            "score": {arm: fmean(percent) for arm, percent in percents.items()},
            "interval": {arm: mean_interval(percent) for arm, percent in percents.items()},
            "answers": percents,
        }
    return {"seed": SEED, "dtype": setting.dtype, "lengths": lengths}


def divergence_study(
    folder: Path, setting: Setting, methods: tuple[str, ...], budgets: tuple[int, ...], python: str | None = None
) -> Study:
    """Return the study of methods and budgets over six kinds of text, after prompts of 4096 tokens.

    Args:
        folder: of this study.
        setting: of the measurement.
        methods: methods of the library, or a press.
        budgets: of each method.
        python: the interpreter, where it is not this one.
    """
    asked = ["--prompt", str(SHORT), "--budgets", *map(str, budgets), "--arms", *methods, "--kinds", *TEXTS]
    return Study(
        name="divergence",
        folder=folder,
        options=(*setting.options("auto"), *asked),
        results=len(TEXTS) * len(budgets) * len(methods),
        python=python,
    )


def divergence(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean KL of every method and budget, over texts and by text, from the results of the studies.

    Raises:
        ValueError: the studies read different tokens, as with another tokenizer.
    """
    if any(result["texts"] != results[0]["texts"] for result in results):
        raise ValueError("the studies of divergence must read the same tokens; those of --kvpress-python differ")
    found: dict[str, dict[str, float]] = {}
    for result in results:
        for cell in result["cells"]:
            found.setdefault(f"{cell['arm']}:{cell['budget']}", {})[cell["text"]] = fmean(cell["kl"])
    return {
        "prompt": SHORT,
        "steps": results[0]["settings"]["steps"],
        "mean": {arm: fmean(by_text.values()) for arm, by_text in found.items()},
        "by_text": found,
    }


def decoder_config(model: str) -> Any:
    """Return the configuration of a model's decoder."""
    return load_model(model)[0].config if model == SMOLLM2 else load_config(model).get_text_config()


def head_dim_of(config: Any) -> int:
    """Return the head dim of the keys from the configuration of a decoder."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def measure_bytes(setting: Setting, tokens: int) -> dict[str, Any]:
    """Count the bytes of keys, values and index after a prompt, and those that a step reads, against a full cache."""
    model, tokenizer = load_model(setting.model, setting.dtype, setting.device)
    prompt = needle_prompt(tokenizer, tokens=tokens, depth=0.5, seed=SEED)
    shared = read_prompt(model, [list(tokenizer(prompt.text)["input_ids"])])
    arms = {f"{method}:{budget}" for method in METHODS for budget in BUDGETS} | {"streaming:512"}
    found = {}
    for arm in sorted(arms):
        method = Compressed(config_of(arm))
        with method.attached(model):
            loop = start(model, method, shared)
            list(loop.greedy(2))
        stats = cache_stats(loop.cache)
        stored = sum(stats.total(name) for name in ("key_bytes", "value_bytes", "index_bytes"))
        found[arm] = {
            "stored": stored / stats.total("full_bytes"),
            "read": stats.total("step_bytes") / stats.total("dense_step_bytes"),
        }
    return {"tokens": prompt.tokens, "arms": found}


def measure_memory(setting: Setting, arm: str, tokens: int) -> dict[str, Any]:
    """Measure the peaks of memory beside the weights, and the times, of a prompt and 32 generated tokens.

    On a CPU each measurement has a process of its own, and bytes are resident ones.
    """
    method, _, budget = arm.rpartition(":") if arm != FULL else (FULL, "", "")
    numbers: dict[str, Any] = {"prompt_tokens": tokens, "new_tokens": 32, "warmup": 1, "repeats": 1}
    token_budget = int(budget) if budget else None
    result: LatencyResult
    if setting.device == "cpu":
        named = {"model": setting.model, "dtype": setting.dtype, "method": method, "token_budget": token_budget}
        result = measure_apart(**named, settings={}, threads=setting.threads, **numbers)
    else:
        model, _ = load_model(setting.model, setting.dtype, setting.device)
        found = find_arm(method, token_budget, {}, new_tokens=numbers["new_tokens"])
        result = measure_latency(model, found, **numbers)
    return {
        **result.values(),
        "first_token_seconds": median(result.first_token_seconds),
        "step_seconds": median(result.step_seconds),
    }


def described(setting: Setting) -> dict[str, Any]:
    """Return the settings for JSON, with machine and versions."""
    import transformers

    from rocketkv._version import __version__
    from rocketkv.environment import machine

    torch.set_num_threads(setting.threads)
    host = {**machine(), "transformers": transformers.__version__, "rocketkv": __version__}
    if setting.device != "cpu":
        host["gpu"] = torch.cuda.get_device_name(setting.device)
    return {"setting": {**asdict(setting), "model": Path(setting.model).name}, "machine": host}
