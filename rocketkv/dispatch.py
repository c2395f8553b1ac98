"""Which backend runs both stages: PyTorch, or the Triton kernels; and the decode step as an operator of PyTorch.

This is the only importer of `kernels`. Importing it registers the operator `rocketkv::decode_step`, with which a
forward over static buffers can be traced without a break and captured in a CUDA graph: all that changes from one step
to the next is read from tensors on the device, which the step itself writes.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim, N stored tokens, k selected tokens.
"""

import functools
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .budget import BudgetSplit
from .config import BACKENDS
from .core import decode
from .core.decode import DecodeBuffers, Fill
from .core.eviction import TORCH_OPS, EvictionOps
from .core.index import index_of
from .core.params import AttentionParams
from .core.sketch import encoding, rotation_matrix
from .core.token_index import TokenIndex
from .state import compress
from .state.decoding import DecodeTokens
from .state.store import KVStore

VARIABLE = "ROCKETKV_BACKEND"


@dataclass(eq=False)
class Workspaces:
    """What the layers of one cache share: the kernels' scratch buffers, and the warnings that were given.

    Attributes:
        buffers: a `DecodeWorkspace` for each device, dtype and geometry of a layer.
        warned: messages that were given.
    """

    buffers: dict[Any, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def warn(self, message: str) -> None:
        """Warn, once for each message."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)


def backend_name(device: torch.device, requested: str = "auto") -> str:
    """Return the implementation that runs on a device: `torch`, the reference, or `triton`, the kernels.

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
    return "torch"


@functools.cache  # of the installation
def _no_triton(device_type: str, interpreted: bool) -> str | None:
    """Return why the kernels cannot run on a kind of device, or None if they can."""
    if device_type != "cuda" and not interpreted:
        return "the kernels need an NVIDIA or AMD GPU"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None


def close_prompt(
    store: KVStore,
    split: BudgetSplit,
    params: AttentionParams,
    *,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
    **settings: Any,
) -> None:
    """End a store's prompt as `compress.close_prompt` does, by the kernels where they run.

    Args:
        store: the layer's store, which reads a prompt.
        split: the tokens to keep, and how to index them.
        params: the model's attention parameters.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.
        **settings: the other arguments of `compress.close_prompt`.

    Raises:
        ValueError: there is no prompt, or the backend cannot run here.
    """
    index_dtype = None if split.channels is None else settings.get("index_dtype")
    ops = _eviction_ops(store.prompt.keys, backend, index_dtype, workspaces or Workspaces())
    with _current(store.prompt.keys.device, ops):
        compress.close_prompt(store, split, params, ops=ops, **settings)


def evict_generated(
    store: KVStore,
    kept: int,
    params: AttentionParams,
    *,
    kernel_size: int,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
) -> None:
    """Evict generated tokens as `compress.evict_generated` does, ranking them by the kernels where they run.

    Args:
        store: the layer's store, its prompt closed.
        kept: generated tokens to keep.
        params: the model's attention parameters.
        kernel_size: odd width of stage 1's max-pooling.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.

    Raises:
        ValueError: there is nothing to evict, or the backend cannot run here.
    """
    ops = _eviction_ops(store.decoding.keys, backend, None, workspaces or Workspaces())
    with _current(store.decoding.keys.device, ops):
        compress.evict_generated(store, kept, params, kernel_size=kernel_size, ops=ops)


def _eviction_ops(keys: Tensor, backend: str, index_dtype: torch.dtype | None, workspaces: Workspaces) -> EvictionOps:
    """Return the operations of stage 1 for such keys; warn where the kernels would run but do not take them."""
    if backend_name(keys.device, backend) == "torch":
        if keys.is_cuda and backend == "auto" and os.environ.get(VARIABLE, "auto") == "auto":
            reason = _no_triton("cuda", False)
            workspaces.warn(f"RocketKV runs on PyTorch, several times slower than its kernels: {reason}")
        return TORCH_OPS
    from .kernels import evict  # only where it runs: triton is not everywhere

    reason = evict.refusal(keys)
    if reason is not None:
        workspaces.warn(f"the ends of this layer's prompts run on PyTorch, not on the kernels: {reason}")
        return TORCH_OPS
    # Buffers may be written in a later call that is not in inference mode.
    compact = torch.inference_mode(False)(evict.compact)
    return EvictionOps(evict.window_scores, evict.pool_scores, evict.select_top, compact)


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
    """Append one token to the store and attend to the tokens that stage 2 selects; the new token competes too.

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
        ValueError: the store's prompt is not closed, or the backend cannot run here.
    """
    decoding, fill = store.next_fill()
    out = None
    if backend != "torch" and backend_name(query.device, backend) == "triton":
        store.clock()
        out = _kernel_step(query, key, value, decoding, params, workspaces or Workspaces())
    if out is None:
        buffers, index, split = decoding.buffers, decoding.index, decoding.split
        out = decode.decode_step(query, key, value, buffers, index, split, params, fill)
    store.lens.advance()
    return out


def _kernel_step(
    query: Tensor, key: Tensor, value: Tensor, decoding: DecodeTokens, params: AttentionParams, workspaces: Workspaces
) -> Tensor | None:
    """Run the step by the kernels, or warn and return None where they do not take the layer's shape."""
    if torch.is_grad_enabled() and query.requires_grad:
        workspaces.warn(
            "decode steps of this layer run on PyTorch, not on the kernels: the kernels have no backward; decode under "
            "torch.no_grad() or torch.inference_mode()"
        )
        return None
    workspace = _workspace(query, decoding.buffers, decoding.split, workspaces)
    if workspace is None:
        return None
    new = query.detach(), key.detach(), value.detach()
    return _run_kernels(*new, decoding.buffers, workspace, params)


def _run_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    workspace: Any,
    params: AttentionParams,
    out: Tensor | None = None,
) -> Tensor:
    from .kernels.decode import decode_step as kernel_step  # only where it runs: triton is not everywhere

    with _current(query.device):
        result: Tensor = kernel_step(query, key, value, buffers, workspace, params, out)
    return result


