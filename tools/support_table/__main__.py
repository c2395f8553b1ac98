"""`python tools/support_table`: write docs/models.md, the table of supported models, for the installed transformers.

Each model is checked in a process of its own with a time limit. `python tools/support_table llama qwen3 ...` prints the
rows of some model types and writes nothing. For the rows of quantized weights:
`pip install bitsandbytes torchao optimum-quanto`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# Python puts the program's folder first on the path: its package and what the tests share take the place.
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(_ROOT / "tools"), str(_ROOT / "tests" / "helpers")]
os.environ["ROCKETKV_BACKEND"] = "torch"

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

from support_table.check import Row, check_class  # noqa: E402
from support_table.quantized import SCHEMES, check_scheme  # noqa: E402
from support_table.table import PAGE, page  # noqa: E402

CAUSAL: dict[str, str] = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION: dict[str, str] = dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
SECONDS = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Check models, and write the page or print rows; returns the exit code, 1 where a model fails."""
    parser = argparse.ArgumentParser(prog="python tools/support_table", description="Write docs/models.md.")
    parser.add_argument(
        "model_types", nargs="*", metavar="TYPE", help="model types to print; by default all are written"
    )
    chosen = parser.parse_args(argv).model_types
    if unknown := sorted(set(chosen) - CAUSAL.keys() - VISION.keys()):
        parser.error(f"transformers {transformers.__version__} has no causal model of the type {', '.join(unknown)}")
    logging.disable(logging.WARNING)  # models warn of tiny configurations

    def rows(kinds: dict[str, str], *, decoder: bool) -> dict[str, Row]:
        picked = sorted(name for name in kinds if not chosen or name in chosen)
        return {name: apart(check_class, kinds[name], name, decoder=decoder) for name in picked}

    causal, vision = rows(CAUSAL, decoder=True), rows(VISION, decoder=False)
    quantized = [] if chosen else [apart(check_scheme, name) for name in SCHEMES]
    if not chosen:
        versions = f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
        PAGE.write_text(page(causal, vision, quantized, versions), encoding="utf-8")
    return int(any(row.result == "fails" for row in (*causal.values(), *vision.values(), *quantized)))


def apart(check: Callable[..., Row], kind: str, *args: str, **kwargs: bool) -> Row:
    """Make a row in a child process, print and return it."""
    context = multiprocessing.get_context("fork")  # to import all again would take ten times as long as a row
    here, there = context.Pipe()
    child = context.Process(target=_send, args=(there, check, kind, *args), kwargs=kwargs)
    child.start()
    there.close()
    try:
        row: Row = here.recv() if here.poll(SECONDS) else Row(kind, "not built", note=f"it took over {SECONDS} seconds")
    except EOFError:
        row = Row(kind, "not built", note="its process ended")
    child.kill()
    child.join()
    print(" ".join((*args, *map(str, vars(row).values()))), flush=True)
    return row


def _send(there: Connection, check: Callable[..., Row], *args: str, **kwargs: bool) -> None:
    """Check a model in the child process."""
    torch.set_num_threads(1)
    there.send(check(*args, **kwargs))
    there.close()


if __name__ == "__main__":
    sys.exit(main())
