"""KL(full || method) by text and budget, at equal bytes read; every method continues after one shared prefill.

For each text and budget, a method is compared with the baseline position by position: a one-sided test by circular
block bootstrap (blocks, since neighbouring positions are alike) that it is worse, with Holm's correction over all
texts, budgets and methods of the run.

`--errors` adds the relative error of attention outputs, and the rms error of a sketch's logits of all stored tokens;
each layer gets the full model's own queries, keys and values.
`--by-layer` compresses one layer at a time, which shows where the divergence comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from rocketkv._version import __version__
from rocketkv.budget import rocketkv_plus_split
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.eval.measures.kl import Window, following
from rocketkv.eval.methods import KVPRESS, Compressed, Full, Method, find_method
from rocketkv.eval.oracle.run import LayerTensors, each_layer, feed, layer_numbers
from rocketkv.eval.prefill import ReadPrompt, read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.models import find_decoder
from rocketkv.state.store import KVStore

from .settings import StudySettings, journal_of, option
from .texts import KINDS, file_texts, made_texts

VERSION = 1
BLOCK, RESAMPLES = 8, 2000

# Other forms of the residual and the sketch, for `rocketkv+`: by the library's functions that they replace.
_MASS = ("rocketkv.core.residual.overestimate", "rocketkv.core.calibration.overestimate")
_BALANCE = ("rocketkv.core.sketch.channel_balance",)
VARIANTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "exact-chosen": (_MASS, lambda exact, estimated: torch.zeros_like(exact)),
    "sketch-mass": (_MASS, lambda exact, estimated: estimated - exact),
    "unbalanced": (_BALANCE, lambda queries, keys, mean, *rest: torch.ones_like(mean, dtype=torch.bfloat16)),
}
UNCALIBRATED, NO_RESIDUAL = "uncalibrated", "no-residual"


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    prompt: int = option(4096, "tokens of a prompt")
    steps: int = option(64, "teacher-forced after it")
    texts: tuple[str, ...] = option((), "files in UTF-8, in place of the texts made offline", type=str)
    kinds: tuple[str, ...] = option(KINDS, "of the texts made offline")
    budgets: tuple[int, ...] = option((64, 128, 256, 512), "in tokens")
    arms: tuple[str, ...] = option(
        ("rocketkv", "rocketkv+", "stored-topk"),
        f"METHOD, {KVPRESS}PRESS, or rocketkv+ with "
        f":{', :'.join((NO_RESIDUAL, UNCALIBRATED, *VARIANTS))}, several joined by ,",
    )
    baseline: str = option("rocketkv", "the arm that others are compared with")
    decode_capacity: int = option(0, "of the caches, for re-eviction of generated tokens; 0: caches grow")
    errors: bool = option(False, "measure attention errors, too")
    by_layer: bool = option(False, "compress one layer at a time")


@dataclass(frozen=True)
class Arm:
    """A method at one budget in one form; a `Method` of the harness."""

    name: str
    token_budget: int | None
    method: Method
    replaced: tuple[str, ...] = ()
    dense_prefill: bool = True

    @contextmanager
    def in_form(self) -> Iterator[None]:
        """Replace, inside the context, the library's functions that the form replaces."""
        with ExitStack() as stack:
            for variant in self.replaced:
                places, function = VARIANTS[variant]
                for place in places:
                    stack.enter_context(mock.patch(place, function))
            yield

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Patch the model inside the context, and have the method in its form."""
        with self.in_form(), self.method.attached(model):
            yield

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return an empty cache of the method."""
        return self.method.new_cache(model, prompt_length)


def arm_of(name: str, budget: int, settings: Settings, head_dim: int, layers: Sequence[int]) -> Arm:
    """Return an arm by name, which compresses all layers but `layers`.

    Raises:
        ValueError: there is no such method or form, or options of the library's methods were asked of a press.
        ImportError: kvpress is not installed.
    """
    if name.startswith(KVPRESS):
        if layers or settings.decode_capacity or settings.errors:
            raise ValueError(f"{name} is not of the library: leave out --by-layer, --decode-capacity and --errors")
        return Arm(name, budget, find_method(name, budget), dense_prefill=False)
    method, _, forms = name.partition(":")
    parts = forms.split(",") if forms else []
    unknown = sorted(set(parts) - {*VARIANTS, UNCALIBRATED, NO_RESIDUAL})
    if unknown or (parts and method != "rocketkv+"):
        raise ValueError(f"arm {name!r} names a form that there is not; see --help")
    config = RocketKVConfig(method=method, token_budget=budget, skip_layers=tuple(layers))
    if settings.decode_capacity:
        config = replace(config, decode_capacity=settings.decode_capacity)
    if {UNCALIBRATED, NO_RESIDUAL} & set(parts):
        split = rocketkv_plus_split(settings.prompt, budget, head_dim, config.decode_reserve)
        config = replace(config, split=replace(split, calibrated=False, residual=NO_RESIDUAL not in parts))
    return Arm(name, budget, Compressed(config), tuple(part for part in parts if part in VARIANTS))


