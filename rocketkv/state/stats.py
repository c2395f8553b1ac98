"""Memory of a cache and bytes read per decode step, counted from the live tensors.

Letters: B batch, Hkv KV heads, D head dim, S tokens seen, N tokens stored, P page size, r channels, k tokens read.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.index import index_of
from .store import KVStore

if TYPE_CHECKING:
    from .missed import Audit

NOMINAL_ITEMSIZE = 2  # budgets count 16-bit keys and values


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Tokens and bytes of one layer, summed over the batch.

    Attributes:
        compressed: False for stock layers, such as sliding-window layers.
        tokens_seen: tokens of the sequence so far, padding included.
        tokens_stored: tokens that the longest row stores.
        key_bytes: bytes of the key buffers, spare room included.
        value_bytes: bytes of the value buffers, spare room included.
        index_bytes: bytes of stage 2's index, and of the residual's value sums and calibration.
        other_bytes: bytes of everything else: positions, seq_lens, window queries and their outputs, the query ring and
            what a verify step saved of it, missed mass, the clock, and the output buffer of a static step.
        history_bytes: bytes of a multi-turn method's history.
        token_budget: t, of the present turn; None in prompts, and where all tokens are kept and read.
        expected_error: with `max_error`, the estimated upper bound of the outputs' mean relative error; else None.
        device: device of keys, values and index, or None if there are none.
        history_device: device of the history, or None if there is none.
        full_bytes: bytes of keys and values in a full cache.
        step_bytes: bytes of keys, values and index that the next decode step reads.
        dense_step_bytes: bytes that a decode step over a full cache reads.
        nominal_step_bytes: bytes read per step (16-bit), the budget's unit: only the pages in use count, and an
            oracle's scores do not.
        nominal_dense_step_bytes: `dense_step_bytes` in 16 bits.
    """

    compressed: bool
    tokens_seen: int = 0
    tokens_stored: int = 0
    key_bytes: int = 0
    value_bytes: int = 0
    index_bytes: int = 0
    other_bytes: int = 0
    history_bytes: int = 0
    token_budget: int | None = None
    expected_error: float | None = None
    device: str | None = field(default=None, compare=False)
    history_device: str | None = field(default=None, compare=False)
    full_bytes: int = 0
    step_bytes: int = 0
    dense_step_bytes: int = 0
    nominal_step_bytes: int = 0
    nominal_dense_step_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All live bytes of this layer."""
        return self.key_bytes + self.value_bytes + self.index_bytes + self.other_bytes + self.history_bytes


@dataclass(frozen=True)
class CacheStats:
    """The statistics of every layer, and their sums.

    Attributes:
        layers: one entry per layer, in order.
        workspace_bytes: bytes of the kernels' scratch buffers, which the layers share.
        missed: per layer, the missed mass of every head in the last step (see `rocketkv.state.missed`), [B, H] float32
            on the layer's device; None without an estimate.
        audits: comparisons of single heads with exact attention (`RocketKVConfig.audit_every`), latest last.
    """

    layers: tuple[LayerStats, ...]
    workspace_bytes: int = 0
    missed: tuple[Tensor | None, ...] = field(default=(), compare=False)
    audits: "tuple[Audit, ...]" = ()

    @property
    def tokens_seen(self) -> int:
        """Tokens of the sequence so far."""
        return max((layer.tokens_seen for layer in self.layers), default=0)

    def total(self, name: str) -> int:
        """Return the sum over layers of one of their fields, for instance `total("index_bytes")`."""
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """All live bytes of the cache."""
        return self.total("total_bytes") + self.workspace_bytes

    def bytes_by_device(self) -> dict[str, int]:
        """Return the live bytes of the layers on each device, by its name."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for device, size in (
                (layer.device, layer.total_bytes - layer.history_bytes),
                (layer.history_device, layer.history_bytes),
            ):
                if device is not None:
                    found[device] = found.get(device, 0) + size
        return found

    @property
    def memory_ratio(self) -> float:
        """Live bytes over the bytes of a full cache; 0 for an empty one."""
        full = self.total("full_bytes")
        return self.total_bytes / full if full else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return totals, layers and audits as plain numbers, for JSON; the missed mass as the mean of each layer."""
        names = list(asdict(self.layers[0])) if self.layers else []
        totals = {name: self.total(name) for name in names if name.endswith("_bytes")}
        return {
            "tokens_seen": self.tokens_seen,
            "total_bytes": self.total_bytes,
            "memory_ratio": self.memory_ratio,
            **totals,
            "workspace_bytes": self.workspace_bytes,
            "bytes_by_device": self.bytes_by_device(),
            "missed": [None if missed is None else float(missed.mean()) for missed in self.missed],
            "audits": [asdict(audit) for audit in self.audits],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        mebi = 2**20
        stored = sorted({layer.tokens_stored for layer in self.layers if layer.compressed})
        kept = "-".join(str(count) for count in (stored[:1] + stored[1:][-1:])) or "0"
        return (
            f"{self.tokens_seen} tokens seen, {kept} stored a head; {self.total_bytes / mebi:.1f} MiB live "
            f"({self.total('index_bytes') / mebi:.1f} index), a full cache {self.total('full_bytes') / mebi:.1f} MiB; "
            f"a step reads {self.total('step_bytes') / mebi:.2f} MiB, a dense one "
            f"{self.total('dense_step_bytes') / mebi:.2f} MiB"
        )


def live_bytes(tensor: Tensor | None) -> int:
    """Return the bytes of a tensor's storage, which stays allocated while the tensor lives."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


