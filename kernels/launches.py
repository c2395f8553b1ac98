"""Tiles, warps and stages of the kernels of a decode step, by architecture, head dims, dtype and pages.

`launches.json` has what `rocketkv bench tune` found to be faster on a device than the defaults here, which come from
compiled code: registers, shared memory and buffers (`make kernels-report`).

Not `triton.autotune`: it runs a kernel many times at its first launch, but a decode step raises lengths and counts
arrivals, so each run would be another step; it cannot run while a CUDA graph is captured; and a user's first token
would wait for it.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .select_plan import TOKEN_BLOCK, attend_stages, attend_warps

TABLE = Path(__file__).with_name("launches.json")


@dataclass(frozen=True)
class Launch:
    """Tile, warps and stages of a kernel's launch.

    Attributes:
        tile: what a pass of its main loop takes, a power of two: channels of `append_score`, tokens of `append_sketch`
            (which it scores) and of `select_attend` (which it reads).
        warps: of a program.
        stages: of the loop's software pipeline.
    """

    tile: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LaunchKey:
    """Key of an entry of the table.

    Attributes:
        kernel: `append_score`, `append_sketch` or `select_attend`.
        architecture: as `architecture_of` returns it.
        head_dim: D, padded to a power of two.
        value_dim: Dv, padded to a power of two.
        itemsize: bytes of an element of the keys.
        pages: of a row, padded to a power of two; of a sketch, tokens.
    """

    kernel: str
    architecture: str
    head_dim: int
    value_dim: int
    itemsize: int
    pages: int


KERNELS = ("append_score", "append_sketch", "select_attend")


def default_launch(
    kernel: str, *, head_dim: int, itemsize: int, pages: int, group: int, value_dim: int, channels: int, exact: bool
) -> Launch:
    """Return a kernel's launch where the table has none.

    Args:
        kernel: one of `KERNELS`.
        head_dim: D, padded to a power of two.
        itemsize: bytes of an element of the keys.
        pages: of a row, padded to a power of two, where the kernel holds their weights in registers, else 1.
        group: G, padded to a power of two, at least 16.
        value_dim: Dv, padded to a power of two.
        channels: r, padded to a power of two.
        exact: whether products are float32's.

    Raises:
        ValueError: there is no such kernel.
    """
    if kernel == "append_score":
        # All channels, if two blocks of the index fit beside the queries into the shared memory of every device: their
        # addresses are known before the loop, so that the next tile is loaded while one is multiplied. Otherwise the
        # list of channels comes two stages ahead. Products of float32 take more registers.
        tile = 128 if channels <= 128 and group <= 32 else 64
        tile = 16 if exact else tile
        # The float32 sums of more than 32 heads and 128 pages do not fit the registers of 4 warps.
        return Launch(tile=tile, warps=4 if group <= 32 else 8, stages=3 if tile >= channels else 5)
    if kernel == "append_sketch":
        # As digits, 128 tokens of more than 128 channels spill. With 4 stages sm_100 spills.
        return Launch(tile=128 if head_dim <= 128 else 64, warps=4, stages=5)
    if kernel == "select_attend":
        tile = TOKEN_BLOCK // 2 if head_dim * itemsize > 512 else TOKEN_BLOCK
        stages = attend_stages(group, tile, head_dim, value_dim, itemsize)
        return Launch(tile=tile, warps=attend_warps(pages, group, exact), stages=stages)
    raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")


def read_table(path: Path = TABLE) -> dict[LaunchKey, Launch]:
    """Return the entries of a table.

    Raises:
        ValueError: the file is no table of launches.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {LaunchKey(**entry["for"]): Launch(**entry["launch"]) for entry in document["entries"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of launches ({error}); `rocketkv bench tune` writes one") from error


def read_devices(path: Path = TABLE) -> dict[str, Any]:
    """Return the device and versions that a table's entries were measured with, by architecture."""
    devices: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["devices"]
    return devices


def table_of(entries: dict[LaunchKey, Launch], devices: dict[str, Any]) -> str:
    """Return a table as the text of its file, an entry a line.

    Args:
        entries: all of them.
        devices: by architecture, the device and the versions that its entries were measured with.
    """
    rows = [
        json.dumps({"for": asdict(key), "launch": asdict(launch)})
        for key, launch in sorted(entries.items(), key=lambda item: str(item[0]))
    ]
    lines = "".join(f"\n {row}," for row in rows).removesuffix(",")
    return f'{{"devices": {json.dumps(devices)}, "entries": [{lines}]}}\n'


_installed = functools.cache(read_table)  # constant for an installation


@functools.cache
def launch_of(
    kernel: str,
    architecture: str | None,
    *,
    head_dim: int,
    itemsize: int,
    pages: int,
    group: int,
    value_dim: int,
    channels: int,
    exact: bool,
) -> Launch:
    """Return how a kernel is launched: the table's entry for 16-bit products of a usual group, or the default.

    Args:
        kernel: one of `KERNELS`.
        architecture: of the device, or None where it is unknown.
        head_dim: D, padded to a power of two.
        itemsize: bytes of an element of the keys.
        pages: of a row, padded to a power of two.
        group: G, padded to a power of two, at least 16.
        value_dim: Dv, padded to a power of two.
        channels: r, padded to a power of two.
        exact: whether products are float32's.
    """
    if architecture is not None and group == 16 and not exact:
        tuned = _installed().get(LaunchKey(kernel, architecture, head_dim, value_dim, itemsize, pages))
        if tuned is not None:
            return tuned
    sizes = {"head_dim": head_dim, "itemsize": itemsize, "pages": pages, "group": group, "value_dim": value_dim}
    return default_launch(kernel, **sizes, channels=channels, exact=exact)


@functools.cache
def architecture_of(device: torch.device) -> str | None:
    """Return a GPU's architecture as compilers name it, `sm_90` or `gfx942`, or None for other devices."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
