"""`rocketkv bench tune`: try launch configurations of the decode kernels on a GPU, and write the best to their table.

Each kernel is timed alone, in the steps of `rocketkv` and `rocketkv+` with 16-bit keys, as `rocketkv bench kernels`
does: captured, over sets of buffers that are larger together than the L2 cache, in rounds that alternate with the
default. A configuration counts only if it compiles, fits, and steps with it pass the checks. Cases whose rows have
equally many pages, padded to a power of two, share an entry: the configuration of the least product of their times over
the default's. The table gets an entry where that saves more than 2 %; entries of other architectures stay.

The last line is JSON: `device`, `versions`, `rounds`, `table` (the file), and for each of `entries`: kernel,
architecture, head_dim, value_dim, itemsize, pages, `cases`, `default` and `launch` (tile, warps, stages), `saved`
(share of the time), `tried` (configurations) and `refused` (those that do not count, and why).
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch

from ...kernels.launches import TABLE
from .gpu_run import report

NO_GPU = "rocketkv bench tune tries launch configurations on a GPU, and this machine has none that torch can use"


def run(args: argparse.Namespace) -> int:
    """Tune and write the table; returns the exit code."""
    if not torch.cuda.is_available():
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    try:
        from .launch_trials import tune
    except ImportError as error:
        sys.stderr.write(f"rocketkv bench tune: the kernels need the triton package ({error})\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    return report(args, partial(tune, args.head_dims, device, rounds=args.rounds, path=args.output or TABLE), table)


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [f"{result['device']['name']}; written to {result['table']}"]
    for one in result["entries"]:
        cut = "tile {tile}, warps {warps}, stages {stages}"
        chosen = cut.format(**one["launch"]) if one["launch"] != one["default"] else "the default"
        lines.append(
            f"{one['kernel']}, head dim {one['head_dim']}, {one['pages']} pages: {chosen}, saves {one['saved']:.1%} of "
            f"{cut.format(**one['default'])}; {one['tried']} tried, {len(one['refused'])} refused"
        )
    return "\n".join(lines)
