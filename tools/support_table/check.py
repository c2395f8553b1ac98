"""Patch a tiny random model, generate within and beyond the budget, and say what became of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

import rocketkv
from tiny import LARGE, SETTINGS, SKETCH_SPLIT, SPLIT, greedy, prompt, sharpened

from .shrink import WORDS, default_of, tiny

PROMPT, NEW_TOKENS = 101, 12
MOST_PARAMETERS = 100_000_000
SPLITS = {"rocketkv": SPLIT, "rocketkv+": SKETCH_SPLIT}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        kind: class of the model.
        result: as in `table.HEAD`.
        compressed: layers that are compressed, of the default configuration.
        layers: its layers.
        note: the reason.
    """

    kind: str
    result: str
    compressed: int = 0
    layers: int = 0
    note: str = ""


def check_class(kind: str, model_type: str, *, decoder: bool) -> Row:
    """Build a class's tiny model and check it.

    Args:
        kind: name of the class.
        model_type: the model type whose configuration is taken.
        decoder: whether the class is causal, rather than one that reads images, too.
    """
    try:
        default, model, note = build(kind, model_type, decoder=decoder)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the row's reason
        return Row(kind, "not built", note=first_line(error))
    row = check_model(model, default)
    return replace(row, kind=kind, note="; ".join(filter(None, (note, row.note))))


def build(kind: str, model_type: str, *, decoder: bool) -> tuple[PretrainedConfig, PreTrainedModel, str]:
    """Return the default configuration of a class, a tiny model of it, and what to note about the configuration."""
    owner: Any = getattr(transformers, kind)
    config: Any
    config, note = default_of(model_type)
    if decoder and not isinstance(config, owner.config_class):
        config = config.get_text_config(decoder=True)
    small = tiny(config, decoder=decoder)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in owner(small).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"its small configuration still has {parameters} parameters")
    return config, sharpened(owner, small), note


def check_model(model: Any, default: PretrainedConfig, tolerance: float = 1e-4) -> Row:
    """Check a model against itself without the patch.

    Within the budget its logits are the stock model's; beyond it, it stores less than the prompt and its logits are
    finite; and without the patch it is again what it was.

    Args:
        model: a small model.
        default: the configuration whose layers are counted.
        tolerance: how much logits within the budget may differ, as a share of the largest.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = _checked(model, default, tolerance)
    if row.result == "yes" and any("there is nothing to compress" in str(warning.message) for warning in caught):
        return replace(row, result="no effect", compressed=0)
    return row


def _checked(model: Any, default: PretrainedConfig, tolerance: float) -> Row:
    """Check a model; one with nothing to compress passes."""
    kind = type(model).__name__
    try:
        rocketkv.patch(model, **LARGE)
    except ValueError as error:
        return Row(kind, "refused", note=first_line(error).removeprefix(f"{kind} cannot be patched: "))
    except Exception as error:  # noqa: BLE001 - as above
        return Row(kind, "fails", note=f"{type(error).__name__}: {first_line(error)}")
    rocketkv.unpatch(model)
    try:
        words = min(WORDS, getattr(model.get_input_embeddings(), "num_embeddings", WORDS) // 2)
        ids = prompt(PROMPT).clamp(max=words)
        _, stock, cache = greedy(model, ids, NEW_TOKENS)
        if not stock.isfinite().all():
            raise ValueError("its logits are not finite")
    except Exception as error:  # noqa: BLE001 - as above
        return Row(kind, "not built", note=f"the stock model does not generate: {first_line(error)}")
    if cache is None:
        return Row(kind, "no effect", note="it generates without a cache")
    try:
        fault = compare(model, ids, stock, tolerance)
    except Exception as error:  # noqa: BLE001 - as above
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault:
        return Row(kind, "fails", note=fault)
    compressed, layers = layer_counts(default)
    return Row(kind, "partly" if 0 < compressed < layers else "yes", compressed, layers)


def compare(model: Any, ids: torch.Tensor, stock: torch.Tensor, tolerance: float) -> str:
    """Return what is wrong with a patched model, or nothing; unpatch it."""
    handle = rocketkv.patch(model, **LARGE)
    within = greedy(model, ids, NEW_TOKENS)[1]
    difference = float((within - stock).abs().max())
    if not difference <= tolerance * float(stock.abs().max()):
        return f"within the budget its logits differ by {difference:.1e}"
    for method in SPLITS:
        settings = {**SETTINGS, "token_budget": 24, "method": method, "split": SPLITS[method]}
        handle = rocketkv.patch(model, **settings)
        beyond = greedy(model, ids, NEW_TOKENS)[1]
        stored = [layer.tokens_stored for layer in handle.stats().layers if layer.compressed]
        if not beyond.isfinite().all():
            return f"{method}: logits are not finite"
        if not all(tokens < PROMPT for tokens in stored):
            return f"{method}: stores {max(stored)} tokens of {PROMPT + NEW_TOKENS - 1}"
    rocketkv.unpatch(model)
    if not greedy(model, ids, NEW_TOKENS)[1].equal(stock):
        return "it is not what it was after unpatch"
    return ""


def layer_counts(default: PretrainedConfig) -> tuple[int, int]:
    """Return how many layers of a configuration are compressed, and how many it has."""
    layers = DynamicCache(config=default.get_text_config(decoder=True)).layers
    return sum(type(layer) is DynamicLayer for layer in layers), len(layers)


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error, or its kind if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":") and "validator" in lines[0]:
        lines = [lines[1].removeprefix("ValueError: ")]
    return lines[0].split(". You can install")[0] if lines else type(error).__name__
