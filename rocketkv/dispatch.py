"""The whole decode step behind one function, and the one place that decides which implementation runs it.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, t token budget, k tokens read.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .budget import BudgetSplit
from .config import BACKENDS
from .core.indexes import Parts, SketchIndex
from .core.sketch import encoding, rotation
from .state import bounded
from .state.reference import reference_step
from .state.store import KVStore

VARIABLE = "ROCKETKV_BACKEND"
_REFUSED = "decode steps of this layer run on PyTorch, not on the kernels: "
_PROMPT_REFUSED = "the ends of this layer's prompts run on PyTorch, not on the kernels: "


def backend_name(device: torch.device, requested: str = "auto") -> str:
    """Return the implementation that runs decode steps on a device: `torch`, the reference, or `triton`, the kernels.

    Args:
        device: where keys and values are.
        requested: `auto` leaves it to the environment variable ROCKETKV_BACKEND, and that to the device.

    Raises:
        ValueError: the variable names no backend, or `triton` is asked for where it cannot run.
    """
    wanted = os.environ.get(VARIABLE, "auto") if requested == "auto" else requested
    if wanted not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}; got {wanted!r}")
    if wanted == "torch":
        return "torch"
    reason = _no_triton(device.type, os.environ.get("TRITON_INTERPRET") == "1")
    if reason is None:
        # The interpreter is for tests: nobody wants it unasked.
        return "triton" if wanted == "triton" or device.type == "cuda" else "torch"
    if wanted == "triton":
        raise ValueError(f"backend='triton' cannot run on {device.type!r}: {reason}; use 'auto' or 'torch'")
    if device.type == "cuda":
        _say_once(f"decode steps run on PyTorch, several times slower than the kernels: {reason}")
    return "torch"


@functools.cache
def _no_triton(device_type: str, interpreted: bool) -> str | None:
    """Return why the kernels cannot run on a kind of device, or None if they can."""
    if device_type != "cuda" and not interpreted:
        return "the kernels need an NVIDIA or AMD GPU"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def close_prompt(store: KVStore, split: BudgetSplit, *, backend: str = "auto", **settings: Any) -> None:
    """End a store's prompt as `KVStore.close_prompt` does, by the kernels where they run.

    Args:
        store: the layer's store.
        split: what to keep and how to index it.
        backend: see `backend_name`.
        **settings: the other arguments of `KVStore.close_prompt`.

    Raises:
        ValueError: there is no prompt, or the backend cannot run here.
    """
    if store.keys is None or backend_name(store.keys.device, backend) == "torch":
        store.close_prompt(split, **settings)
        return
    from .kernels import evict  # only where it runs: triton is not everywhere

    reason = evict.refusal(store.keys)
    if reason is not None:
        _say_once(_PROMPT_REFUSED + reason)
        store.close_prompt(split, **settings)
        return
    # Buffers may be written in a later call that is not in inference mode.
    place = torch.inference_mode(False)(evict.compact)
    with _current(store.keys.device):
        store.close_prompt(split, scores=evict.prompt_scores, choose=evict.select_top, place=place, **settings)


def evict_generated(store: KVStore, kept: int, *, backend: str = "auto", **settings: Any) -> None:
    """Evict generated tokens as `bounded.evict_generated` does, ranking them by the kernels where they run.

    Args:
        store: the layer's store.
        kept: generated tokens that stay.
        backend: see `backend_name`.
        **settings: the other arguments of `bounded.evict_generated`.

    Raises:
        ValueError: there is nothing to evict, or the backend cannot run here.
    """
    if store.keys is None or backend_name(store.keys.device, backend) == "torch":
        bounded.evict_generated(store, kept, **settings)
        return
    from .kernels import evict  # only where it runs: triton is not everywhere

    if evict.refusal(store.keys) is not None:  # said at the prompt's end
        bounded.evict_generated(store, kept, **settings)
        return
    with _current(store.keys.device):
        bounded.evict_generated(store, kept, scores=evict.window_scores, **settings)


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    workspaces: MutableMapping[Any, Any] | None = None,
) -> Tensor:
    """Append one token to the store and attend to what stage 2 selects; the token itself competes like any other.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], likewise.
        value: [B, Hkv, Dv].
        store: the layer's store, its prompt closed.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
        backend: see `backend_name`.
        workspaces: where the kernels keep what they work in between steps; the layers of a cache share one.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: the store's prompt is not closed, or the backend cannot run here.
    """
    if backend_name(query.device, backend) == "triton":
        out = _triton_step(query, key, value, store, scaling, softcap, sinks, {} if workspaces is None else workspaces)
        if out is not None:
            return out
    return reference_step(query, key, value, store, scaling=scaling, softcap=softcap, sinks=sinks)


def _triton_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    workspaces: MutableMapping[Any, Any],
) -> Tensor | None:
    """Run the step by the kernels, or return None, having said why, where they do not take the layer's shape."""
    if torch.is_grad_enabled() and query.requires_grad:
        _say_once(_REFUSED + "the kernels have no backward; decode under torch.no_grad() or torch.inference_mode()")
        return None
    split = store.split
    if not store.closed or split is None or store.keys is None or store.values is None:
        raise ValueError("a decode step needs a store whose prompt is closed")
    if store.positions is None or store.lengths is None:
        raise ValueError("a decode step needs a store whose prompt is closed")
    store.make_room()
    workspace = _workspace(query, store, workspaces)
    if workspace is None:
        return None
    out = run_kernels(
        query.detach(),
        key.detach(),
        value.detach(),
        store.keys,
        store.values,
        store.positions,
        store.index_parts(),
        store.lengths,
        store.clock(),
        value_sum=store.value_sum,
        residual_bias=store.residual_bias,
        missed=store.missed_room(query) if split.residual and store.stored >= split.token_budget else None,
        ring=store.window,
        split=split,
        workspace=workspace,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
    )
    store.advance(clocked=True)
    return out


