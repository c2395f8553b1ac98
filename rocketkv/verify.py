"""Run verify steps: the n tokens of a draft are appended, and each attends as in a decode step of its own.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim, n tokens of the draft.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .core.params import AttentionParams
from .core.verify import verify_step_torch
from .dispatch import Workspaces, backend_name, decode_step
from .state.store import KVStore


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
        backend: see `rocketkv.dispatch.backend_name`.
        workspaces: shared by the layers of a cache.
        make_room: called before tokens are appended, to make room for at least one where static buffers are full; or
            None.

    Returns:
        [B, n, H, Dv] in the query's dtype.

    Raises:
        ValueError: the store's prompt is not closed, static buffers are full, or the backend cannot run on its device.
    """
    parts, start, count = [], 0, query.shape[2]
    kernels = backend != "torch" and backend_name(query.device, backend) == "triton"
    while start < count:
        if make_room is not None:
            make_room()
        # A buffer that grows or rolls does so when it is full, as in decode steps.
        decoding, fill = store.next_fill()
        stop = start + 1 if kernels else min(count, start + decoding.keys.shape[2] - fill.longest)
        part = query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        if kernels:
            single = (tensor[:, :, 0] for tensor in part)
            parts.append(decode_step(*single, store, params, backend=backend, workspaces=workspaces)[:, None])
        else:
            parts.append(verify_step_torch(*part, decoding.buffers, decoding.index, decoding.split, params, fill))
            store.lens.advance(stop - start)
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
