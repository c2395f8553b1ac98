"""The keys that a sketch stands for: for tests, checks and studies. No decode step needs them.

Letters: B batch, Hkv KV heads, D head dim, N stored tokens, C code bytes.
"""

import torch
from torch import Tensor

from .sketch import Sketch, planes, rotation_norm


def unpack(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Return the codes [..., D] uint8 that `pack` packed to [..., C]."""
    planar = []
    start = 0
    for shift, width in planes(bits):
        size = -(-head_dim * width // 8)
        plane = packed[..., start : start + size]
        middle = [(plane >> place) & (2**width - 1) for place in range(width, 8 - width, width)]
        digits = torch.cat((plane & (2**width - 1), *middle, plane >> (8 - width)), -1)[..., :head_dim]
        planar.append(digits << shift if shift else digits)
        start += size
    return planar[0] if len(planar) == 1 else planar[0] | planar[1]


def decode(sketch: Sketch, tokens: int, rotation: Tensor, bits: int) -> Tensor:
    """Return the keys [B, Hkv, tokens, D] float32 whose exact logits are the estimates of the sketch."""
    head_dim = sketch.mean.shape[-1]
    level = unpack(sketch.codes[:, :, :tokens], bits, head_dim).float() - (2**bits - 1) / 2
    difference = torch.matmul(level, rotation) / rotation_norm(head_dim)
    difference = difference * sketch.scales[:, :, :tokens, None].float() / sketch.balance[:, :, None].float()
    return sketch.mean[:, :, None] + difference
