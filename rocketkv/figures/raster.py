"""A matrix of levels as an image, in PNG and as a data URL.

plotly's heat maps are not in the bundle that pages embed, and would hold a number for every token of every head.
"""

import base64
import struct
import zlib

import torch
from torch import Tensor

LEVELS = 9
COLOR = (0, 114, 178)
LEAST_SIDE = 600  # pixels: smaller images are enlarged here, for a browser would blur them


def alpha(level: int) -> float:
    """Return the opacity of a level, 0 to `LEVELS`."""
    return 0.0 if level == 0 else 0.12 + 0.88 * (level - 1) / (LEVELS - 1)


def data_url(levels: Tensor) -> str:
    """Return an image of a matrix: transparent at 0, opaque at `LEVELS`.

    Args:
        levels: [rows, columns] integers from 0 to `LEVELS`.
    """
    enlarged = levels.to(torch.uint8)
    for axis in (0, 1):
        times = -(-LEAST_SIDE // enlarged.shape[axis])
        enlarged = enlarged.repeat_interleave(times, dim=axis)
    rows, columns = enlarged.shape
    raw = torch.nn.functional.pad(enlarged, (1, 0))  # each row begins with its filter: none
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(COLOR) * (LEVELS + 1)),
        (b"tRNS", bytes(round(255 * alpha(level)) for level in range(LEVELS + 1))),
        (b"IDAT", zlib.compress(raw.numpy().tobytes(), 9)),
        (b"IEND", b""),
    )
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()
