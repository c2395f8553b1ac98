"""`rocketkv bench attention | decode | kernels | tune | model`: decode speed against dense attention.

Results are checked before anything is timed.

`attention` times one layer's decode step against that of `rocketkv+` and PyTorch's attention over the full cache, with
the query heads as they are (`enable_gqa`) and with the heads of a group as rows, which is the strongest dense form on a
CPU, and a copy of the bytes that it reads. `decode` times whole decode steps of a model against `rocketkv+`, the stock
model, whose cache copies itself each step, dense attention over a preallocated cache (method `full`), `rocketkv` over
weights of 8 bits where asked for and, where it is installed, OpenVINO. `kernels` and `model` do the same on a GPU,
where `tune` tries launch configurations of the kernels.
"""

import argparse
import importlib
from pathlib import Path

from ...options import DTYPES, positive

# Module with `run(args)`, one line of help.
BENCHMARKS = {
    "attention": (".cpu", "decode step of one attention layer, on a CPU"),
    "decode": (".decode", "decode step of a whole model, on a CPU"),
    "kernels": (".kernels", "decode step of one attention layer, and its kernels, on a GPU"),
    "tune": (".tune", "launch configurations of the decode kernels, tried on a GPU and written to their table"),
    "model": (".model", "decode step of a model of 8B parameters, on a GPU"),
}
ROUNDS, STEPS = 7, 8
HEAD_DIMS = (64, 128)
SHAPES = ("llama-3.1-8b", "qwen3-8b")  # of `model_arms.SHAPES`, which needs torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks, each with its options."""
    commands = parser.add_subparsers(dest="benchmark", metavar=" | ".join(BENCHMARKS), required=True)
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in BENCHMARKS.items()}
    for name, command in parsers.items():
        command.add_argument(
            "--rounds", type=positive, default=ROUNDS, metavar="N", help="alternating rounds (default %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print one JSON document and no table")
        if name in ("attention", "decode"):
            _add_cpu_options(command, context=32768 if name == "attention" else None)
        elif name != "tune":
            _add_gpu_options(command)
    parsers["decode"].add_argument("--model", help="hub name or local folder (default: SmolLM2-135M-Instruct)")
    parsers["decode"].add_argument("--dtype", choices=DTYPES, default="float32", help="(default %(default)s)")
    parsers["decode"].add_argument(
        "--int8", action="store_true", help="add rocketkv over weights of 8 bits, compiled (needs torchao)"
    )
    parsers["decode"].add_argument(
        "--prompts", type=positive, default=1, metavar="N", help="needles that each arm looks for (default 1)"
    )
    parsers["kernels"].add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default %(default)s)")
    tune = parsers["tune"]
    tune.add_argument("--head-dims", type=positive, nargs="+", default=HEAD_DIMS, metavar="D", help="(default 64 128)")
    tune.add_argument("-o", "--output", type=Path, help="file of the table (default: the installed one)")
    parsers["model"].add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="(default %(default)s)")


def _add_cpu_options(parser: argparse.ArgumentParser, *, context: int | None) -> None:
    default = "8192 less the decoded tokens" if context is None else "%(default)s"
    parser.add_argument(
        "--context", type=positive, default=context, metavar="TOKENS", help=f"prompt length (default {default})"
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=256 if context is None else 1024,
        metavar="T",
        help="token budget (default %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=STEPS, metavar="N", help="decode steps a round (default %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="CPU threads (default %(default)s)")


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", help="BATCHxCONTEXT/BUDGET, separated by commas, as 1x8192/512,8x32768/1024")
    parser.add_argument("--quick", action="store_true", help="the small cases only")
    parser.add_argument("--check", action="store_true", help="the checks of every case at tiny sizes, without timing")


def run(args: argparse.Namespace) -> int:
    """Run a benchmark and print it; returns the exit code."""
    module = importlib.import_module(BENCHMARKS[args.benchmark][0], __package__)
    return int(module.run(args))
