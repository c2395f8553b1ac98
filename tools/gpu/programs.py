"""The programs that stages run, each by name; the last line of their output is JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rocketkv.eval.bench.kernel_cases import METHODS, TINY_LAYER, Case, LayerShape
from rocketkv.eval.checks import WrongResultError

LAYER, CASE = LayerShape(reserve=256), Case(2, 32768, 1024)
TINY, TINY_CASE = TINY_LAYER, Case(1, 128, 32)
NO_GPU = "{} runs on a GPU, and this machine has none that torch can use; --tiny runs it in Triton's interpreter\n"


def run(name: str, argv: Sequence[str]) -> int:
    """Run a program; returns the exit code, 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog=f"python tools/gpu {name}")
    if name != "one-step":
        parser.add_argument("method", choices=METHODS)
    if name in ("stress", "pages"):
        parser.add_argument("--case", type=Case.parse, help=f"batch, prompt and budget ({CASE})")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and counts, also without a GPU")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny:
        sys.stderr.write(NO_GPU.format(f"python tools/gpu {name}"))
        return 2
    try:
        with torch.inference_mode():
            result = _run(name, args)
    except WrongResultError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"program": name, **result}) + "\n")
    return 0


def _run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer, usual = (TINY, TINY_CASE) if args.tiny else (LAYER, CASE)
    if name == "one-step":
        from .one_step import one_step

        return one_step()
    if name == "capture":
        from .capture import capture

        return capture(args.method, device, dtype, tiny=args.tiny)
    from .stress import pages, stress

    case = args.case or usual
    if name == "stress":
        return stress(args.method, layer, case, dtype, device, 3 if args.tiny else 100_000)
    return pages(args.method, layer, case, dtype, device, 5 if args.tiny else 200)
