"""Run both stages on a backend: PyTorch, the Triton kernels, or the compiled CPU step.

Only this module imports `kernels`.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim, N stored tokens, k selected tokens.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .backend import automatic, backend_name, no_triton
from .budget import BudgetSplit
from .core import decode
from .core.decode import DecodeBuffers
from .core.eviction import TORCH_OPS, EvictionOps
from .core.params import AttentionParams
from .core.residual import subtract_last
from .core.sketch import encoding, rotation_matrix
from .state.decoding import DecodeTokens
from .state.store import KVStore

MOST_WORKSPACES = 64  # of a cache; beyond, the oldest goes, as prompts of many lengths come


@dataclass(eq=False)
class Workspaces:
    """State that the layers of one cache share: the kernels' scratch buffers, and the warnings already given.

    Attributes:
        buffers: a `DecodeWorkspace` or `CpuWorkspace` for each device, dtype, shape of heads and budget of a layer.
        slabs: likewise for each shape of slab steps; none is dropped, as CUDA graphs have their addresses.
        warned: messages already given.
    """

    buffers: dict[Any, Any] = field(default_factory=dict)
    slabs: dict[Any, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def warn(self, message: str) -> None:
        """Warn, once for each message."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)


def eviction_ops(keys: Tensor, *, backend: str = "auto", workspaces: Workspaces | None = None) -> EvictionOps:
    """Return the operations of stage 1 for a layer: the PyTorch reference, or the kernels.

    Args:
        keys: [B, Hkv, S, D], any keys of the layer.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache; they warn if the kernels do not support these keys.

    Raises:
        ValueError: the backend cannot run on the device.
    """
    workspaces = workspaces or Workspaces()
    if (name := backend_name(keys.device, backend)) == "cpu":
        from .kernels.cpu.prompt_end import operations  # imported where it runs: numba may not be installed

        return TORCH_OPS._replace(**operations(keys, encoding))
    if name != "triton":
        if keys.is_cuda and automatic(backend):
            reason = no_triton("cuda")
            workspaces.warn(f"RocketKV runs on PyTorch, several times slower than its kernels: {reason}")
        return TORCH_OPS
    from .kernels import build_sketch, evict, value_aware  # imported where it runs: triton may not be installed

    reason = evict.refusal(keys)
    if reason is not None:
        workspaces.warn(f"the ends of this layer's prompts run on PyTorch, not on the kernels: {reason}")
        return TORCH_OPS

    def here(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # Buffers may be written in a later call that is not in inference mode.
            with _current(keys.device), torch.inference_mode(False):
                return operation(*args, **kwargs)

        return run

    return EvictionOps(
        here(evict.window_scores),
        here(evict.pool_scores),
        here(evict.select_top),
        here(evict.compact),
        here(value_aware.value_aware),
        here(functools.partial(build_sketch.write_sketch, encoding)),
    )


def value_subtraction(values: Tensor, backend: str = "auto") -> Callable[..., None]:
    """Return what keeps the sum of values at a crop: `residual.subtract_last`, or the kernel, which reads nothing back.

    Args:
        values: [B, Hkv, capacity, Dv], the layer's.
        backend: see `backend_name`.
    """
    if backend_name(values.device, backend) != "triton":
        return subtract_last
    from .kernels import decode_shape, value_sums  # imported where it runs: triton may not be installed

    if values.dtype not in decode_shape.DTYPES:
        return subtract_last

    def run(*args: Any, **kwargs: Any) -> None:
        with _current(values.device):
            value_sums.subtract_last(*args, **kwargs)

    return run


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    window: int | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
) -> Tensor | None:
    """Attend causally from n queries, the last of S tokens, with the kernel; or return None if it cannot run.

    Args:
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, S, D], after rotary embedding.
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        window: keys that a query sees, itself included, or None for all.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache; they warn if the kernel does not support these tensors.

    Returns:
        [B, n, H, Dv] in the query's dtype, or None on PyTorch and where gradients are needed: the kernel has none.

    Raises:
        ValueError: the backend cannot run on the device.
    """
    if backend_name(query.device, backend) != "triton":
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return None
    from .kernels import prefill  # imported where it runs: triton may not be installed

    reason = prefill.refusal(query, key, value)
    if reason is not None:
        (workspaces or Workspaces()).warn(f"prompts of this layer run on PyTorch, not on the kernel: {reason}")
        return None
    with _current(query.device):
        out: Tensor = prefill.prefill_attention(query, key, value, params, window=window, valid=valid)
    return out


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: KVStore,
    params: AttentionParams,
    *,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
) -> Tensor:
    """Append one token to the store and attend to the tokens that stage 2 selects, possibly the new one.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        store: the layer's store, its prompt closed.
        params: the model's attention parameters.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: the store's prompt is not closed, or the backend cannot run on its device.
    """
    decoding, fill = store.next_fill()
    out = None
    name = "torch" if backend == "torch" else backend_name(query.device, backend)
    if name != "torch":
        store.clock()
        out = kernel_step(name, query, key, value, decoding, params, workspaces or Workspaces())
    if out is None:
        buffers, index, split = decoding.buffers, decoding.index, decoding.split
        out = decode.decode_step_torch(query, key, value, buffers, index, split, params, fill)
    store.lens.advance()
    return out


