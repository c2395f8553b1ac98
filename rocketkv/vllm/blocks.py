"""Keys and values of a prompt, out of an engine's paged KV cache.

Letters: Hkv KV heads, D head dim, S tokens of the prompt, b tokens of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BlockOrder(NamedTuple):
    """Where the keys and values of a block of one KV head lie in its memory.

    Attributes:
        keys: [b * D] integers, the places of the keys, token by token.
        values: [b * D] integers, the places of the values.
    """

    keys: Tensor
    values: Tensor


def plain_order(block_size: int, head_dim: int) -> BlockOrder:
    """Return the order of vLLM's GPU backends: each token's key, then its value."""
    first = torch.arange(block_size)[:, None] * 2 * head_dim + torch.arange(head_dim)
    return BlockOrder(first.flatten(), (first + head_dim).flatten())


def found_order(write: Callable[[Tensor, Tensor, Tensor, Tensor], None], block_size: int, shape: Any) -> BlockOrder:
    """Find the order by writing numbers: vLLM's CPU kernels pack blocks by instruction set.

    Args:
        write: writes keys and values [b, 1, D] into a cache [1, 1, b, 2D], at slots [b].
        block_size: b.
        shape: the layer's `LayerShape`.

    Raises:
        ValueError: the cache does not hold every number once.
    """
    dim, dtype = shape.head_dim, shape.dtype
    count = block_size * dim
    digits = []
    for divisor in (1, 128, 128 * 128):  # 16-bit floats represent integers up to 256
        number = torch.arange(2 * count) // divisor % 128
        cache = torch.zeros(1, 1, block_size, 2 * dim, dtype=dtype)
        keys, values = number.to(dtype).view(2, block_size, 1, dim)
        write(keys, values, cache, torch.arange(block_size))
        digits.append(cache.view(-1).long() * divisor)
    written = sum(digits)
    place = torch.argsort(torch.as_tensor(written))
    if not torch.equal(torch.as_tensor(written)[place], torch.arange(2 * count)):
        raise ValueError(f"rocketkv: the layout of vLLM's KV cache blocks of {block_size} tokens is not known")
    return BlockOrder(place[:count], place[count:])


def read_packed(cache: Tensor, blocks: Tensor, tokens: int, order: BlockOrder) -> tuple[Tensor, Tensor]:
    """Return keys and values [1, Hkv, S, D] of a cache [blocks, Hkv, b, 2D].

    Args:
        cache: the paged KV cache.
        blocks: [ceil(S/b)] integers.
        tokens: S.
        order: the order within a block.
    """
    kv_heads, size = cache.shape[1], cache.shape[2]
    packed = cache.index_select(0, blocks.long()).flatten(2)  # [n, Hkv, 2bD]

    def unpacked(place: Tensor) -> Tensor:
        rows = packed.index_select(2, place).view(len(blocks), kv_heads, size, -1)
        return rows.transpose(0, 1).reshape(1, kv_heads, len(blocks) * size, -1)[:, :, :tokens].contiguous()

    return unpacked(order.keys), unpacked(order.values)
