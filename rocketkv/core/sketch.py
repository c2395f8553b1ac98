"""The sketch index of stage 2: every stored key in 1 to 4 bits per channel, so that each token has its own score.

Beyond the paper. The difference between a key and a mean key is rotated, which spreads it evenly over the channels.
Each channel is rounded to one of 2^bits equally spaced levels, the best ones for a Gaussian (J. Max, "Quantizing for
minimum distortion", 1960). A 16-bit scale per token makes the product of sketch and key exact, |x|^2 = <x, sketch>, so
that estimates have no bias over random rotations (RaBitQ, arXiv 2405.12497, section 3.2).

    sketch of key = mean + scale * (R^T (code - (2^bits - 1) / 2)) / balance
    logit         = scaling * (q . mean + scale * (R (q / balance)) . (code - (2^bits - 1) / 2))

After the rotation, the error of rounding is spread evenly over the channels. `balance` has a factor for each channel of
the difference, sqrt(rms of its queries / rms of its differences): of all factors, these have the least expected squared
error of a logit. In models with a few channels of very large keys, it is a small fraction of the error without them.

Mean and balance are fixed when the sketch is built. Every estimate includes the mean, so one softmax can mix estimates
and exact logits.

Results do not depend on the order of operations: differences are first rounded to integers of at most `grid`, and R's
entries are integers, so float32 represents all sums exactly. A token has the same bits whether it is encoded alone or
with thousands, by any library and on any device.

Layout: codes `[B, Hkv, N, C]` uint8, scales `[B, Hkv, N]` bfloat16, mean `[B, Hkv, D]` float32, balance `[B, Hkv, D]`
bfloat16. A token's C bytes are contiguous and independent of other tokens: growth, crop, fork and reorder work as for
the key buffer. Byte c has the channels c, c + C, c + 2C, ... in its digits, lowest first, so digit i of all bytes is a
contiguous range of channels. 3 bits are stored in two planes: the low two bits of all channels in ceil(D/4) bytes, then
the high bits in ceil(D/8).

A NaN or infinite key, or one whose scale overflows, has a logit that is not finite. If the mean includes such a key,
all logits of its row and KV head are not finite. A key equal to the mean has the scale 0 and an exact logit.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, k selected tokens, C code bytes.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..budget import sketch_bytes
from .balance import channel_balance, mean_key
from .params import AttentionParams
from .scratch import CPU_BYTES, GPU_BYTES
from .topk import full_precision, scalar

# Spacing of the equally spaced levels that fit a normal distribution best, by bits (Max 1960, table II).
LEVEL_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}


class Sketch(NamedTuple):
    """The sketch of a buffer of keys; written in place by `write_tokens`.

    Attributes:
        codes: [B, Hkv, N, C] uint8.
        scales: [B, Hkv, N] bfloat16.
        mean: [B, Hkv, D] float32.
        balance: [B, Hkv, D] bfloat16, at least 1.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor
    balance: Tensor


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """Return the bit planes of a packed code: the shift of each within the code, and its width in bits.

    Raises:
        ValueError: bits are not 1 to 4.
    """
    if bits not in LEVEL_STEP:
        raise ValueError(f"bits must be 1, 2, 3 or 4, got {bits}")
    return ((0, 2), (2, 1)) if bits == 3 else ((0, bits),)