def kernel_step(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decoding: DecodeTokens,
    params: AttentionParams,
    workspaces: Workspaces,
) -> Tensor | None:
    """Run the step with the kernels or the CPU step, or warn and return None if they do not support the layer."""
    if torch.is_grad_enabled() and query.requires_grad:
        workspaces.warn(
            "decode steps of this layer run on PyTorch, not on the kernels: the kernels have no backward; decode under "
            "torch.no_grad() or torch.inference_mode()"
        )
        return None
    workspace = workspace_of(backend, query, decoding.buffers, decoding.split, workspaces)
    if workspace is None:
        return None
    return run_kernels(query.detach(), key.detach(), value.detach(), decoding.buffers, workspace, params)


def warm_up(
    query: Tensor,
    store: KVStore,
    params: AttentionParams,
    *,
    backend: str = "auto",
    workspaces: Workspaces,
    drafts: bool = False,
) -> None:
    """Compile the kernels of the store's decode steps, once for each shape of a layer, and run nothing.

    For a GPU the host compiles while the device still works on the prompt, not when the first generated token waits.
    Verify steps of any length run the same kernels.

    Args:
        query: [B, H, D], any query of the layer.
        store: the layer's store, its prompt closed.
        params: the model's attention parameters.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.
        drafts: whether verify steps will follow, which write no query ring, where there is one.
    """
    name = backend_name(query.device, backend)
    if name == "torch":
        return
    decoding = store.decoding
    workspace = workspace_of(name, query, decoding.buffers, decoding.split, workspaces)
    if workspace is None or workspace.warm:
        return
    if name == "cpu":
        from .kernels.cpu.step import compile_step  # imported where it runs: numba may not be installed

        compile_step(decoding.buffers, workspace.shape)
        workspace.warm = True
        return
    from .kernels.decode import decode_step_triton  # imported where it runs: triton may not be installed

    store.clock()
    new = query, decoding.keys[:, :, 0], decoding.values[:, :, 0]
    query, key, value = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in new)
    steps = [decoding.buffers]
    if drafts and decoding.buffers.query_ring is not None:
        steps.append(decoding.buffers._replace(query_ring=None))
    with _current(query.device):
        for buffers in steps:
            decode_step_triton(query, key, value, buffers, workspace, params, compile_only=True)
    workspace.warm = True


def run_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    workspace: Any,
    params: AttentionParams,
    out: Tensor | None = None,
    slab: Any = None,
) -> Tensor:
    """Run a decode step in a workspace made for it; see `kernels.decode.decode_step_triton`."""
    if workspace.backend == "cpu":
        from .kernels.cpu.step import decode_step_cpu  # imported where it runs: numba may not be installed

        return decode_step_cpu(query, key, value, buffers, workspace, params, out, slab=slab)
    from .kernels.decode import decode_step_triton  # imported where it runs: triton may not be installed

    with _current(query.device):
        result: Tensor = decode_step_triton(query, key, value, buffers, workspace, params, out, slab=slab)
    return result


def _decode_shape(query: Tensor, buffers: DecodeBuffers, split: BudgetSplit) -> Any:
    """Return the `DecodeShape` of a layer's steps, with queries [B, H, D] or, of a verify step, [B, n H, D]."""
    return _shape_of(query.shape[1], buffers.seq_lens.shape[1], buffers.keys.shape, buffers.values.shape[3], split)


