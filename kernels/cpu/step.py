"""A decode step of stage 2 on a CPU: two calls of compiled code in PyTorch's threads.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim.
"""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from ..decode_shape import DTYPES, TILE_PAGES, DecodeShape
from ..operands import Buffers, Params, SlabRows
from .compiled import first_entry, second_entry
from .operands import SPARE_COUNTERS, Tensors
from .threads import run
from .workspace import CpuWorkspace

_STEP = struct.Struct(f"={len(Tensors._fields)}q2d")


def refusal(query: torch.dtype, keys: torch.dtype, values: torch.dtype) -> str | None:
    """Return why the compiled step cannot run with such dtypes, or None if it can."""
    if keys not in DTYPES or values != keys or query != keys:
        return (
            f"queries are {query}, keys {keys} and values {values}; the CPU step takes float32, bfloat16 and float16, "
            "one dtype for all"
        )
    return None


def _side_by_side(heads: Tensor, dim: int) -> Tensor:
    """Return a tensor [B, heads, dim], each row's heads one after another."""
    return heads if heads.stride()[1:] == (dim, 1) else heads.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def compile_step(buffers: Buffers, shape: DecodeShape) -> None:
    """Compile what a step of the shape runs, and run nothing."""
    _entries(buffers, shape)


def _entries(buffers: Buffers, shape: DecodeShape) -> tuple[Any, Any]:
    dtype, sketched = buffers.keys.dtype, shape.sketch is not None
    index_dtype = buffers.index_tensors[0].dtype if shape.scored and not sketched else None
    return first_entry(dtype, index_dtype, sketched), second_entry(dtype)


def _rows(slab: SlabRows | None, index: Tensor | None, shape: DecodeShape) -> tuple[int, ...]:
    """Return the operands of a step of rows of a slab."""
    if slab is None:
        return (0,) * 6
    line = 0 if index is None or shape.sketch is not None else TILE_PAGES * index.itemsize
    return slab.rows.data_ptr(), slab.rules.data_ptr(), slab.row_tokens, slab.row_slots, slab.row_lines, line


def decode_step_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: Buffers,
    workspace: CpuWorkspace,
    params: Params,
    out: Tensor | None = None,
    *,
    slab: SlabRows | None = None,
) -> Tensor:
    """Append one token to every row and attend to the tokens that stage 2 selects.

    Args:
        query: [B, H, D], after rotary embedding, in the keys' dtype.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        buffers: the layer's, with a clock; written in place.
        workspace: made for these shapes.
        params: the model's attention parameters.
        out: [B, H, Dv] to write to, or None for a new one.
        slab: rows of a slab to run on, or None for all rows of the buffers. For a negative row nothing is written.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: the buffers have no clock.
    """
    if buffers.clock is None:
        raise ValueError("the CPU step reads the new token's position from a clock; these buffers have none")
    shape, dtype = workspace.shape, buffers.keys.dtype
    query = _side_by_side(query, shape.head_dim)
    key = _side_by_side(key.to(dtype), shape.head_dim)
    value = _side_by_side(value.to(dtype), shape.value_dim)
    if out is None:
        out = query.new_empty(query.shape[0], shape.heads, shape.value_dim)
    codes, scales, mean, balance = (*(buffers.index_tensors if shape.scored else ()), None, None, None, None)[:4]
    bias = None if buffers.residual_bias is None else buffers.residual_bias.contiguous()
    sinks, ring = None if params.sinks is None else params.sinks.float(), buffers.query_ring
    sizes, constants = workspace.operands()
    step = _STEP.pack(
        query.shape[0] * shape.kv_heads,
        0 if ring is None else ring.shape[2],
        query.stride(0),
        key.stride(0),
        value.stride(0),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        buffers.keys.data_ptr(),
        buffers.values.data_ptr(),
        buffers.positions.data_ptr(),
        buffers.seq_lens.data_ptr(),
        _address(codes),
        _address(scales),
        _address(mean),
        _address(balance),
        _address(buffers.value_sum),
        _address(bias),
        _address(buffers.missed) if shape.residual and shape.scored else 0,
        _address(ring),
        buffers.clock.data_ptr(),
        _address(sinks),
        *_rows(slab, codes, shape),
        params.scaling,
        params.softcap or 0.0,
    )
    block = ctypes.create_string_buffer(sizes + step + constants)
    place, counters = ctypes.addressof(block), workspace.places()[0]
    threads = min(len(workspace.local), torch.get_num_threads())
    ctypes.memset(counters, 0, workspace.counter_bytes)
    first, second = _entries(buffers, shape)
    run(first, place, threads)
    ctypes.memset(counters, 0, 8 * SPARE_COUNTERS)
    run(second, place, threads)
    return out
