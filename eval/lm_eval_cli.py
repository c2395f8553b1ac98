"""`rocketkv lm-eval`: the command line of lm-eval with the model `rocketkv`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from .optional import optional

MODEL = "rocketkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pass all options to lm-eval, except a leading --help."""
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="arguments of lm-eval, with --model_args of rocketkv; `rocketkv lm-eval run --help` lists them",
    )
    parser.prefix_chars = "\0"  # so that none of them is read here
    parser.set_defaults(print_help=parser.print_help)


def run(args: argparse.Namespace) -> int:
    """Run lm-eval; returns the exit code.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: the arguments name another model.
    """
    if args.arguments[:1] in (["--help"], ["-h"]):
        args.print_help()
        return 0
    command = optional("lm_eval.__main__")
    importlib.import_module(".lm", __package__)  # registers the model
    command.setup_logging()
    before, sys.argv = sys.argv, ["lm_eval", *args.arguments]
    try:
        harness = command.HarnessCLI()
        parsed = harness.parse_args()
    finally:
        sys.argv = before
    if parsed.command == "run":
        set_model(parsed)
    harness.execute(parsed)
    return 0


def set_model(args: argparse.Namespace) -> None:
    """Set the model in lm-eval's parsed arguments, and give each set of model arguments a separate cache of answers.

    lm-eval's cache finds an answer by its prompt, so two methods would share it.

    Raises:
        ValueError: the arguments or the --config file name another model.
        OSError: the --config file cannot be read.
    """
    import yaml

    from .records import digest

    config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) if args.config else {}
    model = args.model or config.get("model", MODEL)
    if model != MODEL:
        raise ValueError(f"rocketkv lm-eval runs the model {MODEL!r}, got --model {model}; use lm_eval for others")
    args.model = MODEL
    if cache := args.use_cache or config.get("use_cache"):
        args.use_cache = f"{cache}-{digest([config, args.model_args])[:12]}"
