"""`rocketkv show`: a page of what a file of `rocketkv compress` keeps, and of what the steps of an answer read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import add_model_options, positive
from .ask import answer

if TYPE_CHECKING:
    from ..state.trace import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="file of `rocketkv compress`; it is only read")
    parser.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="a question about the text, in quotes: the page also has what the steps of its answer read and miss",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE", help="(default FILE.html)")
    add_model_options(parser)
    parser.add_argument(
        "--new-tokens", type=positive, default=32, metavar="N", help="longest answer, in tokens (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit code.

    Raises:
        OSError: there is no such file, or the page cannot be written.
        ValueError: the file is damaged, or is for another model, dtype or version.
    """
    from ..figures import token_texts, write_page
    from ..hf.files import load_inputs, load_positions
    from ..hf.loading import load_tokenizer
    from ..state.trace import Trace

    output = args.output or args.file.with_name(f"{args.file.name}.html")
    positions, config = load_positions(args.file)
    trace: Trace | None = None
    answered: list[tuple[str, str]] = []
    if args.question is None:
        tokenizer, ids = load_tokenizer(args.model, args.revision), load_inputs(args.file)["input_ids"]
        prompt = ids.shape[1]
    else:
        trace = Trace()
        tokenizer, ids, prompt = answer(args, on_step=trace)
        positions = trace.kept or positions
        text = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip()
        answered = [("Question", args.question), ("Answer", text)]
    kept = [int((places >= 0).sum(-1).max()) for places in positions.values()]
    facts = [
        ("Context", str(args.file)),
        ("Method", f"{config.method}, budget {config.token_budget}"),
        ("Tokens of the prompt", f"{prompt:,}"),
        ("Kept by a KV head", f"{min(kept):,} to {max(kept):,}" if min(kept) < max(kept) else f"{max(kept):,}"),
        *answered,
    ]
    write_page(output, positions, token_texts(tokenizer, ids), trace, facts=facts)
    sys.stdout.write(f"{output}\n")
    return 0
