"""A decode step as an operator of PyTorch, on tensors and numbers alone, for static stores.

A forward that calls it can be traced without a break and captured in a CUDA graph: all that changes from one step to
the next is read from tensors on the device, which the step itself writes. Importing this module registers the operator
`rocketkv::decode_step`, and does nothing else.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N slots of the buffers, t token budget, k tokens read.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import attend, score, select
from .backend import all_where_short, recent, run_kernels, static_buffers
from .budget import BudgetSplit
from .eviction import full_precision
from .index import close_pages
from .store import KVStore

_MUTATED = ("keys", "values", "positions", "index", "lengths", "clock", "ring", "buffers", "out")
# Spelled out, since PyTorch 2.6 infers none from `list[Tensor]`; (a!) marks what a step writes.
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor(d!)? index, Tensor(e!) lengths, Tensor(f!) clock, Tensor(g!)? ring, Tensor(h!)[] buffers, Tensor(i!) out, "
    "int page_size, int? channels, int? top_k, int token_budget, int? ends, int protected, float scaling, "
    "float? softcap, Tensor? sinks) -> ()"
)


@torch.library.custom_op("rocketkv::decode_step", mutates_args=_MUTATED, schema=_SCHEMA)
def decode_step_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    clock: Tensor,
    ring: Tensor | None,
    buffers: list[Tensor],
    out: Tensor,
    page_size: int,
    channels: int | None,
    top_k: int | None,
    token_budget: int,
    ends: int | None,
    protected: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Append one token to every row and attend to what stage 2 selects; a row that is full stays as it is.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], likewise.
        value: [B, Hkv, Dv].
        keys: [B, Hkv, N, D], written.
        values: [B, Hkv, N, Dv], written.
        positions: [B, Hkv, N] int32, written.
        index: [B, Hkv, T, rows, 128], written where a page fills; None where nothing is scored.
        lengths: [B, Hkv] int32, slots in use of each row; raised by one.
        clock: [1] int32, tokens of the sequence so far; raised by one.
        ring: [B, H, W, D], the queries of the last W tokens, written; or None where they are not remembered.
        buffers: what the kernels work in; empty where the reference runs.
        out: [B, H, Dv] in the query's dtype, written.
        page_size: P.
        channels: r, or None where nothing is scored.
        top_k: k, or None where every stored token is read.
        token_budget: t: a row that stores no more attends to all of it.
        ends: first tokens that are read where tokens are ranked by position, else None.
        protected: first tokens that are read whatever their rank.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
    """
    split = BudgetSplit(
        token_budget=token_budget,
        page_size=page_size,
        channels=channels,
        top_k=top_k,
        sinks=ends,
        protected=protected,
    )
    exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    stored = (keys, values, positions, index, lengths, clock)
    if buffers:
        run_kernels(query, key, value, *stored, ring=ring, split=split, workspace=buffers, out=out, **exact)
        return
    if ring is not None:
        ring.index_copy_(2, clock.long() % ring.shape[2], query[:, :, None].to(ring.dtype))
    _append(key, value, *stored, page_size)
    out.copy_(_attend(query, keys, values, index, lengths, split, **exact))


