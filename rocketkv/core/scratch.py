"""The size of scratch memory: how large a block of a computation is that would otherwise need one large tensor."""

import torch

# A core's cache holds a block of the CPU. A GPU takes longer to read a block of its own than to launch an operator on
# it, so larger blocks would save no time.
CPU_BYTES = 2**20
GPU_BYTES = 64 * 2**20


def block_bytes(device: torch.device) -> int:
    """Return the upper bound in bytes for the largest tensor of a block."""
    return CPU_BYTES if device.type == "cpu" else GPU_BYTES


def block_length(device: torch.device, item_bytes: int) -> int:
    """Return how many items of `item_bytes` a block has, at least 1."""
    return max(1, block_bytes(device) // item_bytes)
