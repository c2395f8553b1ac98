"""Rank correlation of the errors that a step of `rocketkv+` estimates with its true errors, and the cost of watching.

A text is cut into a prompt and a continuation, read one token at a time as in task kl. At each step the output of every
head is compared with exact attention, from the same query, to all tokens that its layer stores, and to all tokens of
the text, evicted ones included. The step itself estimates the missed mass and the error (`rocketkv.state.missed`). The
result is Spearman's rank correlation of estimates and true errors over steps and heads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv.config import RocketKVConfig
from rocketkv.core.attention import attend
from rocketkv.core.params import AttentionParams
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.measures.kl import Window, following, texts
from rocketkv.eval.optional import optional
from rocketkv.eval.progress import Progress
from rocketkv.eval.tasks.base import Preparation
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.masks import LazyMask
from rocketkv.hf.models import find_decoder
from rocketkv.hf.patch import patch
from rocketkv.hf.prefill import FastAttention
from rocketkv.state.missed import attend_stored, estimated_error, missed_mass, relative_error
from rocketkv.state.monitor import Monitor
from rocketkv.state.store import KVStore

from .settings import StudySettings, option

TRUE = ("stored", "full")  # errors against exact attention to the stored tokens, and to all tokens
ESTIMATES = ("missed", "estimated_error")
WATCHED: dict[str, dict[str, Any]] = {
    "audit_every=16": {"audit_every": 16},
    "on_step": {},
    "on_loss='warn'": {"on_loss": "warn", "loss_bound": 0.9999},  # which is never passed
}


class _Compared(RocketKVLayer):
    """A layer that keeps all its keys and values and compares each of its steps with exact attention."""

    def __init__(self, config: RocketKVConfig, number: int) -> None:
        super().__init__(config, number=number)
        self.found: dict[str, list[Tensor]] = {name: [] for name in (*TRUE, *ESTIMATES)}
        self._all: list[tuple[Tensor, Tensor]] = []

    def attend(self, query: Tensor, mask: LazyMask | None, params: AttentionParams, *, fast: FastAttention) -> Tensor:
        """Attend as any layer; compare a decode step."""
        if self.pending is None:
            raise ValueError("attend follows update, which hands the keys and values over")
        self._all.append((self.pending[0].detach(), self.pending[1].detach()))
        out = super().attend(query, mask, params, fast=fast)
        if query.shape[2] > 1:
            return out
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*self._all, strict=True))
        self._all = [(keys, values)]
        store, asked, given = self.store, query[:, :, 0], out[:, 0]
        missed, buffers = missed_mass(store), store.decoding.buffers
        if missed is None or buffers.value_sum is None:
            raise ValueError(f"method {self.config.method!r} makes no estimate of what it misses: use 'rocketkv+'")
        self.found["stored"].append(relative_error(given, attend_stored(asked, store, params)))
        self.found["full"].append(relative_error(given, attend(asked, keys, values, params)))
        self.found["missed"].append(missed)
        self.found["estimated_error"].append(estimated_error(given, missed, buffers.value_sum, buffers.seq_lens))
        return out


def errors(model: PreTrainedModel, config: RocketKVConfig, window: Window, prompt: int) -> dict[str, Tensor]:
    """Return true errors and estimates of every step, layer and head of a text, by name: [m, L, H] float64.

    Args:
        model: a model to which no method is attached.
        config: the method.
        window: the text.
        prompt: tokens of its prompt; the last of the others is only predicted.
    """
    decoder = find_decoder(model)[0]
    cache = RocketKVCache(decoder.config, config)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RocketKVLayer):
            cache.layers[number] = _Compared(config, number)
    with patch(model, config):
        loop = DecodeLoop(model=model, cache=cache)
        loop.prefill([window.ids[:prompt]])
        for _ in following(loop, window.ids[prompt:]):
            pass
    ours = [layer for layer in cache.layers if isinstance(layer, _Compared)]
    return {
        name: torch.stack([torch.cat(layer.found[name]) for layer in ours], dim=1).double().cpu()
        for name in (*TRUE, *ESTIMATES)
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of values [n]; 0 if one of the two is constant."""
    if bool((first == first[0]).all() or (second == second[0]).all()):
        return 0.0
    return float(optional("scipy.stats").spearmanr(first, second).statistic)


def figures(found: dict[str, Tensor]) -> dict[str, Any]:
    """Return correlations, overall and by layer, and quantiles of true and estimated errors.

    Args:
        found: see `errors`; those of several texts one after another.
    """
    result: dict[str, Any] = {"points": found["stored"].numel()}
    for name in TRUE:
        quantiles = found[name].flatten().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        result[f"{name}_error"] = {"mean": float(found[name].mean()), "median": quantiles[0], "q95": quantiles[1]}
    for estimate in ESTIMATES:
        for name in TRUE:
            layers = zip(found[estimate].unbind(1), found[name].unbind(1), strict=True)
            result[f"{estimate}~{name}"] = {
                "overall": spearman(found[estimate].flatten(), found[name].flatten()),
                "layers": [spearman(one.flatten(), other.flatten()) for one, other in layers],
            }
    ratio = found["estimated_error"] / found["stored"].clamp(min=1e-12)
    result["estimated_over_true"] = (
        ratio.flatten().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    )
    return result


