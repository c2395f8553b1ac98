"""Constants and options of a decode step's first launch.

Letters: Hkv KV heads, G query heads a KV head, D head dim, Dv of values, P page size, r channels.
"""

import torch
import triton

from .append_sketch import code_words
from .decode_shape import TILE_PAGES
from .launches import Launch

RANK_BLOCK = 16384  # pairs of channels that append_score compares at once
LINE_CHUNK = 32  # rows of the rotation matrix that append_sketch multiplies at once
HEAD_BLOCK = 16  # heads whose rotated queries one program holds
SUBNORMALS = torch.version.hip is None  # whether matrix products take subnormal float16 as they are; an MI200's do not


def score_launch(
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int, int],
    page_size: int,
    ring: int,
    rank_block: int,
    cut: Launch,
    exact: bool,
    dependent: bool,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return constants and options of `append_score`.

    Args:
        sizes: Hkv, G, D, Dv.
        blocks: G, D and Dv, padded to powers of two.
        page_size: P.
        ring: length of the query ring, 0 without one.
        rank_block: r, padded to a power of two.
        cut: channels that are multiplied at once, at most; warps and stages.
        exact: whether products are of float32.
        dependent: whether the next kernel may start early.
    """
    group_block, head_block, value_block = blocks
    constants = (
        *sizes, page_size, ring, TILE_PAGES, exact, group_block, head_block, value_block, rank_block,
        min(cut.tile, rank_block), min(head_block, RANK_BLOCK // head_block), dependent,
    )  # fmt: skip
    return constants, {"num_warps": cut.warps, "num_stages": cut.stages}


def sketch_launch(
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int, int],
    widths: tuple[int, ...],
    ring: int,
    cut: Launch,
    exact: bool,
    itemsize: int,
    dependent: bool,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return constants and options of `append_sketch`.

    Args:
        sizes: Hkv, G, D, Dv.
        blocks: G, D and Dv, padded to powers of two.
        widths: bits of the digits that a code is packed as.
        ring: length of the query ring, 0 without one.
        cut: tokens that are scored at once; warps and stages.
        exact: whether queries are rotated in float32.
        itemsize: bytes of a number of the keys.
        dependent: whether the next kernel may start early.
    """
    width, *higher = widths
    _, group, head_dim, _ = sizes
    head_block = blocks[1]
    constants = (
        *sizes, width, bool(higher), ring, TILE_PAGES, exact, SUBNORMALS, *blocks, code_words(head_dim, width),
        code_words(head_dim, 1) if higher else 1, max(8, min(HEAD_BLOCK, triton.next_power_of_2(group))),
        min(head_block, LINE_CHUNK if head_block * itemsize <= 256 else LINE_CHUNK // 2),
        cut.tile, dependent,
    )  # fmt: skip
    return constants, {"num_warps": cut.warps, "num_stages": cut.stages}