def step_logprobs(model: PreTrainedModel, arm: Method, shared: ReadPrompt, tokens: Sequence[int]) -> Iterator[Tensor]:
    """Yield the log-probabilities [1, vocabulary] float32 that predict each token but the first, from decode steps."""
    with arm.attached(model):
        yield from itertools.islice(following(start(model, arm, shared), tokens), 1, None)


def divergences(expected: Sequence[Tensor], found: Iterator[Tensor]) -> list[float]:
    """Return KL(full || arm) of each step, in nats."""
    result = []
    for full, own in zip(expected, found, strict=True):
        ours, theirs = own.double().log_softmax(-1), full.double().log_softmax(-1)
        result.append(float((theirs.exp() * (theirs - ours)).sum()))
    return result


def attention_errors(
    model: PreTrainedModel, arms: Sequence[Arm], window: Window, prompt: int
) -> dict[str, list[list[float]]]:
    """Return each arm's errors by layer: the mean relative error of outputs, and the rms error of a sketch's logits."""
    found: dict[str, list[list[float]]] = {f"{arm.name} {arm.token_budget}": [] for arm in arms}

    def visit(taken: LayerTensors) -> None:
        exact = taken.out[0, prompt:]
        kv_heads = taken.key.shape[1]
        for arm in arms:
            if not isinstance(arm.method, Compressed):
                continue
            layer = RocketKVLayer(arm.method.config, number=taken.number)
            layer.prompt_end = prompt
            with arm.in_form():
                feed(layer, taken, 0, prompt)
                steps, logits = [], []
                for at in range(prompt, len(window.ids)):
                    steps.append(feed(layer, taken, at, at + 1)[0, 0])
                    if (at - prompt) % 8 == 0 and layer.store.decoding.split.sketch_bits is not None:
                        logits.append(logit_error(layer.store, taken.query[:, :, at], taken.params))
            difference = (torch.stack(steps) - exact).view(len(steps), kv_heads, -1).norm(dim=-1)
            error = difference / exact.reshape(len(steps), kv_heads, -1).norm(dim=-1)
            rms = [float(torch.stack(logits).mean().sqrt())] if logits else []
            found[f"{arm.name} {arm.token_budget}"].append([float(error.mean()), *rms])

    each_layer(model, window.ids, visit)
    return found


