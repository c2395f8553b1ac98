"""The cut of a decode step's second launch: blocks, warps, stages, and the tree of a choice by several programs.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, P page size, k tokens read.
"""

from dataclasses import dataclass

import triton

TOKEN_BLOCK = 32  # tokens whose keys and values select_attend loads at once, half of them where they are wide
SELECT_BLOCKS = (4096, 8192)  # pages that one of several programs chooses among
SHARED_MEMORY = 96 * 1024  # bytes that a program may take on every device, less what the compiler adds


@dataclass(frozen=True)
class SelectTree:
    """A tree of programs that select a row's tokens together.

    Attributes:
        block: pages that a program chooses among.
        chunks: programs of a row, the leaves of the tree.
        slots: candidates that a node may leave; a power of two.
    """

    block: int
    chunks: int
    slots: int

    @property
    def fan(self) -> int:
        """Children of a node: as many as leave no more candidates than a block."""
        return min(self.block // self.slots, int(triton.next_power_of_2(self.chunks)))

    @property
    def nodes_above(self) -> int:
        """Nodes above the leaves."""
        count, nodes = 0, self.chunks
        while nodes > 1 or not count:
            nodes = -(-nodes // self.fan)
            count += nodes
        return count


def select_tree(page_capacity: int, top_k: int, page_size: int) -> SelectTree | None:
    """Return the tree of the smallest block of four nodes' candidates or more, or None where two fill the largest.

    Args:
        page_capacity: pages of a row's buffers.
        top_k: k.
        page_size: P.
    """
    # Whole pages, the page that the cut falls in, and the row's last one.
    most = top_k if page_size == 1 else triton.cdiv(top_k, page_size) + 1
    slots = max(16, triton.next_power_of_2(most))
    for block in SELECT_BLOCKS:
        if 4 * slots <= block or (block == SELECT_BLOCKS[-1] and 2 * slots <= block):
            return SelectTree(block, triton.cdiv(page_capacity, block), slots)
    return None


def attend_warps(page_block: int, group_block: int, exact: bool) -> int:
    """Return the warps of a program that holds the weights of so many pages, and the sums of a padded group."""
    # As many registers as the weights of all pages take, or the float32 sums of a large group.
    warps = 4 if max(page_block, 16 * group_block) <= 1024 else 8
    if page_block >= 8192 or (exact and group_block > 32):
        warps = 16
    return warps


def attend_stages(group_block: int, token_block: int, head_block: int, value_block: int, itemsize: int) -> int:
    """Return the stages of the loop over keys and values: two buffers of each in flight, where they fit.

    The list of tokens comes two stages ahead of them. Buffers lie beside the queries in the shared memory that every
    device has.
    """
    queries = group_block * (head_block * itemsize + 4 * token_block)
    buffers = 2 * token_block * (head_block + value_block) * itemsize
    return 5 if queries + buffers <= SHARED_MEMORY else 2


def parts_at_once(part_block: int, floats: int, warps: int) -> int:
    """Return how many parts' sums, of so many floats each, are loaded at once to be combined: 32 floats a thread."""
    at_once = max(1, 32 * 32 * warps // floats)
    return min(part_block, at_once)
