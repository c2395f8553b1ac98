"""How many operators and launches attention of a prompt costs on a GPU: on tensors without memory, of any length.

SDPA and the kernel are replaced by one call each, and flash attention is taken to run; all else runs as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv import backend, dispatch
from rocketkv.core import causal
from rocketkv.core.params import AttentionParams
from rocketkv.hf import prefill as hf_prefill
from rocketkv.hf.attention import rocketkv_attention
from rocketkv.hf.masks import LazyMask
from rocketkv.kernels import prefill
from rocketkv.state.prompt import PromptTokens
from rocketkv.state.store import KVStore
from tracking import Operators

LENGTHS = (2048, 32768, 131072)
LLAMA, QWEN3_MOE, GPT_OSS, GEMMA2 = (32, 8, 128), (32, 4, 128), (64, 8, 64), (16, 8, 256)
BF16 = torch.bfloat16


class Counted(Operators):
    """Operators that are no views; SDPA's flash attention with the shapes of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention.default:
            self.attended.append((tuple(args[0].shape), tuple(args[1].shape)))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let meta tensors be those of a GPU with flash attention; return the grids that the kernel is launched on."""
    noted: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: noted.append(grid)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        assert kwargs.pop("is_causal")
        assert query.shape[2] == key.shape[2]
        scale, dropout = kwargs.pop("scale"), kwargs.pop("dropout_p")
        assert [*kwargs] == ["enable_gqa"]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout, True, scale=scale)[0]  # type: ignore[no-any-return]

    def fused(*tensors: Tensor | AttentionParams, window: int | None = None) -> bool:
        params = tensors[3]
        assert isinstance(params, AttentionParams)
        return window is None and params.softcap is None and params.sinks is None

    for module in (causal, hf_prefill):
        monkeypatch.setattr(module, "fused", fused)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(prefill, "prefill_kernel", Kernel())
    monkeypatch.setenv(backend.VARIABLE, "triton")
    return noted


def causal_function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    raise AssertionError("a causal mask is not evaluated")


def lazy(batch: int, length: int, size: int, padded: bool, window: int | None = None) -> LazyMask:
    padding = torch.ones(batch, size, dtype=torch.bool, device="meta") if padded else None
    mask = LazyMask(
        mask_function=causal_function, padding=padding, batch_size=batch, query_length=length,
        query_offset=size - length, kv_length=size, kv_offset=0, causal=window is None, window=window,
        device=torch.device("meta"),
    )  # fmt: skip
    if padded:  # the host has read them once in the forward
        mask._padded, mask._starts = True, (tuple(range(0, 3 * batch, 3)), True)
    return mask


def tensors(shape: tuple[int, int, int], batch: int, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim = shape
    query = torch.zeros(batch, length, heads, head_dim, dtype=BF16, device="meta").transpose(1, 2)
    return query, *(torch.zeros(batch, kv_heads, size, head_dim, dtype=BF16, device="meta") for _ in range(2))


def operators_of_prompt(
    shape: tuple[int, int, int], batch: int, length: int, size: int, params: AttentionParams, mask: LazyMask | None,
    holes: bool = False,
) -> Counted:  # fmt: skip
    """Return the operators of a compressed layer's attention from the last `length` of `size` tokens."""
    query, key, value = tensors(shape, batch, length, size)
    store = KVStore()
    store.phase = PromptTokens(keys=key, values=value, holes=holes, aligned=not holes)
    if holes:
        store.phase.positions = torch.zeros(batch, shape[1], size, dtype=torch.int32, device="meta")
    store.lens.seen = store.lens.longest = store.lens.shortest = size
    new = key[:, :, size - length :], value[:, :, size - length :]
    with Counted() as operators:
        out = hf_prefill.attend_prompt(store, query, *new, mask, lambda *_: None, params)
    assert out.shape == (batch, length, shape[0], shape[2])
    return operators


@pytest.mark.parametrize("shape", [LLAMA, QWEN3_MOE])
def test_a_second_chunk_is_one_call(shape: tuple[int, int, int], grids: list[tuple[int, ...]]) -> None:
    counts = set()
    for size in LENGTHS:
        length = size // 2
        params = AttentionParams(shape[2] ** -0.5)
        found = operators_of_prompt(shape, 1, length, size, params, lazy(1, length, size, padded=False))
        assert len(found.names) <= 10, found.names
        assert found.attended == [((1, shape[0], length, shape[2]), (1, shape[1], size, shape[2]))]
        counts.add(len(found.names))
    assert len(counts) == 1
    assert not grids


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "second-chunk"])
@pytest.mark.parametrize("shape", [LLAMA, QWEN3_MOE])
def test_a_padded_batch_is_one_call_a_row(
    shape: tuple[int, int, int], whole: bool, grids: list[tuple[int, ...]]
) -> None:
    batch, counts = 8, set()
    for size in LENGTHS:
        length = size if whole else size // 2
        params = AttentionParams(shape[2] ** -0.5)
        found = operators_of_prompt(shape, batch, length, size, params, lazy(batch, length, size, padded=True))
        assert len(found.names) <= 10 + 3 * batch, found.names
        # Each row's tokens alone.
        tokens = [size - 3 * row for row in range(batch)]
        assert [(queries[2], keys[2]) for queries, keys in found.attended] == [(min(length, n), n) for n in tokens]
        counts.add(len(found.names))
    assert len(counts) == 1
    assert not grids


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("shape", "softcap"), [(GPT_OSS, None), (GEMMA2, 50.0)], ids=["sinks", "softcap"])
@pytest.mark.parametrize("sliding", [False, True])
def test_a_soft_capped_or_sink_layer_is_one_launch(
    sliding: bool, shape: tuple[int, int, int], softcap: float | None, batch: int, grids: list[tuple[int, ...]]
) -> None:
    counts = set()
    for size in LENGTHS:
        length = size // 2
        params = AttentionParams(shape[2] ** -0.5, softcap, None if softcap else torch.zeros(shape[0], device="meta"))
        mask = lazy(batch, length, size, padded=batch > 1, window=128 if sliding else None)
        if sliding:
            query, key, value = tensors(shape, batch, length, size)
            with Counted() as found:
                rocketkv_attention(
                    nn.Module(), query, key, value, mask, scaling=params.scaling, softcap=softcap, s_aux=params.sinks,
                    sliding_window=128,
                )  # fmt: skip
        else:
            found = operators_of_prompt(shape, batch, length, size, params, mask)
        assert len(found.names) <= 29, found.names
        assert [grid[1] for grid in grids] == [batch * shape[0]]
        assert not found.attended
        counts.add(len(found.names))
        grids.clear()
    assert len(counts) == 1


def test_a_turn_after_uneven_rows_is_one_launch(grids: list[tuple[int, ...]]) -> None:
    mask = lazy(8, 100, 5000, padded=True)
    found = operators_of_prompt(LLAMA, 8, 100, 2000, AttentionParams(0.1), mask, holes=True)
    assert len(found.names) <= 9, found.names
    assert not found.attended
    assert len(grids) == 1


def test_backend_torch_reaches_no_kernel(grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    query, key, value = tensors(LLAMA, 1, 16, 32)
    assert dispatch.prefill_attention(query, key, value, AttentionParams(0.1)) is None
    assert not grids
