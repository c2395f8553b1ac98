"""What each part of `rocketkv+` is worth at equal bytes read: `python -m studies ablation -o FOLDER`.

The folder gets `ablation.json` and `ablation.md`, and a journal, from which an interrupted run goes on. `--joined 2`
measures attention errors alone, on heads of twice the width that are made of the model's own. `--multi-query` measures
all, on layers of the same functions with one KV head, which is as wide as the layer's together.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rocketkv.eval.progress import Progress
from rocketkv.eval.records import write_atomically
from rocketkv.hf.loading import SMOLLM2, load_model

from .arms import ARMS, BY_NAME
from .capture import Settings
from .report import document, tables
from .run import measure
from .texts import file_texts, four_texts


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    found = argparse.ArgumentParser(prog="python -m studies ablation", description=__doc__.splitlines()[0])
    found.add_argument("--model", help="hub name or folder (default: SmolLM2-135M-Instruct)")
    found.add_argument("--texts", type=Path, nargs="+", metavar="FILE", help="in UTF-8 (default: four made offline)")
    found.add_argument("--prompt", type=int, default=4096, metavar="TOKENS", help="of a prompt (default %(default)s)")
    found.add_argument("--steps", type=int, default=64, help="teacher-forced after it (default %(default)s)")
    found.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 128, 256, 512], metavar="T", help="in tokens (64 to 512)"
    )
    found.add_argument("--arms", nargs="+", default=list(BY_NAME), metavar="NAME", help="some of the arms (all)")
    found.add_argument("--joined", type=int, default=1, metavar="N", help="errors alone, of heads made of N KV heads")
    found.add_argument("--multi-query", action="store_true", help="one wide KV head a layer, of the same function")
    found.add_argument("--seed", type=int, default=0, help="of the texts (default %(default)s)")
    found.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    found.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="of all files; also to go on")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure what the folder's journal does not have, and write document and tables; returns the exit code.

    Raises:
        OSError: a text cannot be read, or a file not written.
        ValueError: an arm is unknown, a setting impossible, or a text too short.
    """
    unknown = [name for name in args.arms if name not in BY_NAME]
    if unknown:
        raise ValueError(f"there are no arms {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    settings = Settings(
        model=args.model or SMOLLM2,
        prompt=args.prompt,
        steps=args.steps,
        seed=args.seed,
        joined=args.joined,
        multi_query=args.multi_query,
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    piped = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with Progress("loading the model", total=1), piped:  # bars of transformers where output is piped
        model, tokenizer = load_model(args.model)
    length = settings.prompt + settings.steps
    if args.texts:
        windows = file_texts(tokenizer, args.texts, length, settings.seed)
    else:
        windows = four_texts(tokenizer, length, settings.seed)
    arms = [arm for arm in ARMS if arm.name in args.arms]
    with Progress("beginning", total=len(arms) * len(args.budgets)) as progress:
        records = measure(model, windows, settings, arms, args.budgets, args.output, progress)
    result = document(settings, windows, records)
    write_atomically(args.output / "ablation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(args.output / "ablation.md", tables(result))
    sys.stdout.write(tables(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for input that it refuses."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"ablation: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