def store_stats(store: KVStore) -> LayerStats:
    """Return the tokens and bytes of one layer's store."""
    keys, values = store.keys, store.values
    if keys is None or values is None:
        return LayerStats(compressed=True)
    batch, kv_heads, _, head_dim = keys.shape
    rows = batch * kv_heads
    dims = (head_dim, values.shape[3])
    decoding = store.decoding if store.closed else None
    index = {} if decoding is None else decoding.named_index()
    tensors = store.tensors()
    counted = ("keys", "values", "value_sum", "residual_bias", *index)
    # Keys and values of a prompt may be slices of one tensor: a storage counts once.
    storages = {t.untyped_storage().data_ptr(): live_bytes(t) for n, t in tensors.items() if n not in counted}
    shared = keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    ring, clock = (None, None) if decoding is None else (decoding.ring, decoding.buffers.clock)
    index_tensors = (*index.values(), tensors.get("value_sum"), tensors.get("residual_bias"))
    # The next step appends its token first.
    stored, shortest = store.stored + 1, store.shortest + 1
    sizes = (keys.itemsize, index["bounds"].itemsize if "bounds" in index else keys.itemsize)
    nominal_read = step_bytes(store.split, stored, dims, sizes, nominal=True, shortest=shortest)
    dense = rows * (store.seen + 1) * sum(dims)
    return LayerStats(
        compressed=True,
        tokens_seen=store.seen,
        tokens_stored=store.stored,
        key_bytes=live_bytes(keys),
        value_bytes=0 if shared else live_bytes(values),
        index_bytes=sum(map(live_bytes, index_tensors)),
        token_budget=budget_of(store.split),
        expected_error=None if decoding is None else decoding.expected_error,
        other_bytes=sum(storages.values()) + live_bytes(clock) + (0 if ring is None else ring.held_bytes),
        device=str(keys.device),
        full_bytes=rows * store.seen * sum(dims) * keys.itemsize,
        step_bytes=rows * step_bytes(store.split, stored, dims, sizes, shortest=shortest),
        dense_step_bytes=dense * keys.itemsize,
        nominal_step_bytes=rows * nominal_read,
        nominal_dense_step_bytes=dense * NOMINAL_ITEMSIZE,
    )


def budget_of(split: BudgetSplit | None) -> int | None:
    """Return the budget of a split that evicts or selects; None for one that keeps and reads all tokens."""
    return None if split is None or (split.top_k is None and split.kept_tokens is None) else split.token_budget


def step_bytes(
    split: BudgetSplit | None,
    stored: int,
    dims: tuple[int, int],
    itemsizes: tuple[int, int],
    *,
    nominal: bool = False,
    shortest: int = 0,
) -> int:
    """Return the bytes of index, keys and values that a decode step reads per row and KV head.

    Args:
        split: the tokens that a step may read, or None for all tokens.
        stored: tokens of the longest row, the step's own included.
        dims: D and Dv.
        itemsizes: bytes of an element of keys and values, and of a page bound.
        nominal: whether to count as budgets do (16 bits, only the pages in use, no scores of an oracle), or the bytes
            that kernels read (`itemsizes`, whole tiles of the index).
        shortest: tokens of the shortest row, the step's own included; 0 if all rows have `stored`.
    """
    size, index_size = (NOMINAL_ITEMSIZE, NOMINAL_ITEMSIZE) if nominal else itemsizes
    if split is None or split.top_k is None or stored <= split.token_budget:
        return stored * sum(dims) * size
    # If a row has at most t tokens, it attends to all of them, and every row reads t slots.
    attended = split.token_budget if 0 < shortest <= split.token_budget else split.top_k
    read = min(attended, stored) * sum(dims) * size
    index = index_of(split)
    if index is not None and not (nominal and split.oracle):
        read += index.read_bytes(stored, dims[0], index_size, nominal=nominal)
    if split.residual:
        read += dims[1] * (NOMINAL_ITEMSIZE if nominal else torch.float64.itemsize)
    return read