def run_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    parts: Parts,
    lengths: Tensor,
    clock: Tensor,
    *,
    value_sum: Tensor | None,
    residual_bias: Tensor | None,
    missed: Tensor | None,
    ring: Tensor | None,
    split: BudgetSplit,
    workspace: Any,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a decode step by the kernels, on a store's tensors, which are written in place.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], likewise.
        value: [B, Hkv, Dv].
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        positions: [B, Hkv, capacity] int32.
        parts: the index's tensors by name.
        lengths: [B, Hkv] int32, tokens of each row before the step.
        clock: [1] int32, the store's clock.
        value_sum: [B, Hkv, Dv] float64, the sum of each row's values, where there is a residual.
        residual_bias: [B, H] float32, of the residual's logit, or None.
        missed: [B, H] float32, where the weight of what was not attended to is written; None where nobody asks.
        ring: [B, H, W, D], the queries of the last tokens, or None where none are remembered.
        split: what the step may read.
        workspace: a `DecodeWorkspace`, or its buffers in their order.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
        out: [B, H, Dv], where the result is written; None makes one.

    Returns:
        [B, H, Dv] in the query's dtype.
    """
    from .kernels import decode  # only where it runs: triton is not everywhere

    if not isinstance(workspace, decode.DecodeWorkspace):
        shape = _decode_shape(query, keys, values, split)
        workspace = decode.DecodeWorkspace(shape, query.device, buffers=workspace)
    with _current(query.device):
        result: Tensor = decode.decode_step(
            query,
            key,
            value,
            keys=keys,
            values=values,
            positions=positions,
            index=parts.get("index"),
            sketch=() if split.sketch_bits is None else [parts[name] for name in SketchIndex.names],
            value_sum=value_sum,
            residual_bias=residual_bias,
            missed=missed,
            lengths=lengths,
            seen=clock,
            ring=ring,
            workspace=workspace,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            out=out,
        )
    return result


def _decode_shape(query: Tensor, keys: Tensor, values: Tensor, split: BudgetSplit) -> Any:
    from .kernels import append_sketch, decode

    batch, kv_heads, capacity, head_dim = keys.shape
    bits = split.sketch_bits
    rule = None if bits is None else append_sketch.SketchRule(bits, *encoding(head_dim, bits))
    return decode.DecodeShape(
        batch=batch,
        heads=query.shape[1],
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=values.shape[3],
        capacity=capacity,
        page_size=split.page_size,
        channels=split.channels,
        top_k=split.top_k,
        token_budget=split.token_budget,
        sinks=split.sinks,
        protected=split.protected,
        sketch=rule,
        residual=split.residual,
        by_largest=split.by_largest,
    )


def _workspace(query: Tensor, store: KVStore, workspaces: MutableMapping[Any, Any]) -> Any:
    """Return what the kernels work in for a store's steps, or None, having said why, where they do not take them."""
    from .kernels import decode

    if store.keys is None or store.values is None or store.split is None:
        raise ValueError("a decode step needs a store whose prompt is closed")
    shape = _decode_shape(query, store.keys, store.values, store.split)
    index_dtype = None if store.index is None else store.index.dtype
    # Of prompts one after another each has a shape of its own: the last one's buffers stand for the layer.
    place = (query.device, store.keys.dtype, index_dtype, shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim)
    workspace = workspaces.get(place)
    if workspace is not None and workspace.shape == shape:
        return workspace
    reason = decode.refusal(shape, store.keys.dtype)
    if reason is not None:
        _say_once(_REFUSED + reason)
        return None
    # Exact in 16 bits: its entries are whole numbers of less than 256.
    turn = None if shape.sketch is None else rotation(shape.head_dim, query.device).to(store.keys.dtype)
    workspaces[place] = decode.DecodeWorkspace(shape, query.device, rotation=turn)
    return workspaces[place]


def static_buffers(query: Tensor, store: KVStore, backend: str, workspaces: MutableMapping[Any, Any]) -> list[Tensor]:
    """Return what the kernels work in for the steps of a static store, or nothing where the reference runs them.

    Args:
        query: [B, H, D], of any step.
        store: the layer's store, its prompt closed.
        backend: see `backend_name`.
        workspaces: see `decode_step`.

    Raises:
        ValueError: the store's prompt is not closed, or the backend cannot run here.
    """
    if backend_name(query.device, backend) != "triton":
        return []
    workspace = _workspace(query, store, workspaces)
    return [] if workspace is None else list(workspace.tensors().values())


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which Triton launches on this device."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return nullcontext()
