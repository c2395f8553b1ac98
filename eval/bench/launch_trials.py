"""Trials of launch configurations: what is tried, how it is timed, and which enters the table (see `tune`).

Letters: D head dim of keys and values.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ...kernels.launches import Launch, LaunchKey, default_launch, read_devices, read_table, table_of
from ..checks import WrongResultError
from ..progress import Progress
from ..records import write_atomically
from . import gpu_timing
from .kernel_arms import DecodeStep
from .kernel_cases import METHODS, Case, CaseBuffers, LayerShape, kernel_name

CASES = (Case(1, 8192, 512), Case(1, 32768, 1024), Case(1, 131072, 1024), Case(8, 32768, 1024))
KERNELS_OF = {METHODS[0]: ("append_score", "select_attend"), METHODS[1]: ("append_sketch", "select_attend")}
# By kernel: tiles, warps and stages, of which all combinations are tried.
TRIED = {
    "append_score": ((16, 64, 128), (4, 8), (3, 5)),
    "append_sketch": ((64, 128, 256), (4, 8), (3, 5)),
    "select_attend": ((16, 32, 64), (4, 8, 16), (3, 5)),
}
LEAST_SAVED = 0.02


@dataclass
class Trials:
    """The configurations of one entry that have been tried.

    Attributes:
        default: the configuration that they are compared with.
        cases: that share the entry.
        ratios: of each configuration's median time over the default's, by case.
        refused: why a configuration does not count.
    """

    default: Launch
    cases: list[str] = field(default_factory=list)
    ratios: dict[Launch, list[float]] = field(default_factory=dict)
    refused: dict[Launch, str] = field(default_factory=dict)

    def best(self) -> tuple[Launch, float]:
        """Return the best configuration and the share of the default's time that it saves, 0 for the default."""
        means = {
            launch: math.exp(sum(map(math.log, ratios)) / len(ratios))
            for launch, ratios in self.ratios.items()
            if launch not in self.refused and len(ratios) == len(self.cases)
        }
        launch = min(means, key=means.__getitem__, default=self.default)
        saved = 1 - means.get(launch, 1.0)
        return (launch, saved) if saved > LEAST_SAVED else (self.default, 0.0)


def tune(
    head_dims: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    path: Path,
    cases: Sequence[Case] = CASES,
    layer: LayerShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Try configurations and write the table.

    Args:
        head_dims: each D to tune for.
        device: a GPU.
        rounds: of alternating measurements, at least five.
        path: file of the table.
        cases: batches, prompts and budgets to tune for.
        layer: heads of the layer, by default Llama-3.1-8B's.
        dtype: of queries, keys and values.

    Raises:
        ValueError: there are too few rounds, or the file is no table.
        WrongResultError: a step with the default configuration is wrong.
    """
    gpu_timing.require_rounds(rounds)
    entries, devices = (read_table(path), read_devices(path)) if path.exists() else ({}, {})
    trials: dict[LaunchKey, Trials] = {}
    with Progress("tuning", total=len(head_dims) * len(cases)) as progress:
        for head_dim, case in itertools.product(head_dims, cases):
            progress.say(f"case {case}, head dim {head_dim}")
            shape = replace(layer or LayerShape(), head_dim=head_dim)
            _try_case(CaseBuffers(case, shape, dtype, device, gpu_timing.cache_bytes(device)), rounds, trials)
            progress.step()
    found = []
    for key, tried in trials.items():
        launch, saved = tried.best()
        entries.pop(key, None)
        if launch != tried.default:
            entries[key] = launch
        found.append(
            {
                **asdict(key),
                "cases": tried.cases,
                "default": asdict(tried.default),
                "launch": asdict(launch),
                "saved": saved,
                "tried": len(tried.ratios),
                "refused": [{**asdict(one), "reason": reason} for one, reason in tried.refused.items()],
            }
        )
    card = gpu_timing.card(device)
    devices |= {key.architecture: card for key in trials}
    write_atomically(path, table_of(entries, devices))
    return {"bench": "tune", **card, "rounds": rounds, "table": str(path), "entries": found}


def key_of(step: DecodeStep, kernel: str) -> LaunchKey:
    """Return what an entry of a kernel in this step is for."""
    space, buffers = step.workspace, step.buffers
    return LaunchKey(kernel, space.architecture or buffers.device.type, **space.sizes(kernel, buffers.dtype.itemsize))


def _try_case(buffers: CaseBuffers, rounds: int, trials: dict[LaunchKey, Trials]) -> None:
    """Try the configurations of every kernel in the steps of a case."""
    for method, kernels in KERNELS_OF.items():
        step = DecodeStep(buffers, method)
        for kernel in kernels:
            _try_all(step, kernel, rounds, trials)


def _try_all(step: DecodeStep, kernel: str, rounds: int, trials: dict[LaunchKey, Trials]) -> None:
    """Time a kernel with its default and every configuration, in alternating rounds, and note the ratios."""
    key = key_of(step, kernel)
    space, sizes = step.workspace, step.workspace.sizes(kernel, step.buffers.dtype.itemsize)
    blocks = {"group": space.group_block, "channels": space.rank_block}
    default = default_launch(kernel, **sizes, **blocks, exact=False)
    tried = trials.setdefault(key, Trials(default))
    tried.cases.append(f"{step.stores.method} {step.buffers.case}")
    ready = {default: captured(step, kernel, default)}
    for launch in (Launch(*cut) for cut in itertools.product(*TRIED[kernel])):
        if launch == default or launch in tried.refused:
            continue
        made = _unless_refused(step, kernel, launch)
        if isinstance(made, str):
            tried.refused[launch] = made
        else:
            ready[launch] = made
    space.force(kernel, None)
    named = {str(number): measure for number, measure in enumerate(ready.values())}
    seconds = gpu_timing.alternate(named, rounds)
    for launch, times in zip(ready, seconds.values(), strict=True):
        ratio = gpu_timing.ratios(times, seconds["0"])["median"]
        tried.ratios.setdefault(launch, []).append(ratio)


def _unless_refused(step: DecodeStep, kernel: str, launch: Launch) -> Callable[[], float] | str:
    """Return a function that times a configuration, or why it does not count."""
    try:
        return captured(step, kernel, launch)
    except (OutOfResources, WrongResultError, RuntimeError, ValueError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def captured(step: DecodeStep, kernel: str, launch: Launch) -> Callable[[], float]:
    """Capture a kernel alone with a configuration, after a check of whole steps; return what times it in seconds.

    Raises:
        WrongResultError: a step with it is wrong.
    """
    step.workspace.force(kernel, launch)
    step.check()
    name = kernel_name(step.stores.method, kernel)
    arm = next(arm for arm in step.kernel_arms() if arm.name == name)
    return partial(gpu_timing.seconds_of, gpu_timing.capture(arm))
