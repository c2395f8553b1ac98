"""`rocketkv tune`: settings that keep a model's decode divergence within a target, in a file for `rocketkv.patch`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from ..options import add_placement_options, loading, method_name, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="hub name, local folder, or smollm2")
    parser.add_argument(
        "texts", type=Path, nargs="+", metavar="TEXT", help="text files in UTF-8, such as you will read"
    )
    parser.add_argument(
        "--target-kl",
        type=_above_0,
        required=True,
        metavar="NATS",
        help="largest mean KL(full || method) of a decode step, such as 0.02",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("rocketkv.json"), metavar="FILE", help="(default %(default)s)"
    )
    parser.add_argument(
        "--method",
        type=method_name,
        default="rocketkv+",
        metavar="NAME",
        help="that ranks tokens (default %(default)s)",
    )
    for name, default, text in (
        ("prompt", 2048, "tokens of a prompt"),
        ("steps", 32, "tokens that follow it, teacher-forced"),
        ("windows", 24, "prompts, half of them held out"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default %(default)s)"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows' places (default %(default)s)")
    add_placement_options(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch on the CPU")


def _above_0(text: str) -> float:
    """Return a number above 0, for `type=` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Tune, write the file and print a summary; returns the exit code, 1 if no candidate is within the target.

    Figures of an unfinished run, or of one that found nothing, stay in a journal beside the file; the next run begins
    with them.

    Raises:
        OSError: a text cannot be read, there is no such model, or the file cannot be written.
        ValueError: a setting is impossible, or a text is too short or not UTF-8.
        ImportError: scipy is not installed.
    """
    import torch

    from ..eval.journal import Journal
    from ..eval.optional import optional
    from ..eval.records import write_atomically
    from ..eval.tune import LADDER, Text, TuneSettings, tune
    from ..hf.loading import load_model

    optional("scipy.stats")  # a missing package must show before the measurements, not after
    settings = TuneSettings(
        model=args.model,
        target_kl=args.target_kl,
        method=args.method,
        prompt=args.prompt,
        steps=args.steps,
        windows=args.windows,
        seed=args.seed,
    )
    texts = [Text(path.name, _content(path)) for path in args.texts]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
    path = args.output.with_name(f"{args.output.name}.journal")
    journal = Journal(path)
    found = tune(model, tokenizer, texts, settings, journal)
    sys.stdout.write(_table(found.calibration, args.target_kl))
    if found.document is None:
        sys.stdout.write(
            f"No max_error keeps the mean KL within {args.target_kl:g}: raise --target-kl, or give more --windows "
            f"for a narrower interval. {args.output} is not written; {path} keeps the measurements for the next run.\n"
        )
        return 1
    write_atomically(args.output, json.dumps(found.document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    journal.remove()
    if found.document["settings"]["max_error"] == LADDER[0]:
        sys.stdout.write("This is the largest candidate: a higher target would give the same settings.\n")
    sys.stdout.write(f"{_certificate(found.document)}\n{args.output}: rocketkv.patch(model, {str(args.output)!r})\n")
    return 0


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends stay, so that the text's hash is the file's
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error


def _table(candidates: list[dict[str, Any]], target: float) -> str:
    lines = [f"{'max_error':>9}  {'mean KL':>8}  {'95 % interval':>18}  {'of full bytes':>13}"]
    for row in candidates:
        low, high = row["interval"]
        verdict = "within" if high <= target else "above"
        lines.append(
            f"{row['max_error']:9g}  {row['mean_kl']:8.4f}  {f'{low:.4f} to {high:.4f}':>18}  "
            f"{row['stored_share']:13.2f}  {verdict}"
        )
    return "\n".join(lines) + "\n"


def _certificate(document: dict[str, Any]) -> str:
    held_out = document["certificate"]
    low, high = held_out["interval"]
    return (
        f"max_error={document['settings']['max_error']:g}, {held_out['windows']} held-out windows: mean KL "
        f"{held_out['mean_kl']:.4f} ({low:.4f} to {high:.4f}), {held_out['stored_share']:.2f} of a full cache's bytes. "
        f"{held_out['within_target']} windows are within {document['target_kl']:g}: with 95 % confidence, at least "
        f"{held_out['share_at_least']:.0%} of such windows are."
    )
