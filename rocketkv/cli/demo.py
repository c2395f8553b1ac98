"""`rocketkv demo`: a real model finds a number in a long text, with its full KV cache and with compressed ones.

The methods' steps alternate, so that all of them share the machine's other load; times are medians of a step.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..budget import DEFAULT_METHOD
from ..config import RocketKVConfig
from ..options import add_model_options, comma_separated, loading, method_name, positive

if TYPE_CHECKING:
    from ..eval.generate import Generation

MEBI = 2**20
SEED = 1
DEPTH = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_options(parser)
    parser.add_argument(
        "--context", type=positive, default=7500, metavar="TOKENS", help="prompt length (default %(default)s)"
    )
    parser.add_argument(
        "--budgets",
        type=comma_separated(positive),
        default="256,512",
        metavar="T,T",
        help="token budgets (default %(default)s)",
    )
    parser.add_argument(
        "--method", type=method_name, default=DEFAULT_METHOD, metavar="NAME", help="(default %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=16, metavar="N", help="tokens to generate (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table; returns the exit code."""
    arms: dict[str, RocketKVConfig | None] = {"full cache": None}
    arms |= {f"{args.method} {t}": RocketKVConfig(method=args.method, token_budget=t) for t in args.budgets}
    control = max(args.budgets)
    arms[f"streaming {control}"] = RocketKVConfig(method="streaming", token_budget=control)
    from ..backend import cpu_hint
    from ..eval.generate import alternating_generate
    from ..eval.progress import Progress
    from ..eval.tasks.needle import found, needle_prompt
    from ..hf.loading import load_model

    with Progress("loading the model", total=len(arms) + 1) as progress:
        model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
        prompt = needle_prompt(tokenizer, tokens=args.context, depth=DEPTH, seed=SEED)

        def say(text: str) -> None:
            progress.say(text)
            progress.step()

        sizes = {"new_tokens": args.new_tokens}
        results = alternating_generate(model, tokenizer, prompt.text, arms, **sizes, say=say)
    full = results["full cache"]
    rows = [_row(name, generation, full, found(prompt.answer, generation.text)) for name, generation in results.items()]
    if args.json:
        document = {"prompt_tokens": prompt.tokens, "needle": prompt.answer, "depth": prompt.depth, "arms": rows}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        head = f"The number {prompt.answer} is hidden {prompt.depth:.0%} into {prompt.tokens} tokens of prose.\n\n"
        sys.stdout.write(head + _table(rows))
        hint = cpu_hint(model.device)
        sys.stdout.write(hint and f"\n{hint}\n")
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
        "step_milliseconds": 1e3 / generation.tokens_per_second,
        "speedup": generation.tokens_per_second / full.tokens_per_second,
        "first_token_seconds": generation.first_token_seconds,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':16} {'answer':32} {'':5} {'KV MiB':>8} {'smaller':>8} {'ms a step':>9} {'faster':>7}"]
    lines += [
        f"{row['arm']:16} {row['answer'][:32]:32} {'right' if row['right'] else 'wrong':5} {row['kv_mib']:8.1f} "
        f"{row['kv_ratio']:7.1f}x {row['step_milliseconds']:9.1f} {row['speedup']:6.2f}x"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