def _decode_shape(query: Tensor, buffers: DecodeBuffers, split: BudgetSplit) -> Any:
    """Return the `DecodeShape` of a layer's steps, of queries [B, H, D]."""
    from .kernels.append_sketch import SketchRule
    from .kernels.decode import DecodeShape

    batch, kv_heads, capacity, head_dim = buffers.keys.shape
    bits = split.sketch_bits
    return DecodeShape(
        batch=batch,
        heads=query.shape[1],
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=buffers.values.shape[3],
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
    )


def _workspace(query: Tensor, buffers: DecodeBuffers, split: BudgetSplit, workspaces: Workspaces) -> Any:
    """Return the kernels' workspace for a layer's steps, or warn and return None where they do not take its shape."""
    from .kernels.decode import DecodeWorkspace, refusal

    shape, dtype, device = _decode_shape(query, buffers, split), buffers.keys.dtype, query.device
    # Prompts one after another have shapes of their own: the last one's workspace stands for the layer.
    place = (device, dtype, shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim)
    workspace = workspaces.buffers.get(place)
    if workspace is not None and workspace.shape == shape:
        return workspace
    reason = refusal(shape, dtype)
    if reason is not None:
        workspaces.warn(f"decode steps of this layer run on PyTorch, not on the kernels: {reason}")
        return None
    # Exact in 16 bits: the rotation's entries are whole numbers of less than 256.
    rotation = None if shape.sketch is None else rotation_matrix(shape.head_dim, device).to(dtype)
    workspace = workspaces.buffers[place] = DecodeWorkspace(shape, device, rotation=rotation)
    return workspace


def _current(device: torch.device, ops: EvictionOps | None = None) -> AbstractContextManager[None]:
    """Return a context in which Triton launches on this device."""
    if ops is TORCH_OPS or device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    context: AbstractContextManager[None] = torch.cuda.device(device)
    return context


# The numbers of a split that a decode step needs, as the operator takes them; None is -1.
_RULE = (
    "token_budget",
    "page_size",
    "channels",
    "sketch_bits",
    "top_k",
    "sinks",
    "protected",
    "by_largest",
    "residual",
)


@functools.lru_cache(maxsize=256)
def _split_of(rule: tuple[int, ...]) -> BudgetSplit:
    """Return the split of an operator call's numbers."""
    fields: dict[str, Any] = {name: None if value < 0 else value for name, value in zip(_RULE, rule, strict=True)}
    return BudgetSplit(**fields | {name: bool(fields[name]) for name in ("by_largest", "residual")})


