"""Max-pooling of stage 1's scores over positions.

Letters: B batch, Hkv KV heads, S tokens, W window queries.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "older"])
def side_by_side_kernel(
    scores,  # [B, Hkv, S - W] float32
    valid,  # [B, valid heads, S] uint8
    ranks,  # [B, valid heads, S] int32, tokens up to and with each position
    beside,  # [B, Hkv, S - W] float32, written: the tokens' scores without the padding between them
    size,
    older,  # S - W
    kv_heads,
    valid_heads,
    CHUNK: tl.constexpr,
):
    """Move the scores of a row's tokens together; grid (B * Hkv, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    line = (row // kv_heads * valid_heads + row % kv_heads % valid_heads) * size
    real = tl.load(valid + line + token, mask=token < older, other=0) != 0
    rank = tl.load(ranks + line + token, mask=real, other=1) - 1
    tl.store(beside + row * older + rank, tl.load(scores + row * older + token, mask=real, other=0.0), mask=real)


@triton.jit(do_not_specialize=["size", "older"])
def pool_kernel(
    scores,  # [B, Hkv, S - W] float32; with VALID side by side
    valid,  # [B, valid heads, S] uint8
    ranks,  # [B, valid heads, S] int32
    pooled,  # [B, Hkv, S] float32, written
    size,
    older,  # S - W
    kv_heads,
    valid_heads,
    KERNEL: tl.constexpr,
    BEFORE: tl.constexpr,  # tokens of a pool before its own
    VALID: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pool a chunk of a row; grid (B * Hkv, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    centre = token
    count = older
    real = token < size
    if VALID:
        line = (row // kv_heads * valid_heads + row % kv_heads % valid_heads) * size
        real = tl.load(valid + line + token, mask=token < size, other=0) != 0
        centre = tl.load(ranks + line + token, mask=real, other=1) - 1
        count = tl.load(ranks + line + older - 1)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    for i in range(KERNEL):
        neighbour = centre + i - BEFORE
        score = tl.load(
            scores + row * older + neighbour, mask=(neighbour >= 0) & (neighbour < count), other=float("-inf")
        )
        # Written so that NaN stays.
        best = tl.where((score > best) | (score != score), score, best)
    # The window wins over everything, padding (whose neighbours are not its own) over nothing.
    best = tl.where(token >= older, float("inf"), best)
    if VALID:
        best = tl.where(real, best, float("-inf"))
    tl.store(pooled + row * size + token, best, mask=token < size)
