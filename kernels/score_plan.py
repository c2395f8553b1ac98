"""Constants and options of a decode step's first launch.

Letters: Hkv KV heads, G query heads a KV head, D head dim, Dv of values, P page size, r channels.
"""

import torch
import triton

from .append_sketch import code_words

TILE_PAGES = 128  # pages a tile of the index, also in rocketkv.core.pages; a test compares them
ROW_CHUNK = 64  # channels that append_score multiplies at once, if there are more than twice as many
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
    exact: bool,
    interpreted: bool,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return constants and options of `append_score`.

    Args:
        sizes: Hkv, G, D, Dv.
        blocks: G, D and Dv, padded to powers of two.
        page_size: P.
        ring: length of the query ring, 0 without one.
        rank_block: r, padded to a power of two.
        exact: whether products are of float32.
        interpreted: whether the kernel is, so that products of lower precision are of float32 too.
    """
    group_block, head_block, value_block = blocks
    if exact:
        chunk = 16  # products of float32 take more registers
    elif rank_block <= 2 * ROW_CHUNK and group_block <= 32:
        # All of them, if two blocks of the index fit beside the queries into the shared memory of every device: their
        # addresses are known before the loop, so that the next tile is loaded while one is multiplied.
        chunk = rank_block
    else:
        chunk = min(rank_block, ROW_CHUNK)
    constants = (
        *sizes, page_size, ring, TILE_PAGES, exact or interpreted, group_block, head_block, value_block, rank_block,
        chunk, min(head_block, RANK_BLOCK // head_block),
    )  # fmt: skip
    return constants, {"num_warps": 4 if group_block <= 32 else 8, "num_stages": 3 if chunk == rank_block else 5}


def sketch_launch(
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int, int],
    widths: tuple[int, ...],
    ring: int,
    exact: bool,
    itemsize: int,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return constants and options of `append_sketch`.

    Args:
        sizes: Hkv, G, D, Dv.
        blocks: G, D and Dv, padded to powers of two.
        widths: bits of the digits that a code is packed as.
        ring: length of the query ring, 0 without one.
        exact: whether queries are rotated in float32.
        itemsize: bytes of a number of the keys.
    """
    width, *higher = widths
    _, group, head_dim, _ = sizes
    head_block = blocks[1]
    constants = (
        *sizes, width, bool(higher), ring, TILE_PAGES, exact, SUBNORMALS, *blocks, code_words(head_dim, width),
        code_words(head_dim, 1) if higher else 1, max(8, min(HEAD_BLOCK, triton.next_power_of_2(group))),
        min(head_block, LINE_CHUNK if head_block * itemsize <= 256 else LINE_CHUNK // 2),
        TILE_PAGES if head_block <= 128 else TILE_PAGES // 2,
    )  # fmt: skip
    return constants, {"num_warps": 4, "num_stages": 5}
