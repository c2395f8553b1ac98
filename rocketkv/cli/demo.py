"""`rocketkv demo`: a real model finds a number in a long text, with its full KV cache and with a compressed one."""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from ..budget import METHODS
from ..config import RocketKVConfig
from ..eval.generate import Generation, measured_generate
from ..eval.progress import Progress
from ..eval.tasks.needle_text import found, needle_prompt
from ..hf.loading import load_model

MEBI = 2**20
SEED = 1
DEPTH = 0.4


@dataclass(frozen=True)
class Arm:
    """One row of the demo: a name and how to compress, None for the stock model."""

    name: str
    config: RocketKVConfig | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument("--model", help="a hub name or local folder; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--context", type=int, default=7500, metavar="TOKENS", help="prompt length (default 7500)")
    parser.add_argument("--budgets", default="256,512", metavar="T,T", help="token budgets (default 256,512)")
    parser.add_argument("--method", default="rocketkv", choices=sorted(METHODS), help="default rocketkv")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens to generate (default 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table; returns the exit code."""
    try:
        budgets = [int(budget) for budget in args.budgets.split(",")]
    except ValueError as error:
        raise ValueError(f"--budgets must be whole numbers with commas between, got {args.budgets!r}") from error
    arms = [Arm("full cache", None)]
    arms += [Arm(f"{args.method} {t}", RocketKVConfig(method=args.method, token_budget=t)) for t in budgets]
    control = max(budgets)
    arms.append(Arm(f"streaming {control}", RocketKVConfig(method="streaming", token_budget=control)))
    with Progress("loading the model", total=len(arms)) as progress:
        model, tokenizer = load_model(args.model)
        prompt = needle_prompt(tokenizer, tokens=args.context, depth=DEPTH, seed=SEED)
        results: list[tuple[Arm, Generation]] = []
        for arm in arms:
            progress.say(f"{arm.name}: reading {prompt.tokens} tokens, writing {args.new_tokens}")
            results.append(
                (arm, measured_generate(model, tokenizer, prompt.text, arm.config, new_tokens=args.new_tokens))
            )
            progress.step()
    full = results[0][1]
    rows = [_row(arm.name, generation, full, found(prompt.answer, generation.text)) for arm, generation in results]
    if args.json:
        document = {"prompt_tokens": prompt.tokens, "needle": prompt.answer, "depth": prompt.depth, "arms": rows}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        head = f"The number {prompt.answer} is hidden {prompt.depth:.0%} into {prompt.tokens} tokens of prose.\n\n"
        sys.stdout.write(head + _table(rows))
    return 0


def _row(name: str, generation: Generation, full: Generation, right: bool) -> dict[str, Any]:
    stats = generation.stats
    return {
        "arm": name,
        "right": right,
        "answer": " ".join(generation.text.split()),
        "kv_mib": stats.total_bytes / MEBI,
        "kv_ratio": full.stats.total_bytes / stats.total_bytes,
        "tokens_per_second": generation.tokens_per_second,
        "speedup": generation.tokens_per_second / full.tokens_per_second,
        "first_token_seconds": generation.first_token_seconds,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':16} {'answer':32} {'':5} {'KV MiB':>8} {'smaller':>8} {'tokens/s':>9} {'faster':>7}"]
    lines += [
        f"{row['arm']:16} {row['answer'][:32]:32} {'right' if row['right'] else 'wrong':5} {row['kv_mib']:8.1f} "
        f"{row['kv_ratio']:7.1f}x {row['tokens_per_second']:9.1f} {row['speedup']:6.2f}x"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