@decode_step_op.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def _append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    clock: Tensor,
    page_size: int,
) -> None:
    """Append one token to every row that has room, and raise what counts tokens."""
    capacity = keys.shape[2]
    room = (lengths < capacity)[..., None]
    slot = lengths.long().clamp(max=capacity - 1)[..., None]
    for buffer, new in ((keys, key), (values, value)):
        place = slot[..., None].expand(-1, -1, 1, buffer.shape[3])
        kept = buffer.gather(2, place)
        buffer.scatter_(2, place, torch.where(room[..., None], new.to(buffer.dtype)[:, :, None], kept))
    positions.scatter_(2, slot, torch.where(room, clock, positions.gather(2, slot)))
    lengths.add_(1).clamp_(max=capacity)
    clock.add_(1)
    if index is not None:
        close_pages(index, keys, lengths, page_size)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    split: BudgetSplit,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend as the reference does, over buffers of which only the device knows how full they are."""
    capacity = keys.shape[2]
    exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if split.top_k is None or capacity <= split.token_budget:
        mask = torch.arange(capacity, device=keys.device) < lengths[..., None]
        return attend(query, keys, values, mask=mask, **exact)
    if split.channels is None or index is None:
        positions = recent(lengths, split.top_k, split.sinks or 0)
    else:
        with full_precision(query.device):
            logits = score(
                query,
                index,
                keys,
                stored=capacity,
                lengths=lengths,
                page_size=split.page_size,
                channels=split.channels,
                scaling=scaling,
                softcap=softcap,
            )
            positions, _ = select(
                logits,
                split.top_k,
                stored=capacity,
                lengths=lengths,
                kv_heads=keys.shape[1],
                unit_size=split.page_size,
                sinks=sinks,
                protected=split.protected,
            )
    # A row that stores at most t tokens attends to all of them; only the device knows whether there is one.
    positions, mask = all_where_short(positions, lengths, split.token_budget, split.token_budget)
    return attend(query, keys, values, positions, mask=mask, **exact)


@dataclass(eq=False)
class StaticStep:
    """The decode step of one static store: all that a traced or captured forward holds on to, and nothing that counts.

    Attributes:
        keys: [B, Hkv, N, D], with the others the store's own.
        values: [B, Hkv, N, Dv].
        positions: [B, Hkv, N] int32.
        index: [B, Hkv, T, rows, 128], or None.
        lengths: [B, Hkv] int32.
        clock: [1] int32.
        ring: [B, H, W, D], or None.
        buffers: what the kernels work in, or nothing where the reference runs.
        out: [B, H, Dv], what the last step gave: the next one writes over it.
        split: what the step may read.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    index: Tensor | None
    lengths: Tensor
    clock: Tensor
    ring: Tensor | None
    buffers: list[Tensor]
    out: Tensor
    split: BudgetSplit

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Run the operator for a token's query [B, H, D], key [B, Hkv, D] and value [B, Hkv, Dv]; return `out`."""
        split = self.split
        torch.ops.rocketkv.decode_step(
            query,
            key,
            value,
            self.keys,
            self.values,
            self.positions,
            self.index,
            self.lengths,
            self.clock,
            self.ring,
            self.buffers,
            self.out,
            split.page_size,
            split.channels,
            split.top_k,
            split.token_budget,
            split.sinks,
            split.protected,
            scaling,
            softcap,
            sinks,
        )
        return self.out


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
def static_step(
    query: Tensor, store: KVStore, *, backend: str = "auto", workspaces: MutableMapping[Any, Any] | None = None
) -> StaticStep:
    """Return the decode step of a static store whose prompt is closed, its tensors marked as ones that never move.

    Args:
        query: [B, H, D], of any step.
        store: the layer's store.
        backend: see `rocketkv.backend.backend_name`.
        workspaces: where the kernels keep what they work in; the layers of a cache share one.

    Raises:
        ValueError: the store grows, its prompt is not closed, or the backend cannot run here.
    """
    split, ready = store.split, store.closed and store.decode_capacity is not None
    if not ready or split is None or store.keys is None or store.values is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    if store.positions is None or store.lengths is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    step = StaticStep(
        keys=store.keys,
        values=store.values,
        positions=store.positions,
        index=store.index,
        lengths=store.lengths,
        clock=store.clock(),
        ring=store.window,
        buffers=static_buffers(query, store, backend, {} if workspaces is None else workspaces),
        out=torch.zeros(*query.shape[:2], store.values.shape[3], dtype=query.dtype, device=query.device),
        split=split,
    )
    for tensor in (*store.tensors().values(), step.clock, *step.buffers, step.out):
        # Without it a CUDA graph of torch.compile copies what a step writes, or is not made at all.
        torch._dynamo.mark_static_address(tensor, guard=False)
    return step
