"""The kernel that reads prompts, in Triton's interpreter where there is no GPU, against one masked softmax."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

from causal_case import CausalCase, plain_attention
from close import assert_as_precise, assert_near
from rocketkv import dispatch
from rocketkv.core.params import AttentionParams
from rocketkv.kernels import prefill

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = {"softcap": 3.0, "sinks": True, "window": 70, "padding": "holes"}
CASES = [
    # Each setting alone, then together; rows that one block holds, and one token more or less than blocks hold.
    CausalCase(),
    CausalCase(softcap=1.3, length=16, size=32),
    CausalCase(sinks=True, length=17, size=33),
    CausalCase(padding="left", batch=3),
    CausalCase(padding="holes"),
    *(CausalCase(window=window, length=33, size=97, batch=1) for window in (1, 12, 32, 50, 400)),
    CausalCase(heads=(3, 3), length=35, size=35, **EVERYTHING),  # type: ignore[arg-type]
    CausalCase(heads=(5, 1), length=1, size=66, batch=1, **EVERYTHING),  # type: ignore[arg-type]
    # Head dims that are no powers of two, values of another width.
    CausalCase(head_dim=20, value_dim=33, length=20, size=40, batch=1),
    # The tiles of 16 bits: a whole block and a part of one; few queries; large heads.
    CausalCase(length=150, size=333, batch=1, dtype=BF16),
    CausalCase(length=150, size=333, head_dim=64, dtype=FP16, **EVERYTHING),  # type: ignore[arg-type]
    CausalCase(length=260, size=260, batch=3, sinks=True, window=130, padding="left", dtype=BF16),
    CausalCase(length=20, size=200, head_dim=128, dtype=BF16, batch=1, sinks=True),
    CausalCase(length=70, size=200, head_dim=256, dtype=BF16, batch=1, softcap=3.0, window=40),
]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_a_masked_softmax(case: CausalCase) -> None:
    (query, key, value), params, (valid, _) = case.tensors(), case.params(), case.valid()
    shape = (case.batch, case.length, case.heads[0], value.shape[3])
    # The interpreter cuts float32 off to a low precision where a GPU rounds: PyTorch does it here.
    out = torch.empty(shape, dtype=FP32 if prefill.INTERPRETED else case.dtype)
    found = prefill.prefill_attention(query, key, value, params, window=case.window, valid=valid, out=out)
    assert found is out
    reference, plain = (
        plain_attention(query, key, value, params, window=case.window, valid=valid, precision=precision)
        for precision in (torch.float64, case.dtype)
    )
    if case.dtype == FP32:
        assert_near(found, reference)
    else:
        assert_as_precise(found.to(case.dtype), plain, reference)


def test_tokens_before_a_row_and_behind_a_window_are_not_read() -> None:
    case = CausalCase(padding="left", batch=3, window=9)
    (query, key, value), (valid, starts) = case.tensors(), case.valid()
    assert valid is not None
    assert starts is not None
    clean = prefill.prefill_attention(query, key, value, case.params(), window=9, valid=valid)
    key[1, :, : starts[1]] = value[1, :, : starts[1]] = torch.nan
    key[0, :, : case.size - case.length - 8] = value[0, :, : case.size - case.length - 8] = torch.nan
    assert torch.equal(prefill.prefill_attention(query, key, value, case.params(), window=9, valid=valid), clean)
    assert not clean[1, :3].any()
    assert not clean[2].any()


def test_a_nan_spoils_its_own_row_and_group_alone() -> None:
    case = CausalCase(length=5, size=30)
    query, key, value = case.tensors()
    clean = prefill.prefill_attention(query, key, value, case.params())
    key[1, 1, 27] = torch.nan
    found = prefill.prefill_attention(query, key, value, case.params())
    assert found[1, 2:, 2:].isnan().all()
    found[1, 2:, 2:] = clean[1, 2:, 2:]
    assert torch.equal(found, clean)


def test_dispatch_runs_it_where_it_can() -> None:
    case = CausalCase(length=5, size=30, batch=1)
    tensors, params, workspaces = case.tensors(), case.params(), dispatch.Workspaces()
    settings = {"backend": "triton", "workspaces": workspaces}
    found = dispatch.prefill_attention(*tensors, params, **settings)  # type: ignore[arg-type]
    assert found is not None
    assert_near(found, plain_attention(*tensors, params))
    assert dispatch.prefill_attention(*tensors, params, backend="torch") is None
    needed = tensors[0].clone().requires_grad_()
    assert dispatch.prefill_attention(needed, *tensors[1:], params, **settings) is None  # type: ignore[arg-type]
    with torch.no_grad():
        assert dispatch.prefill_attention(needed, *tensors[1:], params, **settings) is not None  # type: ignore[arg-type]
    assert not workspaces.warned


@pytest.mark.parametrize(
    ("key_dtype", "head_dim", "reason"), [(torch.float64, 16, "keys torch.float64"), (FP32, 257, "head_dim is 257")]
)
def test_dispatch_says_why_it_cannot(key_dtype: torch.dtype, head_dim: int, reason: str) -> None:
    query, key = torch.randn(1, 2, 3, head_dim), torch.randn(1, 1, 4, head_dim, dtype=key_dtype)
    with pytest.warns(UserWarning, match=f"prompts of this layer run on PyTorch, not on the kernel: .*{reason}"):
        assert dispatch.prefill_attention(query, key, key, AttentionParams(0.3), backend="triton") is None
