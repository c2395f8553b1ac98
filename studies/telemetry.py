"""How well the steps of `rocketkv+` know their own error: estimates beside true errors, and what it costs to watch.

A text is cut into a prompt and a continuation whose tokens go in one at a time, as in task kl. At each step the output
of every head is compared with exact attention, from the same query, to all that its layer stores, and to all tokens of
the text: the keys and values that the layer was given, evicted ones included. Beside these true errors stand the two
that a step makes of itself, the missed mass and the estimated error (`rocketkv.state.loss`). What counts is their rank
correlation (Spearman): whether steps and heads that err more are said to.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv._version import __version__
from rocketkv.config import RocketKVConfig
from rocketkv.core.attention import attend
from rocketkv.core.masks import LazyMask
from rocketkv.environment import machine
from rocketkv.eval.intervals import scipy_stats
from rocketkv.eval.measures.kl import Window, teacher_forced, texts
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import write_atomically
from rocketkv.eval.tasks.base import Preparation
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT, find_decoder
from rocketkv.hf.patch import patch
from rocketkv.hf.prefill import FastAttention
from rocketkv.state.loss import attend_stored, estimated_error, missed_mass, relative_error
from rocketkv.state.monitor import Monitor
from rocketkv.state.store import KVStore

TRUE = ("stored", "full")  # errors against exact attention to what is stored, and to all tokens
ESTIMATES = ("missed", "estimated_error")
WATCHED: dict[str, dict[str, Any]] = {
    "audit_every=16": {"audit_every": 16},
    "on_step": {},
    "on_loss='warn'": {"on_loss": "warn", "loss_bound": 0.9999},  # which is never passed
}


class _Compared(RocketKVLayer):
    """A layer that keeps all that it is given, and compares each of its steps with exact attention."""

    def __init__(self, config: RocketKVConfig, number: int) -> None:
        super().__init__(config, number=number)
        self.found: dict[str, list[Tensor]] = {name: [] for name in (*TRUE, *ESTIMATES)}
        self._all: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        query: Tensor,
        mask: LazyMask | None,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        fast: FastAttention,
    ) -> Tensor:
        """Attend as any layer; then, if it was a step, compare."""
        if self.pending is None:
            raise ValueError("attend follows update, which hands the keys and values over")
        self._all.append((self.pending[0].detach(), self.pending[1].detach()))
        exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        out = super().attend(query, mask, fast=fast, **exact)
        if query.shape[2] > 1:
            return out
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*self._all, strict=True))
        self._all = [(keys, values)]
        store, asked, given = self.store, query[:, :, 0], out[:, 0]
        missed = missed_mass(store, query.shape[1])
        if missed is None or store.value_sum is None or store.lengths is None:
            raise ValueError(f"method {self.config.method!r} makes no estimate of what it misses: use 'rocketkv+'")
        self.found["stored"].append(relative_error(given, attend_stored(asked, store, **exact)))
        self.found["full"].append(relative_error(given, attend(asked, keys, values, **exact)))
        self.found["missed"].append(missed)
        self.found["estimated_error"].append(estimated_error(given, missed, store.value_sum, store.lengths))
        return out


def errors(
    model: PreTrainedModel, config: RocketKVConfig, window: Window, prompt: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Return true errors and estimates of every step, layer and head of a text, by name: [m, L, H] float64.

    Args:
        model: a model to which no method is attached.
        config: the method.
        window: the text.
        prompt: tokens of its prompt; the last of the others is only predicted.
        progress: where to say how far it is.
    """
    decoder = find_decoder(model)[0]
    cache = RocketKVCache(decoder.config, config)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RocketKVLayer):
            compared = _Compared(config, number)
            compared.prompt_end = prompt
            cache.layers[number] = compared
    with patch(model, config):
        teacher_forced(model, cache, window.ids[:prompt], window.ids[prompt:], progress)
    ours = [layer for layer in cache.layers if isinstance(layer, _Compared)]
    return {
        name: torch.stack([torch.cat(layer.found[name]) for layer in ours], dim=1).double().cpu()
        for name in (*TRUE, *ESTIMATES)
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of values [n]; 0 if one of the two is constant."""
    if bool((first == first[0]).all() or (second == second[0]).all()):
        return 0.0
    return float(scipy_stats().spearmanr(first, second).statistic)


def figures(found: dict[str, Tensor]) -> dict[str, Any]:
    """Return correlations, overall and by layer, and how large errors are and are said to be.

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

    def asks(self, number: int, store: KVStore) -> bool:
        """See `Monitor`."""
        start = time.process_time()
        wanted = super().asks(number, store)
        self.spent += time.process_time() - start
        return wanted

    def watch(self, *args: Any) -> Tensor:
        """See `Monitor`."""
        start = time.process_time()
        out = super().watch(*args)
        self.spent += time.process_time() - start
        return out


@torch.inference_mode()
def costs(
    model: PreTrainedModel, config: RocketKVConfig, ids: Sequence[int], steps: int
) -> dict[str, dict[str, float]]:
    """Return the processor time, in ms, of a decode step that is watched, and what of it went into watching.

    Args:
        model: a model to which no method is attached.
        config: the method.
        ids: of the prompt.
        steps: of each way of watching, of which the mean is returned.
    """
    decoder = find_decoder(model)[0]
    token = torch.tensor([[ids[-1]]], device=model.device)
    cache = RocketKVCache(decoder.config, config, prompt_length=len(ids))
    with patch(model, config):
        model(torch.tensor([list(ids)], device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        model(token, **{CACHE_ARGUMENT: cache})
    found = {}
    for name, fields in WATCHED.items():
        own = copy.deepcopy(cache)
        layers = rocketkv_layers(own)
        monitor = _Timed(replace(config, **fields), [layer.number for layer in layers])
        for layer in layers:
            layer.monitor = monitor
        with patch(model, config, on_step=_unread if name == "on_step" else None):
            start = time.process_time()
            for _ in range(steps):
                model(token, **{CACHE_ARGUMENT: own})
            taken = time.process_time() - start
        found[name] = {"step": 1000 * taken / steps, "watching": 1000 * monitor.spent / steps}
    return found


def _unread(report: object) -> None:
    """Take a report and do nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: a hub name, a local folder, or `smollm2`.
        budgets: of `rocketkv+`, tokens a step.
        context: tokens of a prompt.
        steps: teacher-forced after it.
        samples: texts of each file, or of generated prose where there is none.
        texts: names of files.
        seed: of the texts.
        watched: steps of each way of watching, for its cost; 0 for none.
    """

    model: str = SMOLLM2
    budgets: tuple[int, ...] = (128,)
    context: int = 4096
    steps: int = 64
    samples: int = 1
    texts: tuple[str, ...] = ()
    seed: int = 0
    watched: int = 64

    def __post_init__(self) -> None:
        for name in ("context", "steps", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def study(settings: Settings) -> dict[str, Any]:
    """Measure and return everything, as JSON holds it.

    Raises:
        ValueError: a text is too short, or a budget impossible.
    """
    configs = [RocketKVConfig(method="rocketkv+", token_budget=budget) for budget in settings.budgets]
    model, tokenizer = load_model(settings.model)
    preparation = Preparation(
        tokenizer=tokenizer, length=settings.context + settings.steps + 1, count=settings.samples, seed=settings.seed
    )
    windows: list[Window] = []
    for path in map(Path, settings.texts):
        windows += texts(preparation, path)
    windows = windows or texts(preparation, None)
    results = []
    with Progress("beginning", total=len(configs) * len(windows)) as progress:
        for config in configs:
            found = []
            for window in windows:
                found.append(errors(model, config, window, settings.context, progress))
                progress.step()
            joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
            results.append({"budget": config.token_budget, **figures(joined)})
        watched = (
            costs(model, configs[0], windows[0].ids[: settings.context], settings.watched) if settings.watched else {}
        )
    return {
        "settings": asdict(settings),
        "machine": {
            **machine(),
            "transformers": transformers.__version__,
            "rocketkv": __version__,
        },
        "texts": [window.notes for window in windows],
        "results": results,
        "milliseconds": watched,
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


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    defaults = Settings()
    parser.add_argument("--model", default=defaults.model, help="a hub name, a local folder, or smollm2 (the default)")
    parser.add_argument("--budgets", type=_whole_numbers, default=defaults.budgets, help="by commas (default 128)")
    parser.add_argument("--texts", nargs="+", default=(), metavar="FILE", help="in UTF-8 (default: generated prose)")
    for name, what in (
        ("context", "tokens of each prompt"),
        ("steps", "teacher-forced after it"),
        ("samples", "texts of each file, or of generated prose"),
        ("seed", "of the prose"),
        ("watched", "steps of each way of watching, for its cost; 0 for none"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(defaults, name), help=f"{what} (default %(default)s)"
        )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to put OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in asdict(defaults)}
    result = study(Settings(**given | {"texts": tuple(args.texts)}))
    write_atomically(args.output.with_name(f"{args.output.name}.json"), json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    write_atomically(args.output.with_name(f"{args.output.name}.md"), table)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