def logit_error(store: KVStore, query: Tensor, params: AttentionParams) -> Tensor:
    """Return the mean squared error of the sketch's logits of all stored tokens, for a query [1, H, D]."""
    decoding, stored = store.decoding, store.stored
    if decoding.index is None:
        raise ValueError("a store without an index estimates no logits")
    buffers, plain = decoding.buffers, params._replace(softcap=None)
    found = decoding.index.score(query, buffers.index_tensors, buffers.keys, plain, stored=stored, lengths=None)
    keys = decoding.keys[:, :, :stored].float()
    exact = query.float().view(*keys.shape[:2], -1, keys.shape[3]) @ keys.transpose(2, 3) * params.scaling
    return (found - exact.flatten(1, 2)).square().mean()


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Return the divergence of every text, budget and arm by step; the journal keeps them.

    Raises:
        OSError: a text cannot be read.
        ValueError: an arm or a kind of text is unknown, or a text too short.
    """
    length = settings.prompt + settings.steps + 1  # the last token is predicted, not read
    if settings.texts:
        windows = file_texts(tokenizer, [Path(path) for path in settings.texts], length, settings.seed)
    else:
        windows = made_texts(tokenizer, length, settings.seed, settings.kinds)
    config: Any = find_decoder(model)[0].config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = layer_numbers(model)
    alone = [tuple(other for other in numbers if other != number) for number in numbers] if settings.by_layer else [()]
    journal, cells = journal_of(folder), []
    of_study = [VERSION, __version__, *settings.weights, settings.prompt, settings.decode_capacity]
    asked = [(skipped, t, name) for skipped in alone for t in settings.budgets for name in settings.arms]
    with Progress("beginning", total=len(windows) * len(asked)) as progress:
        for window in windows:
            prompt, continuation = window.ids[: settings.prompt], window.ids[settings.prompt :]
            shared: ReadPrompt | None = None
            expected: list[Tensor] = []
            for skipped, budget, name in asked:
                progress.say(f"{window.id}: {name} at {budget}")
                of_run = [
                    VERSION,
                    __version__,
                    *settings.weights,
                    settings.prompt,
                    settings.decode_capacity,
                    window.ids,
                ]
                key = digest([*of_run, name, budget, skipped])
                if journal.get(key) is None:
                    if shared is None:
                        shared = read_prompt(model, [prompt])
                        expected = list(step_logprobs(model, Full(), shared, continuation))
                    arm = arm_of(name, budget, settings, head_dim, skipped)
                    journal.put(key, divergences(expected, step_logprobs(model, arm, shared, continuation)))
                layer = next((number for number in numbers if skipped and number not in skipped), None)
                cells.append({"text": window.id, "arm": name, "budget": budget, "layer": layer, "kl": journal.get(key)})
                progress.step()
    errors = {}
    if settings.errors:
        arms = [arm_of(name, budget, settings, head_dim, ()) for budget in settings.budgets for name in settings.arms]
        for window in windows:
            key = digest([*of_study, window.ids, settings.arms, settings.budgets, "errors"])
            if journal.get(key) is None:
                journal.put(key, attention_errors(model, arms, window, settings.prompt))
            errors[window.id] = journal.get(key)
    return {
        "version": VERSION,
        "texts": [{"id": window.id, "sha256": digest(window.ids)} for window in windows],
        "cells": cells,
        "errors": errors,
    }


def worse(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the probability of so large a mean difference if the values were no larger than the reference's.

    A circular block bootstrap of the centred differences (Politis and Romano 1992), with a fixed seed.
    """
    difference = np.asarray(values) - np.asarray(reference)
    rng = np.random.default_rng(0)
    blocks = -(-len(difference) // BLOCK)
    starts = rng.integers(0, len(difference), (RESAMPLES, blocks, 1))
    places = (starts + np.arange(BLOCK)).reshape(RESAMPLES, -1)[:, : len(difference)] % len(difference)
    means = (difference - difference.mean())[places].mean(1)
    return float((1 + (means >= difference.mean()).sum()) / (1 + RESAMPLES))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted probabilities, in the same order (Holm 1979)."""
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    adjusted, highest = [0.0] * len(probabilities), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[place]))
        adjusted[place] = highest
    return adjusted


def markdown(result: dict[str, Any]) -> str:
    """Return a table for each budget: mean KL of each text and arm, with a mark at those worse than the baseline."""
    settings, cells = result["settings"], result["cells"]
    baseline = settings["baseline"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    texts, budgets = ([*dict.fromkeys(cell[name] for cell in cells)] for name in ("text", "budget"))
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    by_cell = {(cell["layer"], cell["text"], cell["budget"], cell["arm"]): cell["kl"] for cell in cells}
    beside = {key: by_cell.get((*key[:3], baseline)) for key in by_cell if key[3] != baseline}
    chances = {key: worse(by_cell[key], reference) for key, reference in beside.items() if reference is not None}
    adjusted = dict(zip(chances, holm(list(chances.values())), strict=True))
    lines = [f"{settings['model']}, prompts of {settings['prompt']} tokens, {settings['steps']} steps"]
    for layer in layers:
        for budget in budgets:
            place = "" if layer is None else f", layer {layer} alone"
            lines += ["", f"### t = {budget}{place}", "", "| arm | " + " | ".join(texts) + " | mean | of baseline |"]
            lines.append("|--" * (len(texts) + 3) + "|")
            for arm in arms:
                means = [fmean(by_cell[(layer, text, budget, arm)]) for text in texts]
                reference = [by_cell.get((layer, text, budget, baseline)) for text in texts]
                shown = []
                for text, mean in zip(texts, means, strict=True):
                    chance = adjusted.get((layer, text, budget, arm))
                    shown.append(f"{mean:.4f}" + (f" **worse, p={chance:.3f}**" if chance and chance < 0.05 else ""))
                known = [fmean(values) for values in reference if values is not None]
                share = f"{fmean(means) / fmean(known):.3f}" if len(known) == len(texts) else "-"
                lines.append(f"| `{arm}` | {' | '.join(shown)} | {fmean(means):.4f} | {share} |")
    for number, title in enumerate(("attention error", "rms error of a logit")) if result["errors"] else ():
        lines += ["", f"| {title} | " + " | ".join(texts) + " | mean | by layer |", "|--" * (len(texts) + 3) + "|"]
        for name, layers_of_arm in next(iter(result["errors"].values())).items():
            if number >= len(layers_of_arm[0]):
                continue
            by_text = [[errors[number] for errors in result["errors"][text][name]] for text in texts]
            values = [fmean(errors) for errors in by_text]
            by_layer = [fmean(column) for column in zip(*by_text, strict=True)]
            each = " ".join(f"{value:.2f}" for value in by_layer)
            lines.append(
                f"| `{name}` | {' | '.join(f'{value:.4f}' for value in values)} | {fmean(values):.4f} | {each} |"
            )
    return "\n".join(lines) + "\n"
