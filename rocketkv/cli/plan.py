"""`rocketkv plan`: memory, bytes read per step and ceilings on speed of a model, from its configuration alone."""

import argparse
import json
import sys

from ..config import INDEX_DTYPES, RocketKVConfig
from ..options import DTYPES, add_method_options, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", required=True, help="a config.json, its folder, or a hub name")
    parser.add_argument("--context", type=positive, required=True, metavar="TOKENS", help="prompt length")
    add_method_options(parser, budget=RocketKVConfig.token_budget)
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="rows (default %(default)s)")
    parser.add_argument(
        "--reserve",
        type=positive,
        default=RocketKVConfig.decode_reserve,
        metavar="N",
        help="generated tokens that the split counts in (default %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of keys, values and weights (default %(default)s)"
    )
    parser.add_argument(
        "--index-dtype",
        choices=INDEX_DTYPES,
        default="keys",
        help="of page bounds, which rocketkv has (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit code."""
    from ..hf.plan import load_config, plan

    made = plan(
        load_config(args.model),
        context=args.context,
        batch=args.batch,
        token_budget=args.budget,
        method=args.method,
        decode_reserve=args.reserve,
        dtype=args.dtype,
        index_dtype=args.index_dtype,
    )
    sys.stdout.write((json.dumps(made.to_dict(), indent=2) if args.json else str(made)) + "\n")
    return 0
