"""Keys as models have them, and the bits, types and shapes that a sketch is tested with."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, H, Hkv, D, N
    (1, 3, 3, 8, 37),
    (2, 6, 2, 16, 50),
    (2, 5, 1, 7, 64),
    (1, 14, 2, 12, 301),
    (1, 4, 2, 80, 33),
]


def some_keys(batch: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return keys as models have them: a mean far from zero, channels of other sizes, tokens of other lengths."""
    centre = 3 * torch.randn(1, kv_heads, 1, head_dim)
    spread = torch.rand(1, kv_heads, 1, head_dim) + 0.2
    length = torch.rand(batch, kv_heads, tokens, 1) + 0.5
    return (centre + spread * length * torch.randn(batch, kv_heads, tokens, head_dim)).to(dtype)


def some_queries(keys: Tensor) -> Tensor:
    """Return queries [B, Hkv, 4, D] float32 for keys [B, Hkv, N, D], with channels of other sizes; always the same."""
    batch, kv_heads, _, head_dim = keys.shape
    drawn = torch.Generator().manual_seed(head_dim)
    sizes = torch.rand(1, 1, 1, head_dim, generator=drawn).exp()
    return (sizes * torch.randn(1, 1, 4, head_dim, generator=drawn)).expand(batch, kv_heads, -1, -1).contiguous()


def no_queries(keys: Tensor) -> Tensor:
    """Return zeros in the place of queries: every channel of the keys counts alike."""
    return keys.new_zeros(*keys.shape[:2], 1, keys.shape[3], dtype=torch.float32)