class _Timed(Monitor):
    """A monitor that counts its own processor time, in seconds."""

    spent = 0.0

    def asks(self, number: int, store: KVStore, count: int = 1) -> bool:
        """See `Monitor`."""
        start = time.process_time()
        wanted = super().asks(number, store, count)
        self.spent += time.process_time() - start
        return wanted

    def watch(self, *args: Any) -> Tensor:
        """See `Monitor`."""
        start = time.process_time()
        out = super().watch(*args)
        self.spent += time.process_time() - start
        return out


def costs(
    model: PreTrainedModel, config: RocketKVConfig, ids: Sequence[int], steps: int
) -> dict[str, dict[str, float]]:
    """Return the processor time, in ms, of a decode step that is watched, and of the watching in it.

    Args:
        model: a model to which no method is attached.
        config: the method.
        ids: of the prompt.
        steps: of each way of watching, of which the mean is returned.
    """
    cache = RocketKVCache(find_decoder(model)[0].config, config, prompt_length=len(ids))
    loop = DecodeLoop(model=model, cache=cache)
    with patch(model, config):
        loop.prefill([ids])
        loop.step([ids[-1:]])
        after = loop.snapshot()
    milliseconds = {}
    for name, fields in WATCHED.items():
        loop.rollback(after)
        layers = rocketkv_layers(cache)
        monitor = _Timed(replace(config, **fields), [layer.number for layer in layers])
        for layer in layers:
            layer.monitor = monitor
        with patch(model, config, on_step=_unread if name == "on_step" else None):
            for _ in range(steps):
                loop.step([ids[-1:]])
        spent = sum(loop.processor_seconds[-steps:])
        milliseconds[name] = {"step": 1000 * spent / steps, "watching": 1000 * monitor.spent / steps}
    return milliseconds


def _unread(report: object) -> None:
    """Take a report and do nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    budgets: tuple[int, ...] = option((128,), "of rocketkv+, tokens a step")
    context: int = option(4096, "tokens of each prompt")
    steps: int = option(64, "teacher-forced after it")
    samples: int = option(1, "texts of each file, or of generated prose without one")
    texts: tuple[str, ...] = option((), "files in UTF-8, in place of generated prose", type=str)
    watched: int = option(64, "steps of each way of watching, for its cost; 0 for none")

    def __post_init__(self) -> None:
        for name in ("context", "steps", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Measure errors, estimates and costs.

    Raises:
        ValueError: a text is too short, or a budget impossible.
    """
    configs = [RocketKVConfig(method="rocketkv+", token_budget=budget) for budget in settings.budgets]
    preparation = Preparation(
        tokenizer=tokenizer, length=settings.context + settings.steps + 1, count=settings.samples, seed=settings.seed
    )
    files: list[Path | None] = [Path(path) for path in settings.texts] or [None]
    windows = [window for file in files for window in texts(preparation, file)]
    results = []
    with Progress("errors", total=len(configs) * len(windows)) as progress:
        for config in configs:
            found = []
            for window in windows:
                found.append(errors(model, config, window, settings.context))
                progress.step()
            joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
            results.append({"budget": config.token_budget, **figures(joined)})
    first = windows[0].ids[: settings.context]
    return {
        "texts": [window.notes for window in windows],
        "results": results,
        "milliseconds": costs(model, configs[0], first, settings.watched) if settings.watched else {},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as tables."""
    settings = result["settings"]
    texts_of = f"{len(result['texts'])} texts of {settings['context']} tokens, {settings['steps']} steps each"
    columns = (
        *("t", "points", "mean error, stored", "full", "missed ~ stored", "estimated ~ stored", "estimated ~ full"),
        "estimated / true: 10 %, median, 90 %",
    )
    lines = [
        f"{settings['model']}, {texts_of}; every layer and query head. Rank correlations, in brackets by layer.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'--|' * len(columns)}",
    ]
    for one in result["results"]:
        errors_of = (f"{one[f'{name}_error']['mean']:.3f}" for name in TRUE)
        pairs = ("missed~stored", "estimated_error~stored", "estimated_error~full")
        ratio = ", ".join(f"{value:.2f}" for value in one["estimated_over_true"])
        cells = (
            str(one["budget"]),
            str(one["points"]),
            *errors_of,
            *(_correlation(one[pair]) for pair in pairs),
            ratio,
        )
        lines.append(f"| {' | '.join(cells)} |")
    if result["milliseconds"]:
        lines += ["", "| a step, watched by | processor ms | of them watching | share |", "|--|--|--|--|"]
        for name, taken in result["milliseconds"].items():
            share = 100 * taken["watching"] / taken["step"]
            lines.append(f"| {name} | {taken['step']:.1f} | {taken['watching']:.3f} | {share:.2f} % |")
    return "\n".join(lines) + "\n"


def _correlation(found: dict[str, Any]) -> str:
    layers = found["layers"]
    return f"{found['overall']:.3f} ({min(layers):.2f}, {median(layers):.2f}, {max(layers):.2f})"
