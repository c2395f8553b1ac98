"""Re-eviction of generated tokens: KL to a growing cache, and step times over a long output.

A model writes texts (sampled, fixed seed) with a growing cache, while caches of several decode capacities read the same
tokens (teacher forcing). Each is compared with the growing one at every step after its capacity was reached; before,
both are the same. `evict` ranks generated tokens by stage 1; the control `random` evicts tokens by chance. Two methods:
`snapkv`, which reads all stored tokens, so that only the eviction differs, and `rocketkv`, whose stage 2 selects from
them.

The study also times every step of one long generation: with re-eviction, steps must not become slower.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.config import RocketKVConfig
from rocketkv.core.eviction import TORCH_OPS
from rocketkv.core.params import AttentionParams
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.eval.tasks.text import toy_haystack
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.patch import patch
from rocketkv.state.compress import evict_generated
from rocketkv.state.store import KVStore

from .settings import StudySettings, journal_of, option

METHODS = ("snapkv", "rocketkv")
KINDS = ("evict", "random")
PARTS = ("speed", "divergence")
TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    prompt: int = option(512, "tokens of each prompt")
    new_tokens: int = option(1536, "tokens of each text")
    texts: int = option(2, "number of texts, one batch")
    capacities: tuple[int, ...] = option((256, 512, 1024), "decode capacities, in tokens")
    budget: int = option(512, "tokens a decode step")
    speed_tokens: int = option(4000, "steps to time")
    speed_capacity: int = option(512, "decode capacity of the timed steps")
    methods: tuple[str, ...] = option(METHODS, "whose generated tokens are re-evicted")
    parts: tuple[str, ...] = option(PARTS, "to measure", choices=PARTS)


class _RandomEviction(RocketKVLayer):
    """The control: a layer that ranks generated tokens by chance when its buffer is full."""

    def evict_generated(self, kept: int, params: AttentionParams) -> None:
        ops = TORCH_OPS._replace(window_scores=functools.partial(_random_scores, self.store))
        evict_generated(self.store, kept, params, kernel_size=1, ops=ops)


def _random_scores(store: KVStore, window: Tensor, keys: Tensor, params: AttentionParams, **_: Any) -> Tensor:
    """Stand in for `eviction.window_scores`: float32 scores of the generated tokens, equal over rows and heads."""
    generator = torch.Generator().manual_seed(store.seen)
    scores = torch.rand(store.generated - window.shape[2], generator=generator)
    return scores.to(keys.device).expand(*keys.shape[:2], -1)


def new_cache(model: PreTrainedModel, config: RocketKVConfig, prompt: int, *, kind: str = "evict") -> RocketKVCache:
    """Return an empty cache; of kind `random`, one that evicts generated tokens by chance."""
    cache = RocketKVCache(model.config, config, prompt_length=prompt)
    for layer in rocketkv_layers(cache) if kind == "random" else ():
        layer.__class__ = _RandomEviction
    return cache


def prompts_of(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Tensor:
    """Return [texts, prompt] ids, successive pieces of one text."""
    count = settings.texts * settings.prompt
    text = " ".join(toy_haystack(settings.seed).take(count // 4))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:count]).view(settings.texts, settings.prompt)


def sampled(logprobs: Tensor, end: int | None, generator: torch.Generator) -> Tensor:
    """Return [B, 1] ids sampled at a temperature, never the end token."""
    logits = logprobs / TEMPERATURE
    if end is not None:
        logits[:, end] = -torch.inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, prompts: Tensor, end: int | None, method: str, settings: Settings
) -> list[dict[str, Any]]:
    """Compare caches of fixed decode capacity with a growing one, on the tokens that the model samples with the latter.

    Args:
        model: a model that is not patched.
        prompts: [texts, n] ids.
        end: the end token, which is never sampled.
        method: of all caches.
        settings: lengths, capacities and budget.

    Returns:
        A row a capacity and kind of eviction: the mean KL to the growing cache over the steps after the capacity was
        reached, in nats a token, in all and of each text, and the share of those steps with the same most likely token.
    """
    arms = [(capacity, kind) for capacity in settings.capacities for kind in KINDS]
    config = RocketKVConfig(method=method, token_budget=settings.budget)
    caches = [new_cache(model, config, prompts.shape[1])] + [
        new_cache(model, replace(config, decode_capacity=capacity), prompts.shape[1], kind=kind)
        for capacity, kind in arms
    ]
    loops = [DecodeLoop(model=model, cache=cache) for cache in caches]
    generator = torch.Generator().manual_seed(settings.seed)
    kl = torch.zeros(len(arms), settings.new_tokens, len(prompts), dtype=torch.float64)
    alike = torch.zeros_like(kl)
    with patch(model, config), Progress(f"{method}: {len(loops)} caches", total=settings.new_tokens) as progress:
        reference, *_ = [loop.prefill(prompts).float().log_softmax(-1) for loop in loops]
        for step in range(settings.new_tokens):
            ids = sampled(reference, end, generator)
            reference, *others = (loop.step(ids).float().log_softmax(-1) for loop in loops)
            for i, other in enumerate(others):
                kl[i, step] = (reference.exp() * (reference - other)).double().sum(-1)
                alike[i, step] = (reference.argmax(-1) == other.argmax(-1)).double()
            progress.step()
    return [
        {
            "method": method,
            "capacity": capacity,
            "kind": kind,
            "steps": settings.new_tokens - capacity,
            "kl": float(kl[i, capacity:].mean()),
            "kl_by_text": kl[i, capacity:].mean(0).tolist(),
            "kl_before": float(kl[i, :capacity].max()),
            "agreement": float(alike[i, capacity:].mean()),
        }
        for i, (capacity, kind) in enumerate(arms)
    ]


def speed(model: PreTrainedModel, prompts: Tensor, settings: Settings) -> dict[str, Any]:
    """Time every step of a greedy generation with re-eviction, in wall-clock and processor time."""
    config = RocketKVConfig(method="rocketkv", token_budget=settings.budget, decode_capacity=settings.speed_capacity)
    loop = DecodeLoop(model=model, cache=new_cache(model, config, prompts.shape[1]))
    sizes = set()
    with patch(model, config), Progress("steps", total=settings.speed_tokens) as progress:
        loop.prefill(prompts[:1])
        for step in range(settings.speed_tokens):
            loop.step(loop.token)
            if step % 100 == 99:
                sizes.add(loop.cache.stats().total_bytes)  # type: ignore[attr-defined]
            progress.step()

    def milliseconds(seconds: list[float]) -> dict[str, float]:
        early, late = median(seconds[1000:1500]), median(seconds[-500:])
        return {
            "tokens 1000-1500": 1e3 * early,
            "last 500 tokens": 1e3 * late,
            "ratio": late / early,
            "slowest": 1e3 * max(seconds),
            "mean": 1e3 * fmean(seconds),
        }

    return {
        "tokens": settings.speed_tokens,
        "capacity": settings.speed_capacity,
        "clock": milliseconds(loop.seconds[1:]),
        "processor": milliseconds(loop.processor_seconds[1:]),
        "cache_bytes": sorted(sizes),
        "tokens_stored": loop.cache.stats().layers[0].tokens_stored,  # type: ignore[attr-defined]
        "load": os.getloadavg()[0],
    }


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Measure the parts that are asked for and that the journal does not have."""
    journal, prompts = journal_of(folder), prompts_of(tokenizer, settings)
    result: dict[str, Any] = {}

    def key(*part: str) -> str:
        return digest([__version__, asdict(replace(settings, methods=(), parts=())), *part])

    if "speed" in settings.parts:
        result["speed"] = journal.result(key("speed"), lambda: speed(model, prompts, settings))
    if "divergence" in settings.parts:
        measure = functools.partial(divergence, model, prompts, tokenizer.eos_token_id, settings=settings)
        result["divergence"] = [
            row
            for method in settings.methods
            for row in journal.result(key("divergence", method), functools.partial(measure, method))
        ]
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as tables."""
    settings, lines = result["settings"], []
    if "divergence" in result:
        lines += [
            (
                f"{settings['texts']} texts of {settings['new_tokens']} tokens that the model wrote, after prompts of "
                f"{settings['prompt']}; budget {settings['budget']}; KL in nats a token to the growing cache, "
                "over the steps after the capacity was reached."
            ),
            "",
            "| method | capacity | KL, evict | KL, random | same first choice, evict | random |",
            "|--|--|--|--|--|--|",
        ]
        rows = {(row["method"], row["capacity"], row["kind"]): row for row in result["divergence"]}
        for method, capacity in dict.fromkeys(key[:2] for key in rows):
            ranked, by_chance = (rows[method, capacity, kind] for kind in KINDS)
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