# Spelled out, since PyTorch 2.6 infers none from `list[Tensor]`; (a!) marks what a step writes.
@torch.library.custom_op(
    "rocketkv::decode_step",
    mutates_args=("buffers", "workspace", "out"),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor(a!)[] buffers, Tensor(b!)[] workspace, Tensor(c!) out, "
        "str names, int[] rule, float scaling, float? softcap, Tensor? sinks) -> ()"
    ),
)
def decode_step_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: list[Tensor],
    workspace: list[Tensor],
    out: Tensor,
    names: str,
    rule: list[int],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Run a decode step over static buffers: `decode.decode_step`, or the kernels where a workspace is given.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        buffers: the tensors of a `DecodeBuffers`; written.
        workspace: the kernels' scratch buffers, empty where PyTorch runs; written.
        out: [B, H, Dv] in the query's dtype; written.
        names: of `buffers`, separated by commas; those that are no fields are the index's.
        rule: the numbers of the split, in the order of `_RULE`.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
    """
    split, params = _split_of(tuple(rule)), AttentionParams(scaling, softcap, sinks)
    named: dict[str, Any] = dict(zip(names.split(","), buffers, strict=True))
    index_tensors = tuple(named.pop(name) for name in list(named) if name not in DecodeBuffers._fields)
    record = DecodeBuffers(**named, index_tensors=index_tensors)
    _static_step(query, key, value, record, workspace, out, index_of(split), split, params)


@decode_step_op.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def _static_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    workspace: list[Tensor],
    out: Tensor,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
) -> None:
    """Run a step over static buffers into `out`, reading nothing that only the host knows."""
    if workspace:
        from .kernels.decode import DecodeWorkspace

        shape = _decode_shape(query, buffers, split)
        _run_kernels(query, key, value, buffers, DecodeWorkspace(shape, query.device, buffers=workspace), params, out)
        return
    fill = Fill(buffers.keys.shape[2] - 1, 0, None)
    out.copy_(decode.decode_step(query, key, value, buffers, index, split, params, fill))


@dataclass(eq=False)
class StaticStep:
    """The decode step of one static store: what a traced or captured forward refers to, and nothing that counts.

    Attributes:
        decoding: the store's tokens.
        workspace: the kernels' scratch buffers, empty where PyTorch runs.
        out: [B, H, Dv], the last step's output; the next step overwrites it.
        capacity: slots of the buffers.
        clock: [1] int32, tokens of the sequence.
        tensors: the buffers, as the operator takes them.
        names: their names.
        rule: the numbers of the split, as the operator takes them.
    """

    decoding: DecodeTokens
    workspace: list[Tensor]
    out: Tensor
    capacity: int
    clock: Tensor
    tensors: list[Tensor]
    names: str
    rule: list[int]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Run the step for a token's query [B, H, D], key [B, Hkv, D] and value [B, Hkv, Dv]; return `out`."""
        decoding = self.decoding
        if torch.compiler.is_dynamo_compiling():
            torch.ops.rocketkv.decode_step(
                query, key, value, self.tensors, self.workspace, self.out, self.names, self.rule, *params
            )
        else:
            index, split = decoding.index, decoding.split
            new = query.detach(), key.detach(), value.detach()
            _static_step(*new, decoding.buffers, self.workspace, self.out, index, split, params)
        return self.out


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
def static_step(
    query: Tensor, store: KVStore, *, backend: str = "auto", workspaces: Workspaces | None = None
) -> StaticStep:
    """Return the decode step of a static store whose prompt is closed, its tensors marked as ones that never move.

    Args:
        query: [B, H, D], of any step.
        store: the layer's store.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.

    Raises:
        ValueError: the store grows, its prompt is not closed, or the backend cannot run here.
    """
    decoding = store.decoding
    if decoding.decode_capacity is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    clock, split, scratch = store.clock(), decoding.split, []
    if backend_name(query.device, backend) == "triton":
        workspace = _workspace(query, decoding.buffers, split, workspaces or Workspaces())
        scratch = [] if workspace is None else list(workspace.tensors().values())
    out = torch.zeros(*query.shape[:2], decoding.values.shape[3], dtype=query.dtype, device=query.device)
    rule = [-1 if value is None else int(value) for value in (getattr(split, name) for name in _RULE)]
    named = decoding.tensors() | {"clock": clock}
    for tensor in (*named.values(), *scratch, out):
        # Without it a CUDA graph of torch.compile copies what a step writes, or is not made at all.
        torch._dynamo.mark_static_address(tensor, guard=False)
    capacity = decoding.keys.shape[2]
    return StaticStep(decoding, scratch, out, capacity, clock, list(named.values()), ",".join(named), rule)
