"""Test `max_error`: measured errors beside the bound, the layers that stay dense, and bytes at equal KL.

A window is a prompt and the steps after it, from some place of a text; it is within a bound if the relative error of
attention outputs, mean over steps, KV heads and layers, is. In the first part each layer gets the full model's own
queries, keys and values, as in the estimate. In the second the model decodes with each bound and with fixed budgets.
The bytes of a fixed budget at a bound's KL are interpolated between those budgets.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.config import RocketKVConfig
from rocketkv.eval.intervals import mean_interval
from rocketkv.eval.measures.kl import Window
from rocketkv.eval.methods import Compressed, Full
from rocketkv.eval.oracle.run import LayerTensors, each_layer, feed
from rocketkv.eval.prefill import read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.hf.cache import cache_stats
from rocketkv.hf.layer import RocketKVLayer

from .divergence import divergences, step_logprobs
from .settings import StudySettings, journal_of, option
from .texts import KINDS, file_texts, made_texts

VERSION = 1
METHOD, BOUND = "rocketkv+", "max_error"


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    prompt: int = option(2048, "tokens of a prompt")
    steps: int = option(32, "teacher-forced after it")
    texts: tuple[str, ...] = option((), "files in UTF-8, in place of the texts made offline", type=str)
    kinds: tuple[str, ...] = option(KINDS, "of the texts made offline")
    places: int = option(17, "windows of each text; their seeds follow each other")
    bounds: tuple[float, ...] = option((0.1, 0.2), "max_error")
    kl_places: int = option(2, "windows of each text whose KL is measured, of the first")
    budgets: tuple[int, ...] = option((64, 128, 256, 512), "fixed ones beside the bounds, in tokens")


def windows(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[tuple[int, Window]]:
    """Return the windows of all texts, each with the number of its place."""
    length, found = settings.prompt + settings.steps + 1, []  # the last token is predicted, not read
    for place in range(settings.places):
        seed = settings.seed + place
        if settings.texts:
            made = file_texts(tokenizer, [Path(path) for path in settings.texts], length, seed)
        else:
            made = made_texts(tokenizer, length, seed, settings.kinds)
        found += [(place, window) for window in made]
    return found


def layer_errors(
    model: PreTrainedModel, ids: Sequence[int], prompt: int, bounds: Sequence[float]
) -> list[list[tuple[float, int | None, float]]]:
    """Return for each bound and layer the mean relative error, the token budget (None: dense) and the bytes stored.

    Bytes are a share of the full cache's.
    """
    found: list[list[tuple[float, int | None, float]]] = [[] for _ in bounds]

    def visit(taken: LayerTensors) -> None:
        steps, kv_heads = len(ids) - prompt, taken.key.shape[1]
        exact = taken.out[0, prompt:].reshape(steps, kv_heads, -1)
        for number, bound in enumerate(bounds):
            layer = RocketKVLayer(RocketKVConfig(method=METHOD, max_error=bound), number=taken.number)
            layer.prompt_end = prompt
            feed(layer, taken, 0, prompt)
            stats = layer.stats()
            outs = torch.stack([feed(layer, taken, at, at + 1)[0, 0] for at in range(prompt, len(ids))])
            difference = outs.view_as(exact) - exact
            error = float((difference.norm(dim=-1) / exact.norm(dim=-1)).mean())
            found[number].append((error, stats.token_budget, stats.total_bytes / stats.full_bytes))

    each_layer(model, ids, visit)
    return found


def arms_of(settings: Settings) -> dict[str, RocketKVConfig]:
    """Return the settings of the second part's arms by name."""
    bounded = {f"{BOUND}={bound}": RocketKVConfig(method=METHOD, max_error=bound) for bound in settings.bounds}
    fixed = {f"t = {budget}": RocketKVConfig(method=METHOD, token_budget=budget) for budget in settings.budgets}
    return bounded | fixed


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Return errors, budgets and bytes of every window, and the KL of some; the journal keeps them.

    Raises:
        OSError: a text cannot be read.
        ValueError: a kind of text is unknown, or a text too short.
    """
    journal, found = journal_of(folder), windows(tokenizer, settings)
    of_study = [VERSION, __version__, *settings.weights, settings.prompt]
    arms = arms_of(settings)
    errors: list[dict[str, Any]] = []
    divergence: list[dict[str, Any]] = []
    with Progress("beginning", total=len(found)) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RocketKV: no budget")  # such layers are counted
        for place, window in found:
            progress.say(f"{window.id}, place {place}")
            key = digest([*of_study, window.ids, settings.bounds])
            if journal.get(key) is None:
                journal.put(key, layer_errors(model, window.ids[:-1], settings.prompt, settings.bounds))
            errors += [
                {"text": window.id, "place": place, "max_error": bound, "layers": layers}
                for bound, layers in zip(settings.bounds, journal.get(key), strict=True)
            ]
            if place < settings.kl_places:
                key = digest([*of_study, window.ids, list(arms), "kl"])
                if journal.get(key) is None:
                    journal.put(key, kl_of_arms(model, window, settings.prompt, arms))
                divergence += [{"text": window.id, "place": place, **cell} for cell in journal.get(key)]
            progress.step()
    return {"version": VERSION, "errors": errors, "divergence": divergence}


def kl_of_arms(
    model: PreTrainedModel, window: Window, prompt: int, arms: dict[str, RocketKVConfig]
) -> list[dict[str, Any]]:
    """Return each arm's mean KL over the steps, in nats, and the bytes that it stores and reads after the prompt.

    Bytes are shares of the full cache's, in the layers that can be compressed.
    """
    shared, continuation = read_prompt(model, [window.ids[:prompt]]), window.ids[prompt:]
    expected = list(step_logprobs(model, Full(), shared, continuation))
    cells = []
    for name, config in arms.items():
        method = Compressed(config)
        with method.attached(model):
            stats = cache_stats(start(model, method, shared).cache)
        layers = [layer for layer in stats.layers if layer.compressed]
        kl = fmean(divergences(expected, step_logprobs(model, method, shared, continuation)))
        stored = sum(layer.total_bytes for layer in layers) / sum(layer.full_bytes for layer in layers)
        read = sum(layer.step_bytes for layer in layers) / sum(layer.dense_step_bytes for layer in layers)
        cells.append({"arm": name, "kl": kl, "stored": stored, "read": read})
    return cells


def bytes_at(kl: float, fixed: Sequence[tuple[float, float]]) -> float | None:
    """Return the bytes at a KL, between (KL, bytes) of fixed budgets by the logarithms; None outside of them."""
    points = sorted(point for point in fixed if point[0] > 0)  # a budget that keeps all has none
    for (low, more), (high, less) in itertools.pairwise(points):
        if low <= kl <= high:
            part = math.log(kl / low) / math.log(high / low) if high > low else 0.0
            return math.exp(math.log(more) + part * math.log(less / more))
    return None


def markdown(result: dict[str, Any]) -> str:
    """Return two tables: errors and bytes of each bound; KL and bytes of each arm."""
    settings, errors = result["settings"], result["errors"]
    texts = list(dict.fromkeys(cell["text"] for cell in errors))
    where = f"{len(texts)} texts, {settings['places']} windows each"
    lines = [
        f"{settings['model']}, {where}, prompts of {settings['prompt']} tokens, {settings['steps']} steps",
        "",
        "| max_error | windows within it (interval over texts) | layers within it | dense layers | bytes stored |",
        "|--|--|--|--|--|",
    ]
    for bound in settings["bounds"]:
        of_bound = [cell for cell in errors if cell["max_error"] == bound]
        layers = [layer for cell in of_bound for layer in cell["layers"]]
        by_text = [
            [fmean(layer[0] for layer in cell["layers"]) <= bound for cell in of_bound if cell["text"] == text]
            for text in texts
        ]
        right, count = sum(map(sum, by_text)), sum(map(len, by_text))
        interval = mean_interval([100 * fmean(within) for within in by_text])
        shown = "" if interval is None else f" ({interval[0]:.0f}-{interval[1]:.0f} %)"
        within, dense, stored = (
            100 * fmean(layer[0] <= bound for layer in layers),
            100 * fmean(layer[1] is None for layer in layers),
            fmean(layer[2] for layer in layers),
        )
        lines.append(
            f"| {bound} | {right} of {count}{shown} | {within:.1f} % | {dense:.1f} % | {stored:.2f} of the full cache |"
        )
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for cell in result["divergence"]:
        by_arm.setdefault(cell["arm"], []).append(cell)
    means = {
        arm: {name: fmean(cell[name] for cell in cells) for name in ("kl", "stored", "read")}
        for arm, cells in by_arm.items()
    }
    count = len(result["divergence"]) // max(1, len(means))
    columns = "bytes stored | times a fixed budget's at that KL | bytes read | times a fixed budget's at that KL"
    lines += ["", f"| KL of {count} windows | mean | {columns} |", "|--" * 6 + "|"]
    for arm, mean in means.items():
        cells = [f"`{arm}`", f"{mean['kl']:.4f}"]
        for name in ("stored", "read"):
            fixed = [(other["kl"], other[name]) for each, other in means.items() if not each.startswith(BOUND)]
            equal = bytes_at(mean["kl"], fixed) if arm.startswith(BOUND) else None
            cells += [f"{mean[name]:.3f}", f"{mean[name] / equal:.2f}" if equal else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