@functools.lru_cache(maxsize=256)
def _shape_of(heads: int, kv_heads: int, keys: tuple[int, ...], value_dim: int, split: BudgetSplit) -> Any:
    from .kernels.decode_shape import DecodeShape, SketchRule

    batch, stored_heads, capacity, head_dim = keys
    bits = split.sketch_bits
    return DecodeShape(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        capacity=capacity,
        page_size=split.page_size,
        channels=split.channels,
        top_k=split.top_k,
        token_budget=split.token_budget,
        sinks=split.sinks,
        protected=split.protected,
        sketch=None if bits is None else SketchRule(bits, *encoding(head_dim, bits)),
        residual=split.residual,
        by_largest=split.by_largest,
        queries=kv_heads // stored_heads,
    )


def workspace_of(
    backend: str, query: Tensor, buffers: DecodeBuffers, split: BudgetSplit, workspaces: Workspaces
) -> Any:
    """Return a backend's workspace for a layer's steps, or warn and return None if it does not support the layer."""
    shape, dtype, device = _decode_shape(query, buffers, split), buffers.keys.dtype, query.device
    # A buffer that grew or another draft replaces a workspace; layers of different budgets have their own.
    heads = shape.group, shape.kv_heads // shape.queries
    rule = shape.token_budget, shape.top_k, shape.channels, shape.sketch
    place = (backend, device, dtype, *heads, shape.queries > 1, shape.head_dim, shape.value_dim, *rule)
    workspace = workspaces.buffers.get(place)
    if workspace is not None and workspace.shape == shape:
        return workspace
    made = _new_workspace(backend, shape, (query.dtype, dtype, buffers.values.dtype), device)
    if isinstance(made, str):
        workspaces.warn(f"decode steps of this layer run on PyTorch, not on the kernels: {made}")
        return None
    workspace = workspaces.buffers[place] = made
    if len(workspaces.buffers) > MOST_WORKSPACES:
        del workspaces.buffers[next(iter(workspaces.buffers))]
    return workspace


def _new_workspace(backend: str, shape: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Any:
    """Return a backend's workspace for such queries, keys and values, or why it does not support them."""
    rotation = None if shape.sketch is None else rotation_matrix(shape.head_dim, device)
    if backend == "cpu":
        from .kernels.cpu import step  # imported where it runs: numba may not be installed
        from .kernels.cpu.workspace import CpuWorkspace

        return step.refusal(*dtypes) or CpuWorkspace(shape, rotation=rotation)
    from .kernels.decode import DecodeWorkspace  # imported where it runs: triton may not be installed
    from .kernels.decode_shape import refusal

    if rotation is not None:
        rotation = rotation.to(dtypes[1])  # exact in 16 bits: the entries are integers below 256
    return refusal(shape, dtypes[1]) or DecodeWorkspace(shape, device, rotation=rotation)


def slab_workspace(
    name: str, shape: tuple[int, ...], sizes: tuple[int, ...], split: BudgetSplit, keys: Tensor, workspaces: Workspaces
) -> Any:
    """Return a backend's workspace for steps of up to B rows of a slab, or why it does not support them.

    `shape` is B, Hkv, slots, D; `sizes` are H, Dv, pages; slots, pages and the split are the largest of a row. Queries
    and values have the keys' dtype.
    """
    (heads, value_dim, pages), place = sizes, (name, shape, sizes, split, keys.dtype, keys.device)
    if place not in workspaces.slabs:
        largest = replace(_shape_of(heads, shape[1], shape, value_dim, split), pages=pages)
        workspaces.slabs[place] = _new_workspace(name, largest, (keys.dtype,) * 3, keys.device)
    return workspaces.slabs[place]


def workspace_of_buffers(query: Tensor, buffers: DecodeBuffers, split: BudgetSplit, scratch: list[Tensor]) -> Any:
    """Return a workspace for a layer's steps in the scratch buffers of an earlier one, in the order of its tensors."""
    shape = _decode_shape(query, buffers, split)
    if scratch[0].dtype == torch.uint8:  # the CPU step's first one is bytes
        from .kernels.cpu.workspace import CpuWorkspace  # imported where it runs: numba may not be installed

        return CpuWorkspace(shape, buffers=scratch)
    from .kernels.decode import DecodeWorkspace  # imported where it runs: triton may not be installed

    return DecodeWorkspace(shape, query.device, buffers=scratch)


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that makes this device current: Triton launches on the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    context: AbstractContextManager[None] = torch.cuda.device(device)
    return context
