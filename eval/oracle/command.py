"""`rocketkv oracle`: the fewest tokens that attention needs on texts, and the parts of a method's error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ...options import add_method_options, add_model_options, loading, positive

JOURNAL = "journal.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_options(parser)
    add_method_options(parser, budget=256)
    parser.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="in UTF-8 (default: the prose of task kl)"
    )
    numbers: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
        ("samples", positive, 2, "windows of each file, or texts of prose"),
        ("context", positive, 4096, "tokens of a prompt"),
        ("steps", positive, 64, "teacher-forced decode steps after it"),
        ("error", float, 0.1, "relative L2 error of the oracles"),
        ("bandwidth", positive, 2000, "GB/s of the latency bound"),
        ("seed", int, 0, "of the texts"),
    )
    for name, kind, default, text in numbers:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="of all files; resumes there"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the folder's journal lacks, and write document, tables and heat maps; returns the exit code.

    Raises:
        OSError: a text cannot be read, or a file not written.
        ValueError: a setting is impossible, or a text too short.
        ImportError: matplotlib, for the heat maps, is not installed.
    """
    import torch

    from ...hf.loading import SMOLLM2, load_model, resolve_dtype
    from ..journal import Journal
    from ..measures.kl import Window, texts
    from ..progress import Progress
    from ..records import write_atomically
    from ..tasks.base import Preparation
    from .document import document, markdown
    from .heatmaps import heat_maps
    from .run import Settings, layer_numbers, measure

    settings = Settings(
        model=args.model or SMOLLM2,
        dtype=str(resolve_dtype(args.dtype, args.device, args.device_map)).removeprefix("torch."),
        method=args.method,
        token_budget=args.budget,
        context=args.context,
        steps=args.steps,
        error=args.error,
        bandwidth=args.bandwidth,
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
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
