"""The sketch index: score every stored token by the sketch of its key (`rocketkv.core.sketch`).

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, C code bytes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..budget import sketch_bytes
from .params import AttentionParams
from .sketch import (
    Sketch,
    block_tokens,
    build_sketch,
    code_bytes,
    grow_sketch,
    planes,
    rotation_matrix,
    rotation_norm,
    write_tokens,
)
from .topk import scalar


def score_sketch(query: Tensor, sketch: Sketch, bits: int, params: AttentionParams, *, stored: int) -> Tensor:
    """Estimate the logit of every stored token from its packed codes, in blocks of tokens.

    Args:
        query: [B, H, D].
        sketch: the sketch of the stored keys.
        bits: bits per channel, 1 to 4.
        params: the model's attention parameters; learned sinks change no logit.
        stored: N, tokens of the longest row.

    Returns:
        [B, H, N] float32; arbitrary at tokens beyond a row's length.
    """
    batch, heads, head_dim = query.shape
    kv_heads = sketch.mean.shape[1]
    rows = query.float().reshape(batch * heads, head_dim) * scalar(params.scaling)
    grouped = (batch * kv_heads, heads // kv_heads, -1)
    balanced = (rows.view(grouped) / sketch.balance.flatten(0, 1).unsqueeze(1)).flatten(0, 1)
    weight = torch.mm(balanced, _digit_rotation(head_dim, bits, query.device)).view(grouped)
    shift = torch.bmm(rows.view(grouped), sketch.mean.flatten(0, 1).unsqueeze(-1))
    codes, scales = sketch.codes.flatten(0, 1), sketch.scales.flatten(0, 1).unsqueeze(1)
    blocks = []
    block = block_tokens(sketch.mean.unsqueeze(2))
    for start in range(0, stored, block):
        count = min(block, stored - start)
        # With tokens last, multiplication saves more time than the transpose of the bytes costs.
        bytes_first = codes.narrow(1, start, count).transpose(1, 2).contiguous()
        product, column = weight.narrow(-1, weight.shape[-1] - 1, 1), 0
        for first, size, masks in _digits(head_dim, bits, query.device):
            # Digits keep their place values within the byte; the weights divide by them.
            digits = (bytes_first.narrow(1, first, size).unsqueeze(1) & masks).float().flatten(1, 2)
            product = torch.baddbmm(product, weight.narrow(-1, column, digits.shape[1]), digits)
            column += digits.shape[1]
        blocks.append(torch.addcmul(shift, product, scales.narrow(2, start, count).float()))
    logits = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)).view(batch, heads, stored)
    return logits if params.softcap is None else torch.tanh(logits / params.softcap) * params.softcap


@functools.cache
@torch.inference_mode(False)
def _digits(head_dim: int, bits: int, device: torch.device) -> tuple[tuple[int, int, Tensor], ...]:
    """Return the digits of packed codes: a plane's first byte, its number of bytes, and masks of digits [m, 1, 1].

    Each entry has half of a plane's digits: all of them, as floats, would be as large as the keys. Constants; uint8.
    """
    found, first = [], 0
    for _, width in planes(bits):
        size = -(-head_dim * width // 8)
        masks = torch.tensor([(2**width - 1) << place for place in range(0, 8, width)], device=device).byte()
        found += [(first, size, half.view(-1, 1, 1)) for half in masks.chunk(2)]
        first += size
    return tuple(found)


@functools.cache
@torch.inference_mode(False)
def _digit_rotation(head_dim: int, bits: int, device: torch.device) -> Tensor:
    """Return the matrix that maps queries to weights of `_digits`, [D, all digits' bytes + 1] float32; a constant.

    A digit's columns are the columns of R^T for its channels, over the digit's place value. The last column is minus
    the sum of R^T's columns times the middle of the codes.
    """
    rotation = rotation_matrix(head_dim, device).t() / rotation_norm(head_dim)
    parts = []
    for shift, width in planes(bits):
        size = -(-head_dim * width // 8)
        padded = functional.pad(rotation, (0, size * 8 // width - head_dim))
        pieces = torch.split(padded, size, -1)
        parts += [piece * 2.0 ** (shift - i * width) for i, piece in enumerate(pieces)]
    return torch.cat((*parts, rotation.sum(-1, keepdim=True) * -((2**bits - 1) / 2)), -1)


@dataclass(frozen=True)
class SketchIndex:
    """The sketch index: scores every token by the sketch of its key. See `TokenIndex`.

    The mean key and the balance of the compacted prompt stay fixed: a token's sketch depends on the token alone.
    """

    bits: int
    names: ClassVar[tuple[str, ...]] = Sketch._fields
    slotted: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def build(
        self, keys: Tensor, queries: Tensor, tokens: int, lengths: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        rotation = rotation_matrix(keys.shape[3], keys.device)
        return build_sketch(keys, tokens, rotation, self.bits, lengths, queries=queries)

    def grow(self, tensors: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        return grow_sketch(Sketch(*tensors), capacity)

    def append(self, tensors: Sequence[Tensor], keys: Tensor, lengths: Tensor, slot: int | None) -> None:
        """See `TokenIndex`."""
        rotation = rotation_matrix(keys.shape[3], keys.device)
        if slot is not None:
            write_tokens(Sketch(*tensors), keys.narrow(2, slot, 1), slot, rotation, self.bits)
            return
        last = (lengths.long() - 1).clamp(min=0)
        new = keys.gather(2, last[..., None, None].expand(-1, -1, 1, keys.shape[3]))
        write_tokens(Sketch(*tensors), new, last, rotation, self.bits)

    def rebuild(self, tensors: Sequence[Tensor], keys: Tensor, tokens: int) -> None:
        """See `TokenIndex`."""
        rotation = rotation_matrix(keys.shape[3], keys.device)
        write_tokens(Sketch(*tensors), keys[:, :, :tokens], 0, rotation, self.bits)

    def score(
        self,
        query: Tensor,
        tensors: Sequence[Tensor],
        keys: Tensor,
        params: AttentionParams,
        *,
        stored: int,
        lengths: Tensor | None,
    ) -> Tensor:
        """See `TokenIndex`."""
        return score_sketch(query, Sketch(*tensors), self.bits, params, stored=stored)

    def shape(self, name: str, capacity: int, head_dim: int) -> tuple[int, ...]:
        """See `TokenIndex`."""
        codes = (capacity, code_bytes(head_dim, self.bits))
        shapes = {"codes": codes, "scales": (capacity,), "mean": (head_dim,), "balance": (head_dim,)}
        return shapes[name]

    def row_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """See `TokenIndex`."""
        fixed = head_dim * (torch.float32.itemsize + torch.bfloat16.itemsize)
        return capacity * sketch_bytes(head_dim, self.bits) + fixed

    def read_bytes(self, stored: int, head_dim: int, itemsize: int, *, nominal: bool) -> int:
        """See `TokenIndex`."""
        mean = head_dim * (torch.bfloat16 if nominal else torch.float32).itemsize
        return stored * sketch_bytes(head_dim, self.bits) + mean + head_dim * torch.bfloat16.itemsize
