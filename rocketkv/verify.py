"""Run verify steps: the n tokens of a draft are appended, and each attends as in a decode step of its own.

The kernels' verify step is their decode step over n KV heads in place of one. The draft is appended before, by PyTorch;
each query's program then writes its own token once more, with the same bits, so no program waits for another one.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim, n tokens of the draft.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .backend import backend_name
from .core.decode import Fill
from .core.params import AttentionParams
from .core.verify import append_tokens, attend_drafted, by_kv_head, by_query, of_queries
from .dispatch import Workspaces, kernel_step
from .state.decoding import DecodeTokens
from .state.store import KVStore

# Upper bound for the kernels' scores [B, n H, capacity] float32 of one pass.
SCORE_BYTES = 64 * 2**20


def verify_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    params: AttentionParams,
    *,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
    make_room: Callable[[], object] | None = None,
) -> Tensor:
    """Append the n tokens of a draft to the store, and attend from each to the tokens that stage 2 selects for it.

    Equal to n decode steps, up to rounding.

    Args:
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, n, D], after rotary embedding.
        value: [B, Hkv, n, Dv].
        store: the layer's store, its prompt closed.
        params: the model's attention parameters.
        backend: see `rocketkv.backend.backend_name`.
        workspaces: shared by the layers of a cache.
        make_room: called before tokens are appended, to make room for at least one where static buffers are full; or
            None.

    Returns:
        [B, n, H, Dv] in the query's dtype.

    Raises:
        ValueError: the store's prompt is not closed, static buffers are full, or the backend cannot run on its device.
    """
    parts, start, count = [], 0, query.shape[2]
    name = "torch" if backend == "torch" else backend_name(query.device, backend)
    kernels = name != "torch"
    while start < count:
        if make_room is not None:
            make_room()
        # A buffer that grows or rolls does so when it is full, as in decode steps.
        decoding, fill = store.next_fill()
        capacity = decoding.keys.shape[2]
        stop = min(count, start + capacity - fill.longest)
        if kernels:
            stop = min(stop, start + max(1, SCORE_BYTES // (4 * query.shape[0] * query.shape[1] * capacity)))
        part = query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        buffers, index, split = decoding.buffers, decoding.index, decoding.split
        sums_before = None if buffers.value_sum is None or not kernels else buffers.value_sum.clone()
        value_sum = append_tokens(*part, buffers, index, fill)
        out = None
        if kernels:
            sums = None
            if value_sum is not None and sums_before is not None:
                sums = torch.cat((sums_before[:, :, None], value_sum[:, :, :-1]), 2)
            out = _kernel_pass(name, *part, decoding, sums, params, fill, workspaces or Workspaces())
        if out is None:
            out = attend_drafted(part[0], buffers, value_sum, index, split, params, fill)
        parts.append(out)
        store.lens.advance(stop - start)
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _kernel_pass(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decoding: DecodeTokens,
    sums: Tensor | None,
    params: AttentionParams,
    fill: Fill,
    workspaces: Workspaces,
) -> Tensor | None:
    """Attend with the kernels from a draft that has been appended, or return None if they do not support the layer.

    Args:
        backend: `triton` or `cpu`.
        query: [B, H, n, D].
        key: [B, Hkv, n, D].
        value: [B, Hkv, n, Dv].
        decoding: the store's tokens, the draft included.
        sums: [B, Hkv, n, Dv] float64, the sum of the values before each token; None without a residual.
        params: the model's attention parameters.
        fill: how full the buffers were before the draft.
        workspaces: shared by the layers of a cache.
    """
    buffers, count = decoding.buffers, query.shape[2]
    own, own_params = of_queries(0, count, count, buffers, sums, params)
    missed = buffers.missed
    own = own._replace(
        seq_lens=own.seq_lens - 1,  # as before each token
        clock=torch.full((1,), fill.seen or 0, dtype=torch.int32, device=query.device),
        query_ring=None,
        missed=None if missed is None else missed.new_empty(len(missed), count * missed.shape[1]),
    )
    rows = by_kv_head(query, buffers), key.flatten(1, 2), value.flatten(1, 2)
    out = kernel_step(backend, *rows, replace(decoding, buffers=own), own_params, workspaces)
    if out is None:
        return None
    if missed is not None and own.missed is not None:
        missed.copy_(by_query(own.missed[..., None], buffers, count)[:, -1, :, 0])
    return by_query(out, buffers, count)
