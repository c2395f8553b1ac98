"""Long outputs in bounded memory: what bounded decoding costs in accuracy, and whether its steps stay as quick.

`python -m studies long_output -o results/long-output` has a model write texts (sampled, fixed seed) with a cache
that grows, while caches of several decode capacities read the same tokens side by side (teacher forcing). Each is
compared with the one that grows at every step after its capacity was reached: before, both are the same. `evict` ranks
the generated tokens by stage 1, `evict-random` evicts by chance: the control. Two methods: one that reads all that is
stored, so that nothing but the eviction differs, and RocketKV, whose second stage chooses from what is stored.

Besides it times every step of one long generation: with a bound, steps must not grow slower.
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
from statistics import fmean, median
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
from rocketkv.eval.tasks.text import haystack
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.patch import patch

METHODS = ("snapkv", "rocketkv")
KINDS = ("evict", "evict-random")
PARTS = ("speed", "divergence")
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Settings:
    """What is measured: lengths and capacities in tokens."""

    model: str = SMOLLM2
    prompt: int = 512
    new_tokens: int = 1536
    texts: int = 2
    capacities: tuple[int, ...] = (256, 512, 1024)
    budget: int = 512
    seed: int = 0
    speed_tokens: int = 4000
    speed_capacity: int = 512


def prompts_of(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Tensor:
    """Return [texts, prompt] ids, pieces of one text that follow each other."""
    count = settings.texts * settings.prompt
    text = " ".join(haystack(None, settings.seed).take(count // 4))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:count]).view(settings.texts, settings.prompt)


def forward(model: PreTrainedModel, cache: RocketKVCache, ids: Tensor) -> Tensor:
    """Return the log-probabilities [B, vocabulary], float32, of what follows."""
    logits = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
    logprobs: Tensor = logits.float().log_softmax(-1)
    return logprobs


def sampled(logprobs: Tensor, end: int | None, generator: torch.Generator) -> Tensor:
    """Return [B, 1] ids drawn at a temperature, never the end token."""
    logits = logprobs / TEMPERATURE
    if end is not None:
        logits[:, end] = -torch.inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, prompts: Tensor, end: int | None, method: str, settings: Settings
) -> list[dict[str, Any]]:
    """Compare caches of every capacity with one that grows, on the tokens that a model writes with the latter.

    Args:
        model: a model that is not patched.
        prompts: [texts, n] ids.
        end: the end token, which is not written.
        method: of all caches.
        settings: lengths, capacities and budget.

    Returns:
        A row a capacity and kind: the mean KL to the unbounded run over the steps after the capacity was reached, in
        nats a token, in all and of each text, and the share of those steps with the same most likely token.
    """
    fields: dict[str, Any] = {"method": method, "token_budget": settings.budget}
    arms = [(capacity, kind) for capacity in settings.capacities for kind in KINDS]
    unbounded = RocketKVConfig(**fields)
    configs = [RocketKVConfig(**fields, decode_capacity=capacity) for capacity, _ in arms]
    generator = torch.Generator().manual_seed(settings.seed)
    kl = torch.zeros(len(arms), settings.new_tokens, len(prompts), dtype=torch.float64)
    alike = torch.zeros_like(kl)
    with patch(model, unbounded), Progress(f"{method}: prompts", total=settings.new_tokens) as progress:
        caches = [RocketKVCache(model.config, each, prompt_length=prompts.shape[1]) for each in (unbounded, *configs)]
        reference, *_ = [forward(model, cache, prompts) for cache in caches]
        for (_, kind), cache in zip(arms, caches[1:], strict=True):
            for layer in rocketkv_layers(cache) if kind == "evict-random" else ():
                layer.bounded = {**(layer.bounded or {}), "at_random": True}  # the library has no such setting
        for step in range(settings.new_tokens):
            progress.say(f"{method}: {len(caches)} caches side by side")
            given = sampled(reference, end, generator)
            reference, *found = (forward(model, cache, given) for cache in caches)
            share = reference.exp()
            for i, other in enumerate(found):
                kl[i, step] = (share * (reference - other)).double().sum(-1)
                alike[i, step] = (reference.argmax(-1) == other.argmax(-1)).double()
            progress.step()
    return [
        {
            "method": method,
            "capacity": capacity,
            "when_full": kind,
            "steps": settings.new_tokens - capacity,
            "kl": float(kl[i, capacity:].mean()),
            "kl_by_text": kl[i, capacity:].mean(0).tolist(),
            "kl_before": float(kl[i, :capacity].max()),
            "agreement": float(alike[i, capacity:].mean()),
        }
        for i, (capacity, kind) in enumerate(arms)
    ]


@torch.inference_mode()
def speed(model: PreTrainedModel, prompts: Tensor, settings: Settings) -> dict[str, Any]:
    """Time every step of a greedy generation with a bound, by the clock and by the processor's time."""
    config = RocketKVConfig(token_budget=settings.budget, decode_capacity=settings.speed_capacity)
    wall, cpu, sizes = [], [], set()
    with patch(model, config), Progress("steps", total=settings.speed_tokens) as progress:
        cache = RocketKVCache(model.config, config, prompt_length=prompts.shape[1])
        given = forward(model, cache, prompts[:1]).argmax(-1, keepdim=True)
        for step in range(settings.speed_tokens):
            progress.say("one step after the other")
            start, start_cpu = time.perf_counter(), time.process_time()
            given = forward(model, cache, given).argmax(-1, keepdim=True)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
            if step % 100 == 99:
                sizes.add(cache.stats().total_bytes)
            progress.step()
    early, late = slice(1000, 1500), slice(-500, None)

    def milliseconds(times: list[float]) -> dict[str, float]:
        return {
            "tokens 1000-1500": 1e3 * median(times[early]),
            "last 500 tokens": 1e3 * median(times[late]),
            "ratio": median(times[late]) / median(times[early]),
            "slowest": 1e3 * max(times),
            "mean": 1e3 * fmean(times),
        }

    return {
        "tokens": settings.speed_tokens,
        "capacity": settings.speed_capacity,
        "clock": milliseconds(wall),
        "processor": milliseconds(cpu),
        "cache_bytes": sorted(sizes),
        "tokens_stored": cache.stats().layers[0].tokens_stored,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as tables."""
    settings, lines = result["settings"], []
    if "divergence" in result:
        what = (
            f"{settings['texts']} texts of {settings['new_tokens']} tokens that the model wrote, after prompts of "
            f"{settings['prompt']}; budget {settings['budget']}; KL in nats a token to the run without a bound, over "
            "the steps after the capacity was reached."
        )
        lines += [
            what,
            "",
            "| method | capacity | KL, evict | KL, evict-random | same first choice, evict | evict-random |",
            "|--|--|--|--|--|--|",
        ]
        found = {(row["method"], row["capacity"], row["when_full"]): row for row in result["divergence"]}
        for method, capacity in dict.fromkeys(key[:2] for key in found):
            ranked, by_chance = (found[method, capacity, kind] for kind in KINDS)
            lines.append(
                f"| `{method}` | {capacity} | {ranked['kl']:.4f} | {by_chance['kl']:.4f} | "
                f"{100 * ranked['agreement']:.1f} % | {100 * by_chance['agreement']:.1f} % |"
            )
        lines.append("")
    if "speed" in result:
        times = result["speed"]
        lines += [
            f"{times['tokens']} tokens, decode capacity {times['capacity']}: median milliseconds a step.",
            "",
            "| | tokens 1,000-1,500 | last 500 | ratio |",
            "|--|--|--|--|",
            *(
                f"| {name} | {times[name]['tokens 1000-1500']:.2f} | {times[name]['last 500 tokens']:.2f} | "
                f"{times[name]['ratio']:.3f} |"
                for name in ("clock", "processor")
            ),
            "",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    defaults = Settings()
    parser.add_argument("--model", default=defaults.model, help="a hub name, a local folder, or smollm2 (the default)")
    for name, what in (
        ("prompt", "tokens of each prompt"),
        ("new-tokens", "tokens of each text"),
        ("texts", "how many, side by side"),
        ("budget", "tokens a decode step"),
        ("seed", "of prompts and texts"),
        ("speed-tokens", "steps to time"),
        ("speed-capacity", "decode capacity while they are timed"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    capacities = " ".join(map(str, defaults.capacities))
    parser.add_argument(
        "--capacities", type=int, nargs="+", default=defaults.capacities, help=f"of decoding (default {capacities})"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"to bound (default {' '.join(METHODS)})")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="what to measure")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to put OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    values = {name: getattr(args, name) for name in asdict(defaults)}
    settings = Settings(**{**values, "capacities": tuple(args.capacities)})
    model, tokenizer = load_model(settings.model)
    prompts, load = prompts_of(tokenizer, settings), [os.getloadavg()[0]]
    result: dict[str, Any] = {"settings": asdict(settings)}

    def write() -> None:
        load.append(os.getloadavg()[0])
        versions = {"transformers": transformers.__version__, "rocketkv": __version__}
        result["machine"] = {**machine(), **versions, "load": load}
        write_atomically(args.output.with_name(f"{args.output.name}.json"), json.dumps(result, indent=1) + "\n")
        write_atomically(args.output.with_name(f"{args.output.name}.md"), markdown(result))

    if "speed" in args.parts:
        result["speed"] = speed(model, prompts, settings)
        write()
    for method in args.methods if "divergence" in args.parts else ():
        rows = divergence(model, prompts, tokenizer.eos_token_id, method, settings)
        result["divergence"] = [*result.get("divergence", ()), *rows]
        write()
    sys.stdout.write(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
