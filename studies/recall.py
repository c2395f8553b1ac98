"""Recall by budget: the needles of `needle`, each prompt read once and asked for by every arm.

`python -m studies recall -o results/recall` compares methods at several budgets on the same prompts. All of a
prompt but its last tokens is read by the stock model, once; each arm goes on from those keys and values with a cache of
its own, which is what it would have read itself: a prompt is dense attention in every method, up to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from rocketkv._version import __version__
from rocketkv.environment import machine
from rocketkv.eval.intervals import wilson
from rocketkv.eval.journal import Journal
from rocketkv.eval.methods import FULL, Method, find_method
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest, write_atomically
from rocketkv.eval.tasks.needle import found, needle_grid
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT

from .retention import TAIL, Head, adopt, read

VERSION = 2
NEW_TOKENS = 16
ARMS = (FULL, "rocketkv:64", "rocketkv:128", "rocketkv:256", "rocketkv+:64", "rocketkv+:128", "rocketkv+:256")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; its fields are those of the command line."""

    model: str = SMOLLM2
    tokens: tuple[int, ...] = (4096, 8064)
    prompts: int = 20
    seed: int = 1
    arms: tuple[str, ...] = ARMS


def method_of(arm: str) -> Method:
    """Return the method that an arm names: METHOD:BUDGET, or `full`.

    Raises:
        ValueError: there is no such method, or the budget is no number.
    """
    name, _, budget = arm.rpartition(":") if arm != FULL else (arm, "", "")
    if arm != FULL and not (name and budget.isdecimal()):
        raise ValueError(f"arms must be {FULL} or METHOD:BUDGET, as rocketkv:256; got {arm!r}")
    return find_method(name, int(budget) if budget else None)


@torch.inference_mode()
def ask(model: PreTrainedModel, method: Method, head: Head, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Return the tokens that one method's cache continues a prompt with, greedily.

    Args:
        model: full attention in every layer, with no method attached; none is afterwards.
        method: how to compress.
        head: `retention.read` of the prompt alone; it stays as it is.
        prompt: token ids.
        new_tokens: how many.
    """
    with method.attached(model):
        cache = method.new_cache(model, len(prompt))
        adopt(cache, head, len(prompt))
        given = torch.tensor([prompt[-TAIL:]], device=model.device)
        written: list[int] = []
        while len(written) < new_tokens:
            logits = model(given, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1]
            given = logits.argmax(-1, keepdim=True)
            written.append(int(given))
    return written


def study(settings: Settings, journal: Journal) -> dict[str, Any]:
    """Ask what the journal does not have yet; return settings, which answers were right, and the machine."""
    model, tokenizer = load_model(settings.model)
    methods = {arm: method_of(arm) for arm in settings.arms}
    right: dict[str, dict[str, list[bool]]] = {str(length): {arm: [] for arm in methods} for length in settings.tokens}
    total = len(settings.tokens) * settings.prompts * len(methods)
    with Progress("composing prompts", total=total) as progress:
        for length in settings.tokens:
            grid = needle_grid(tokenizer, tokens=length, count=settings.prompts, seed=settings.seed)
            for number, prompt in enumerate(grid):
                ids = list(tokenizer(prompt.text)["input_ids"])
                head: Head | None = None
                for arm, method in methods.items():
                    progress.say(f"{length} tokens, prompt {number + 1} of {len(grid)}: {arm}")
                    key = digest([VERSION, __version__, settings.model, arm, ids])
                    if journal.get(key) is None:
                        head = read(model, [ids]) if head is None else head
                        journal.put(key, str(tokenizer.decode(ask(model, method, head, ids, NEW_TOKENS))))
                    right[str(length)][arm].append(found(prompt.answer, journal.get(key)))
                    progress.step()
    return {
        "version": VERSION,
        "settings": asdict(settings),
        "machine": {**machine(), "transformers": transformers.__version__, "rocketkv": __version__},
        "right": right,
    }


def markdown(right: Mapping[str, Mapping[str, Sequence[bool]]]) -> str:
    """Return a table: a row an arm, and for each length how many numbers it gave, with a 95 % interval of the share."""
    arms = list(next(iter(right.values())))
    lines = ["| | " + " | ".join(f"{length} tokens" for length in right) + " |", "|--" * (len(right) + 1) + "|"]
    for arm in arms:
        cells = []
        for answers in right.values():
            hits, asked = sum(answers[arm]), len(answers[arm])
            low, high = wilson(hits, asked)
            cells.append(f"{hits}/{asked} ({low:.2f}-{high:.2f})")
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or go on with it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    defaults = Settings()
    parser.add_argument("--model", default=defaults.model, help="a hub name, a local folder, or smollm2 (the default)")
    lengths = " ".join(map(str, defaults.tokens))
    parser.add_argument("--tokens", type=int, nargs="+", default=defaults.tokens, help=f"of the prompts ({lengths})")
    parser.add_argument("--prompts", type=int, default=defaults.prompts, help=f"of each length ({defaults.prompts})")
    parser.add_argument("--seed", type=int, default=defaults.seed, help=f"of the prompts ({defaults.seed})")
    parser.add_argument(
        "--arms", nargs="+", default=defaults.arms, help=f"full, or METHOD:BUDGET ({' '.join(defaults.arms)})"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to put OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(
        model=args.model, tokens=tuple(args.tokens), prompts=args.prompts, seed=args.seed, arms=tuple(args.arms)
    )
    paths = {ending: args.output.with_name(f"{args.output.name}.{ending}") for ending in ("json", "md", "journal")}
    result = study(settings, Journal(paths["journal"]))
    write_atomically(paths["json"], json.dumps(result, indent=1) + "\n")
    table = markdown(result["right"])
    write_atomically(paths["md"], table)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