def code_bytes(head_dim: int, bits: int) -> int:
    """Return C, the bytes of a token's packed codes."""
    return sum(-(-head_dim * width // 8) for _, width in planes(bits))


@functools.cache
@torch.inference_mode(False)
def _place_values(width: int, device: torch.device) -> Tensor:
    """Return the place values of a byte's digits of `width` bits, lowest first, [8 / width, 1] uint8; a constant."""
    return torch.tensor([[1 << place] for place in range(0, 8, width)], dtype=torch.uint8, device=device)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., D] uint8, each less than 2^bits, to [..., C] uint8."""
    head_dim = codes.shape[-1]
    packed = []
    for shift, width in planes(bits):
        size = -(-head_dim * width // 8)
        digits = codes if width == bits else (codes >> shift) & (2**width - 1)
        if size * 8 != head_dim * width:
            digits = functional.pad(digits, (0, size * 8 // width - head_dim))
        placed = digits.unflatten(-1, (8 // width, size)) * _place_values(width, codes.device)
        packed.append(placed.sum(-2, dtype=torch.uint8))
    return packed[0] if len(packed) == 1 else torch.cat(packed, -1)


def odd_part(head_dim: int) -> int:
    """Return the largest odd factor of D: 1 for a power of two."""
    return head_dim // (head_dim & -head_dim)


def rotation_norm(head_dim: int) -> float:
    """Return the length of a row of `rotation_matrix`."""
    return math.sqrt(odd_part(head_dim) * head_dim)


@functools.cache  # a constant
@torch.inference_mode(False)  # it may be used in a later call that is not in inference mode
def rotation_matrix(head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Return the rotation R times `rotation_norm`, [D, D] float32 with integer entries; do not write into it.

    Random signs, then the Kronecker product of a Hadamard matrix, of the largest power of two in D, and the reflection
    m I - 2 J, where m is the odd part of D; for m = 1 it is -1. The same for every call, version and device.
    """
    odd = odd_part(head_dim)
    matrix = odd * torch.eye(odd, dtype=torch.float32, device="cpu") - 2
    while matrix.shape[0] < head_dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    draw = random.Random(head_dim)  # its `random()` is the same in all versions of Python
    signs = [1.0 if draw.random() < 0.5 else -1.0 for _ in range(head_dim)]
    return (matrix * matrix.new_tensor(signs)).to(device)


def grid(head_dim: int) -> int:
    """Return the largest integer to which differences are rounded: a power of two, at most 256.

    The absolute values of a rotated vector sum to at most sqrt(m) D^1.5 times this integer. That sum times the largest
    level, 15 half steps, must be an integer that float32 represents. Integers up to 256 are exact even in bfloat16, so
    matrix multiplication in lower precision changes no bit.
    """
    most = 2**24 / (15 * head_dim * rotation_norm(head_dim))
    return min(256, 1 << max(0, math.floor(math.log2(most))))


@functools.cache  # constants
def encoding(head_dim: int, bits: int) -> tuple[int, float, float]:
    """Return the constants of `encode`.

    Returns:
        `grid`, `rotation_norm`, and the spacing of levels over the length of the integer difference.
    """
    return grid(head_dim), rotation_norm(head_dim), LEVEL_STEP[bits] * math.sqrt(odd_part(head_dim))


def encode(keys: Tensor, mean: Tensor, balance: Tensor, rotation: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes and the scales of keys; each token is encoded independently.

    Args:
        keys: [B, Hkv, n, D], any float dtype.
        mean: [B, Hkv, D] float32.
        balance: [B, Hkv, D], of `channel_balance`.
        rotation: [D, D], of `rotation_matrix(D)`.
        bits: bits per channel, 1 to 4.

    Returns:
        [B, Hkv, n, C] uint8 and [B, Hkv, n] bfloat16.
    """
    half = 2 ** (bits - 1)
    top, norm, spacing = encoding(keys.shape[-1], bits)
    difference = (keys.float() - mean.unsqueeze(2)).mul_(balance.float().unsqueeze(2))
    largest = difference.abs().amax(-1, keepdim=True)
    # NaN if the key is not finite, or equals the mean: 0 / 0.
    whole = difference.div_(largest).mul_(scalar(top)).round_().nan_to_num_(nan=0.0)
    with full_precision(keys.device):
        rotated = functional.linear(whole, rotation)
        square = torch.linalg.vecdot(whole, whole).unsqueeze(-1)
    # Levels count from the middle, a border of two. Only zero vectors have a square under 1: the largest is `top`.
    step = square.clamp_min(1).sqrt_().mul_(scalar(spacing))
    level = (rotated / step).floor_().clamp_(-half, half - 1).add_(scalar(0.5))
    product = rotated.mul_(level).sum(-1, keepdim=True)
    scale = square.mul_(scalar(norm / top)).div_(product.clamp_min_(0.5)).mul_(largest)
    return pack(level.add_(scalar(half - 0.5)).to(torch.uint8), bits), scale.squeeze(-1).to(torch.bfloat16)


def build_sketch(
    keys: Tensor,
    tokens: int,
    rotation: Tensor,
    bits: int,
    lengths: Tensor | None = None,
    *,
    queries: Tensor,
    write: Callable[..., None] | None = None,
) -> Sketch:
    """Build the sketch of the first `tokens` tokens, with room for the whole buffer.

    Args:
        keys: [B, Hkv, N, D], the buffer of stored keys.
        tokens: slots that the longest row fills.
        rotation: [D, D], of `rotation_matrix(D)`.
        bits: bits per channel, 1 to 4.
        lengths: [B, Hkv], tokens of each row, or None if all rows have `tokens`.
        queries: see `channel_balance`.
        write: a backend's `write_tokens`, or None for this module's.

    Returns:
        The sketch; zeros from `tokens` on.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    mean = mean_key(keys, tokens, lengths)
    sketch = Sketch(
        keys.new_zeros(batch, kv_heads, capacity, code_bytes(head_dim, bits), dtype=torch.uint8),
        keys.new_zeros(batch, kv_heads, capacity, dtype=torch.bfloat16),
        mean,
        channel_balance(queries, keys, mean, tokens, lengths),
    )
    (write or write_tokens)(sketch, keys[:, :, :tokens], 0, rotation, bits)
    return sketch


def _block_tokens(device: torch.device, token_bytes: int) -> int:
    """Return how many tokens a block of scratch memory has; here, so that a decode step passes through few files."""
    return max(1, (CPU_BYTES if device.type == "cpu" else GPU_BYTES) // token_bytes)


def write_tokens(sketch: Sketch, keys: Tensor, start: int | Tensor, rotation: Tensor, bits: int) -> None:
    """Write the sketch of consecutive tokens in place, from slot `start` on; no host sync.

    Args:
        sketch: the sketch of the buffer, with room for the tokens.
        keys: [B, Hkv, n, D], the tokens.
        start: slot of the first token, one for all rows, or [B, Hkv] (an integer dtype).
        rotation: [D, D], of `rotation_matrix(D)`.
        bits: bits per channel, 1 to 4.
    """
    batch, kv_heads, count, head_dim = keys.shape
    block = _block_tokens(keys.device, 4 * batch * kv_heads * head_dim)
    for first in range(0, count, block):
        last = min(first + block, count)
        codes, scales = encode(keys[:, :, first:last], sketch.mean, sketch.balance, rotation, bits)
        if isinstance(start, int):
            sketch.codes.narrow(2, start + first, last - first).copy_(codes)
            sketch.scales.narrow(2, start + first, last - first).copy_(scales)
        else:
            place = start.long()[..., None] + torch.arange(first, last, device=keys.device)
            sketch.codes.scatter_(2, place[..., None].expand_as(codes), codes)
            sketch.scales.scatter_(2, place, scales)


def grow_sketch(sketch: Sketch, capacity: int) -> Sketch:
    """Return the sketch with room for `capacity` tokens: itself, or a larger copy with zeros at the end."""
    missing = capacity - sketch.codes.shape[2]
    if missing <= 0:
        return sketch
    codes, scales = functional.pad(sketch.codes, (0, 0, 0, missing)), functional.pad(sketch.scales, (0, missing))
    return sketch._replace(codes=codes, scales=scales)


def score_sketch(query: Tensor, sketch: Sketch, bits: int, params: AttentionParams, *, stored: int) -> Tensor:
    """Estimate the logit of every stored token from its packed codes, in blocks of tokens.

    Args:
        query: [B, H, D], or [B, n H, D] in a verify step of n queries (`rocketkv.core.verify`).
        sketch: the sketch of the stored keys.
        bits: bits per channel, 1 to 4.
        params: the model's attention parameters; learned sinks change no logit.
        stored: N, tokens of the longest row.

    Returns:
        [B, H, N], or [B, n H, N], float32; arbitrary at tokens beyond a row's length.
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
    block = _block_tokens(query.device, 4 * sketch.mean.numel())
    for start in range(0, stored, block):
        count = min(block, stored - start)
        # With tokens last, multiplication saves more time than the transpose of the bytes costs.
        bytes_first = codes.narrow(1, start, count).transpose(1, 2).contiguous()
        product, column = weight.narrow(-1, weight.shape[-1] - 1, 1), 0
        for first, size, masks in _digits(head_dim, bits, query.device):
            # Digits keep their place values within the byte; the weights divide by them.
            digits = (bytes_first.narrow(1, first, size).unsqueeze(1) & masks).float().flatten(1, 2)
            own = weight.narrow(-1, column, digits.shape[1])
            product = torch.baddbmm(product, own, digits) if column == 0 else product.baddbmm_(own, digits)
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
        self,
        keys: Tensor,
        queries: Tensor,
        tokens: int,
        lengths: Tensor | None,
        dtype: torch.dtype | None,
        write_sketch: Callable[..., None] | None = None,
    ) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        rotation = rotation_matrix(keys.shape[3], keys.device)
        return build_sketch(keys, tokens, rotation, self.bits, lengths, queries=queries, write=write_sketch)

    def grow(self, tensors: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
        """See `TokenIndex`."""
        return grow_sketch(Sketch(*tensors), capacity)

    def append(
        self, tensors: Sequence[Tensor], keys: Tensor, lengths: Tensor, slot: int | None, count: int = 1
    ) -> None:
        """See `TokenIndex`."""
        rotation = rotation_matrix(keys.shape[3], keys.device)
        if slot is not None:
            write_tokens(Sketch(*tensors), keys.narrow(2, slot, count), slot, rotation, self.bits)
            return
        first = (lengths.long() - count).clamp(min=0)
        place = first[..., None]
        if count > 1:
            place = place + torch.arange(count, device=keys.device)
        new = keys.gather(2, place[..., None].expand(-1, -1, -1, keys.shape[3]))
        write_tokens(Sketch(*tensors), new, first, rotation, self.bits)

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
