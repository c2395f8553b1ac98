"""The dense attention that a decode step is compared with: every strong implementation on the machine.

All read the same preallocated cache. None appends to it, which favours them: a compressed step does.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens.
"""

import importlib
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.dense_decode import TILINGS, DenseWorkspace, Tiling, dense_decode
from .gpu_timing import Arm, capture, seconds_of

# Works on the set of that number and returns [B, H, D].
Call = Callable[[int], Tensor]
SPLIT_KV = "split-KV (Triton)"
FLASHINFER_PAGE = 16
# Errors of a call that does not support a shape, a precision or a device, or is not installed; the last two are of
# flashinfer, which builds its kernels with ninja and nvcc.
_CANNOT = (
    *(ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError),
    *(OSError, subprocess.SubprocessError),
)


def dense_calls(
    query: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the dense calls that work here, by name, and the reasons why the others do not.

    Args:
        query: of each set, [B, H, D].
        keys: of each set, [B, Hkv, S, D].
        values: likewise.
        scaling: factor of the logits.
    """
    given = (query, keys, values, scaling)
    makers: dict[str, Callable[[], Call]] = {
        "SDPA enable_gqa": lambda: _sdpa(*given, SDPBackend.FLASH_ATTENTION, rows=False),
        "SDPA group as rows": lambda: _sdpa(*given, SDPBackend.FLASH_ATTENTION, rows=True),
        "SDPA cuDNN": lambda: _sdpa(*given, SDPBackend.CUDNN_ATTENTION, rows=False),
        "flash-attn": lambda: _flash_attn("flash_attn", *given),
        "flash-attn 3": lambda: _flash_attn("flash_attn_interface", *given),
        "flashinfer": lambda: _flashinfer(*given),
    }
    if keys[0].device.type != "cuda":
        del makers["SDPA cuDNN"]
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, maker in makers.items():
        made = _tried(maker)
        if isinstance(made, str):
            absent[name] = made
        else:
            calls[name] = made
    return calls, absent


def _tried(maker: Callable[[], Call]) -> Call | str:
    """Return a call that has worked once, or the reason why it does not."""
    try:
        call = maker()
        call(0)
    except torch.cuda.OutOfMemoryError:
        raise
    except _CANNOT as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return call


def _sdpa(
    query: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    backend: SDPBackend,
    *,
    rows: bool,
) -> Call:
    """Return PyTorch's attention: a query a head, or the queries of a group as rows of one head."""
    if backend == SDPBackend.CUDNN_ATTENTION and keys[0].dtype == torch.float32:
        raise ValueError("cuDNN's attention takes 16 bits only")
    batch, kv_heads = keys[0].shape[:2]
    heads, head_dim = query[0].shape[1:]
    shape = (batch, kv_heads, heads // kv_heads, head_dim) if rows else (batch, heads, 1, head_dim)
    # The fast backends take 16 bits only; for float32, and on a CPU, PyTorch chooses.
    free = keys[0].dtype == torch.float32 or keys[0].device.type != "cuda"

    def call(number: int) -> Tensor:
        only: AbstractContextManager[Any] = nullcontext() if free else sdpa_kernel(backend)
        with only:
            out = F.scaled_dot_product_attention(
                query[number].view(shape), keys[number], values[number], enable_gqa=not rows, scale=scaling
            )
        return out.view(batch, heads, -1)

    return call


def _flash_attn(
    package: str, query: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float
) -> Call:
    """Return flash-attn's attention over a cache, its tokens before its heads."""
    attend = importlib.import_module(package).flash_attn_with_kvcache
    batch, _, size, _ = keys[0].shape
    lengths = torch.full((batch,), size, dtype=torch.int32, device=keys[0].device)

    def call(number: int) -> Tensor:
        cache = (keys[number].transpose(1, 2), values[number].transpose(1, 2))
        out: Any = attend(query[number][:, None], *cache, cache_seqlens=lengths, softmax_scale=scaling)
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended[:, 0]

    return call


def _flashinfer(query: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float) -> Call:
    """Return flashinfer's attention: over one cache for one row, else over pages that lie in it."""
    flashinfer: Any = importlib.import_module("flashinfer")
    batch, kv_heads, size, head_dim = keys[0].shape
    heads, device = query[0].shape[1], keys[0].device
    if batch == 1:

        def single(number: int) -> Tensor:
            out: Tensor = flashinfer.single_decode_with_kv_cache(
                query[number][0],
                keys[number][0],
                values[number][0],
                kv_layout="HND",
                use_tensor_cores=True,
                sm_scale=scaling,
            )
            return out[None]

        return single
    if size % FLASHINFER_PAGE:
        raise ValueError(f"{size} tokens are no whole pages of {FLASHINFER_PAGE}")
    # Page p of row b starts p pages into the row's first head; the heads of a page lie S tokens apart.
    row_pages, own_pages = kv_heads * size // FLASHINFER_PAGE, size // FLASHINFER_PAGE
    count = (batch - 1) * row_pages + own_pages
    starts = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * row_pages
    pages = (starts + torch.arange(own_pages, dtype=torch.int32, device=device)).flatten()
    places = torch.arange(batch + 1, dtype=torch.int32, device=device) * own_pages
    last = torch.full((batch,), FLASHINFER_PAGE, dtype=torch.int32, device=device)
    buffer = torch.empty(2**28, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "HND", use_tensor_cores=True)
    dtype = keys[0].dtype
    wrapper.plan(
        places, pages, last, heads, kv_heads, head_dim, FLASHINFER_PAGE,
        q_data_type=dtype, kv_data_type=dtype, sm_scale=scaling,
    )  # fmt: skip

    def paged(tensor: Tensor) -> Tensor:
        sizes = (count, kv_heads, FLASHINFER_PAGE, head_dim)
        return tensor.as_strided(sizes, (FLASHINFER_PAGE * head_dim, size * head_dim, head_dim, 1))

    def call(number: int) -> Tensor:
        out: Tensor = wrapper.run(query[number], (paged(keys[number]), paged(values[number])))
        return out

    return call


def split_kv(
    query: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float
) -> tuple[Call, dict[str, int]]:
    """Return the library's kernel with its fastest tiling on this device, and the tiling."""
    if keys[0].device.type != "cuda":
        return _tiled(query, keys, values, scaling, TILINGS[0]), asdict(TILINGS[0])
    from triton.runtime.errors import OutOfResources

    seconds: dict[Tiling, float] = {}
    for tiling in TILINGS:
        call = _tiled(query, keys, values, scaling, tiling)
        try:
            seconds[tiling] = seconds_of(capture(Arm(SPLIT_KV, "dense", call, len(keys), 0)))
        except OutOfResources:  # shared memory, with large heads or float32
            continue
    if not seconds:
        raise ValueError(f"no tiling of the split-KV kernel fits head_dim={keys[0].shape[3]} on this device")
    fastest = min(seconds, key=seconds.__getitem__)
    return _tiled(query, keys, values, scaling, fastest), asdict(fastest)


def _tiled(
    query: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float, tiling: Tiling
) -> Call:
    batch, heads, head_dim = query[0].shape
    kv_heads, size = keys[0].shape[1:3]
    workspace = DenseWorkspace(batch, heads, kv_heads, head_dim, head_dim, size, keys[0].device, tiling)
    outs = [torch.empty_like(one) for one in query]

    def call(number: int) -> Tensor:
        return dense_decode(
            query[number], keys[number], values[number], workspace=workspace, scaling=scaling, out=outs[number]
        )

    return call
