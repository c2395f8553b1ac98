"""`rocketkv oracle`: the fewest tokens that attention needs on texts, and the parts of a method's error."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ...budget import METHODS
from ...cli.compress import add_model_arguments
from ...hf.loading import SMOLLM2, load_model
from ..journal import Journal
from ..measures.kl import Window, texts
from ..progress import Progress
from ..records import write_atomically
from ..tasks.base import Preparation
from .document import document, markdown
from .heatmaps import heat_maps
from .run import Settings, layer_numbers, measure

JOURNAL = "journal.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="in UTF-8 (default: the prose of task kl)"
    )
    parser.add_argument("--samples", type=int, default=2, help="windows of each file, or texts of prose (default 2)")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="prompt length (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="teacher-forced decode steps (%(default)s)")
    parser.add_argument(
        "--method", default="rocketkv", choices=sorted(METHODS), help="whose error is split (%(default)s)"
    )
    parser.add_argument("--budget", type=int, default=256, metavar="T", help="its token budget (%(default)s)")
    parser.add_argument("--error", type=float, default=0.1, help="relative L2 error of the oracles (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=2000, help="of memory in GB/s, for latency (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="of all files; an interrupted run resumes"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the folder's journal lacks, and write document, tables and heat maps; returns the exit code.

    Raises:
        OSError: a text cannot be read, or a file not written.
        ValueError: a setting is impossible, or a text too short.
        ImportError: matplotlib, for the heat maps, is not installed.
    """
    settings = Settings(
        model=args.model or SMOLLM2,
        dtype=args.dtype,
        method=args.method,
        token_budget=args.budget,
        context=args.context,
        steps=args.steps,
        error=args.error,
        bandwidth=args.bandwidth,
    )
    if args.samples < 1:
        raise ValueError(f"samples must be at least 1, got {args.samples}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with Progress("loading the model", total=1) as progress, _quiet_where_piped():
        model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    preparation = Preparation(
        tokenizer=tokenizer, length=settings.context + settings.steps, count=args.samples, seed=args.seed
    )
    windows: list[Window] = []
    for path in args.texts or [None]:
        windows += texts(preparation, path)
    total = len(windows) * len(layer_numbers(model))
    with Progress("beginning", total=total) as progress:
        results = measure(model, windows, settings, Journal(args.output / JOURNAL), progress)
    result = document(settings, windows, results)
    tables = markdown(result)
    write_atomically(args.output / "oracle.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(args.output / "oracle.md", tables)
    for name, picture in heat_maps(result).items():
        write_atomically(args.output / name, picture)
    sys.stdout.write(f"{tables}\n{args.output}: oracle.json, oracle.md and the heat maps\n")
    return 0


@contextlib.contextmanager
def _quiet_where_piped() -> Iterator[None]:
    """Disable the progress bars of transformers inside the block if stderr is piped."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
