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

from .budget import BudgetSplit
from .core.attention import attend
from .core.indexes import index_of
from .core.residual import summable
from .dispatch import run_kernels, static_buffers
from .state.reference import attend_chosen, attend_selected, recent
from .state.store import KVStore

_MUTATED = (
    *("keys", "values", "positions", "index", "value_sum", "missed", "lengths", "clock", "ring", "buffers", "out"),
)
# Spelled out, since PyTorch 2.6 infers none from `list[Tensor]`; (a!) marks what a step writes.
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor(d!)[] index, Tensor(e!)? value_sum, Tensor? residual_bias, Tensor(f!)? missed, Tensor(g!) lengths, "
    "Tensor(h!) clock, Tensor(i!)? ring, Tensor(j!)[] buffers, Tensor(k!) out, int page_size, int? channels, "
    "int? sketch_bits, int? top_k, int token_budget, int? ends, int protected, bool by_largest, float scaling, "
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
    index: list[Tensor],
    value_sum: Tensor | None,
    residual_bias: Tensor | None,
    missed: Tensor | None,
    lengths: Tensor,
    clock: Tensor,
    ring: Tensor | None,
    buffers: list[Tensor],
    out: Tensor,
    page_size: int,
    channels: int | None,
    sketch_bits: int | None,
    top_k: int | None,
    token_budget: int,
    ends: int | None,
    protected: int,
    by_largest: bool,
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
        index: the tensors of the store's index in the order of its names, written; none where nothing is scored.
        value_sum: [B, Hkv, Dv] float64, the sum of the values of each row, raised by the new ones; None without a
            residual.
        residual_bias: [B, H] float32, added to the logit of what was not selected, or None.
        missed: [B, H] float32, the estimated weight of what was not selected, written; None without a residual.
        lengths: [B, Hkv] int32, slots in use of each row; raised by one.
        clock: [1] int32, tokens of the sequence so far; raised by one.
        ring: [B, H, W, D], the queries of the last W tokens, written; or None where they are not remembered.
        buffers: what the kernels work in; empty where the reference runs.
        out: [B, H, Dv] in the query's dtype, written.
        page_size: P.
        channels: r, or None where no pages are scored.
        sketch_bits: bits a channel of the sketch, or None where there is none.
        top_k: k, or None where every stored token is read.
        token_budget: t: a row that stores no more attends to all of it.
        ends: first tokens that are read where tokens are ranked by position, else None.
        protected: first tokens that are read whatever their rank.
        by_largest: whether tokens rank by the largest weight of the group's heads, not by their average.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
    """
    split = BudgetSplit(
        token_budget=token_budget,
        page_size=page_size,
        channels=channels,
        sketch_bits=sketch_bits,
        top_k=top_k,
        sinks=ends,
        protected=protected,
        residual=value_sum is not None,
        by_largest=by_largest,
    )
    exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if buffers:
        ranked = index_of(split)
        parts = {} if ranked is None else dict(zip(ranked.names, index, strict=True))
        given: dict[str, Any] = {"value_sum": value_sum, "residual_bias": residual_bias, "missed": missed, "ring": ring}
        given |= {"split": split, **exact}
        run_kernels(
            query, key, value, keys, values, positions, parts, lengths, clock, workspace=buffers, out=out, **given
        )
        return
    if ring is not None:
        ring.index_copy_(2, clock.long() % ring.shape[2], query[:, :, None].to(ring.dtype))
    _append(key, value, keys, values, positions, index, value_sum, lengths, clock, split)
    out.copy_(_attend(query, keys, values, index, value_sum, residual_bias, missed, lengths, split, **exact))


@decode_step_op.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def _append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    index: list[Tensor],
    value_sum: Tensor | None,
    lengths: Tensor,
    clock: Tensor,
    split: BudgetSplit,
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
    if value_sum is not None:
        value_sum.add_(torch.where(room, summable(value), 0))
    lengths.add_(1).clamp_(max=capacity)
    clock.add_(1)
    ranked = index_of(split)
    if ranked is not None:
        ranked.append(dict(zip(ranked.names, index, strict=True)), keys, lengths, None)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: list[Tensor],
    value_sum: Tensor | None,
    residual_bias: Tensor | None,
    missed: Tensor | None,
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
    # A row that stores at most t tokens attends to all of them; only the device knows whether there is one.
    ranked = index_of(split)
    if ranked is None:
        positions = recent(lengths, split.top_k, split.sinks or 0)
        return attend_chosen(query, keys, values, positions, lengths, split.token_budget, **exact)
    out, rest = attend_selected(
        query,
        keys,
        values,
        ranked,
        dict(zip(ranked.names, index, strict=True)),
        value_sum,
        residual_bias,
        split=split,
        stored=capacity,
        lengths=lengths,
        short=True,
        **exact,
    )
    if missed is not None and rest is not None:
        missed.copy_(rest)
    return out


@dataclass(eq=False)
class StaticStep:
    """The decode step of one static store: all that a traced or captured forward holds on to, and nothing that counts.

    Attributes:
        keys: [B, Hkv, N, D], with the others the store's own.
        values: [B, Hkv, N, Dv].
        positions: [B, Hkv, N] int32.
        index: the tensors of the index in the order of its names.
        value_sum: [B, Hkv, Dv] float64, or None.
        residual_bias: [B, H] float32, or None.
        missed: [B, H] float32, or None.
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
    index: list[Tensor]
    value_sum: Tensor | None
    residual_bias: Tensor | None
    missed: Tensor | None
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
            self.value_sum,
            self.residual_bias,
            self.missed,
            self.lengths,
            self.clock,
            self.ring,
            self.buffers,
            self.out,
            split.page_size,
            split.channels,
            split.sketch_bits,
            split.top_k,
            split.token_budget,
            split.sinks,
            split.protected,
            split.by_largest,
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
        backend: see `rocketkv.dispatch.backend_name`.
        workspaces: where the kernels keep what they work in; the layers of a cache share one.

    Raises:
        ValueError: the store grows, its prompt is not closed, or the backend cannot run here.
    """
    split, ready = store.split, store.closed and store.decode_capacity is not None
    if not ready or split is None or store.keys is None or store.values is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    if store.positions is None or store.lengths is None:
        raise ValueError("a static step needs a store that was closed with a decode_capacity")
    if split.residual:
        store.note_missed(torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device))
    step = StaticStep(
        keys=store.keys,
        values=store.values,
        positions=store.positions,
        index=list(store.index_parts().values()),
        value_sum=store.value_sum,
        residual_bias=store.residual_bias,
        missed=store.missed,
        lengths=store.lengths,
        clock=store.clock(),
        ring=store.window,
        buffers=static_buffers(query, store, backend, {} if workspaces is None else workspaces),
        out=torch.zeros(*query.shape[:2], store.values.shape[3], dtype=query.dtype, device=query.device),
        split=split,
    )
    missed = () if step.missed is None else (step.missed,)
    for tensor in (*store.tensors().values(), step.clock, *step.buffers, step.out, *missed):
        # Without it a CUDA graph of torch.compile copies what a step writes, or is not made at all.
        torch._dynamo.mark_static_address(tensor, guard=False)
    return step
