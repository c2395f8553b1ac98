"""The decode step of static buffers: as a PyTorch operator, which compiled forwards call, and eagerly.

Importing it registers the operator `rocketkv::decode_step`. With it, a forward over static buffers is traced without a
graph break and captured in a CUDA graph: the step reads all state that changes between steps from device tensors, and
writes it there.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import backend_name
from .budget import BudgetSplit
from .core import decode
from .core.decode import DecodeBuffers, Fill
from .core.index import index_of
from .core.params import AttentionParams
from .core.token_index import TokenIndex
from .dispatch import Workspaces, run_kernels, workspace_of, workspace_of_buffers
from .state.decoding import DecodeTokens
from .state.store import KVStore

# Fields of a split that a decode step needs. The operator takes them as integers, with -1 for None.
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
    """Return the split of the operator's integers."""
    fields: dict[str, Any] = {name: None if value < 0 else value for name, value in zip(_RULE, rule, strict=True)}
    return BudgetSplit(**fields | {name: bool(fields[name]) for name in ("by_largest", "residual")})


# An explicit schema, since PyTorch 2.6 infers none from `list[Tensor]`; (a!) marks the arguments that a step writes.
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
    """Run a decode step over static buffers: `decode.decode_step_torch`, or the kernels if there is a workspace.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        buffers: the tensors of a `DecodeBuffers`; written.
        workspace: the kernels' scratch buffers; written. Empty for PyTorch.
        out: [B, H, Dv] in the query's dtype; written.
        names: names of `buffers`, separated by commas; a name that is no field of `DecodeBuffers` is an index tensor.
        rule: integers of the split, in the order of `_RULE`.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
    """
    split, params = _split_of(tuple(rule)), AttentionParams(scaling, softcap, sinks)
    named: dict[str, Any] = dict(zip(names.split(","), buffers, strict=True))
    index_tensors = tuple(named.pop(name) for name in list(named) if name not in DecodeBuffers._fields)
    record = DecodeBuffers(**named, index_tensors=index_tensors)
    space = workspace_of_buffers(query, record, split, workspace) if workspace else None
    _static_step(query, key, value, record, space, out, index_of(split), split, params)


@decode_step_op.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def _static_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: DecodeBuffers,
    workspace: Any,
    out: Tensor,
    index: TokenIndex | None,
    split: BudgetSplit,
    params: AttentionParams,
) -> None:
    """Run a step over static buffers into `out`, without reading host state; on PyTorch where `workspace` is None."""
    if workspace is not None:
        run_kernels(query, key, value, buffers, workspace, params, out)
        return
    fill = Fill(buffers.keys.shape[2] - 1, 0, None)
    out.copy_(decode.decode_step_torch(query, key, value, buffers, index, split, params, fill))


@dataclass(eq=False)
class StaticStep:
    """The decode step of one static store: the tensors and constants of a traced or captured forward.

    Attributes:
        decoding: the store's tokens.
        space: the kernels' workspace, or None for PyTorch.
        workspace: its scratch buffers, in the operator's form; empty for PyTorch.
        out: [B, H, Dv], the last step's output; the next step overwrites it.
        capacity: slots of the buffers.
        clock: [1] int32, tokens of the sequence.
        tensors: the buffers, in the operator's form.
        names: names of the buffers, in the operator's form.
        rule: integers of the split, in the operator's form.
    """

    decoding: DecodeTokens
    space: Any
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
            _static_step(*new, decoding.buffers, self.space, self.out, index, split, params)
        return self.out


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
def static_step(
    query: Tensor, store: KVStore, *, backend: str = "auto", workspaces: Workspaces | None = None
) -> StaticStep:
    """Return the decode step of a static store whose prompt is closed; marks its tensors as static addresses.

    Args:
        query: [B, H, D], the query of any step.
        store: the layer's store.
        backend: see `backend_name`.
        workspaces: shared by the layers of a cache.

    Raises:
        ValueError: the store grows, its prompt is not closed, or the backend cannot run on its device.
    """
    decoding = store.decoding
    if decoding.decode_capacity is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    clock, split, space = store.clock(), decoding.split, None
    name = backend_name(query.device, backend)
    if name != "torch":
        space = workspace_of(name, query, decoding.buffers, split, workspaces or Workspaces())
    scratch = [] if space is None else list(space.tensors().values())
    out = torch.zeros(*query.shape[:2], decoding.values.shape[3], dtype=query.dtype, device=query.device)
    rule = [-1 if value is None else int(value) for value in (getattr(split, name) for name in _RULE)]
    named = decoding.tensors() | {"clock": clock}
    for tensor in (*named.values(), *scratch, out):
        # Otherwise torch.compile copies the written tensors into its CUDA graphs, or makes no CUDA graph.
        torch._dynamo.mark_static_address(tensor, guard=False)
    capacity = decoding.keys.shape[2]
    return StaticStep(decoding, space, scratch, out, capacity, clock, list(named.values()), ",".join(named), rule)
