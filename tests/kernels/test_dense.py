"""Dense decode attention split over the keys, in Triton's interpreter where there is no GPU, against PyTorch's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from close import assert_as_precise, assert_near

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv.kernels.dense_decode import INTERPRETED, DenseWorkspace, Tiling, dense_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "head_dim", "value_dim", "dtype", "programs", "block"),
    [
        # One block, less, exactly some, and one token more or less; parts that do not divide evenly.
        *((1, 4, 2, n, 64, 64, FP32, 8, 32) for n in (1, 31, 32, 33, 127, 128, 129, 201)),
        # Groups: MHA, GQA, MQA, powers of two and not.
        *((2, g * h, h, 77, 64, 64, FP32, 8, 32) for g, h in ((1, 3), (3, 2), (8, 1), (17, 1))),
        # Head dims and values of another width.
        *((1, 4, 2, 75, d, d, dtype, 4, 32) for d in (80, 128, 256) for dtype in (FP32, BF16)),
        (1, 4, 1, 66, 64, 128, BF16, 8, 32),
        *(
            (batch, g * h, h, n, d, d, FP32, 4, 32)
            for batch, (g, h), n, d in product((1, 2), ((1, 1), (2, 2), (4, 1), (7, 1)), (19, 96, 160), (64, 96))
        ),
        # One part for all, and more parts than are combined at once.
        (1, 2, 1, 300, 64, 64, BF16, 1, 64),
        (1, 2, 1, 1100, 64, 64, FP32, 20, 32),
    ],
)
def test_dense_decode_is_attention(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, value_dim: int, dtype: torch.dtype,
    programs: int, block: int,
) -> None:  # fmt: skip
    capacity = length + 5
    query = torch.randn(batch, heads, head_dim).to(DEVICE, dtype)
    keys = torch.randn(batch, kv_heads, capacity, head_dim).to(DEVICE, dtype)
    values = torch.randn(batch, kv_heads, capacity, value_dim).to(DEVICE, dtype)
    keys[:, :, length:] = values[:, :, length:] = torch.nan  # not to be read
    tiling = Tiling(block=block, waves=1)
    workspace = DenseWorkspace(batch, heads, kv_heads, head_dim, value_dim, length, DEVICE, tiling, programs)
    # The interpreter cuts float32 off to a low precision where a GPU rounds: PyTorch does it here.
    out = torch.empty(batch, heads, value_dim, dtype=FP32 if INTERPRETED else dtype, device=DEVICE)
    found = dense_decode(query, keys, values, workspace=workspace, scaling=0.3, out=out).to(dtype)

    def attended(precision: torch.dtype) -> Tensor:
        parts = (query[:, :, None], keys[:, :, :length], values[:, :, :length])
        q, k, v = (part.to(precision) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)[:, :, 0]

    if dtype == FP32:
        assert_near(found, attended(torch.float64))
    else:
        assert_as_precise(found, attended(dtype), attended(torch.float64))


def test_dense_decode_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="head_dim must be at most 256, got 512"):
        DenseWorkspace(1, 2, 1, 512, 64, 8, CPU)
    with pytest.raises(ValueError, match="length must be at least 1"):
        DenseWorkspace(1, 2, 1, 64, 64, 0, CPU)
    keys = torch.randn(1, 8, 1, 64).transpose(1, 2)
    keys = torch.cat((keys, keys), -1)[..., :64]
    with pytest.raises(ValueError, match="contiguous"):
        dense_decode(torch.randn(1, 2, 64), keys, keys, workspace=DenseWorkspace(1, 2, 1, 64, 64, 8, CPU), scaling=1.0)
