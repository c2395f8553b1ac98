"""Snapshots of a store: return to an earlier state without recomputing anything.

A snapshot refers to the buffers that the store had when it was taken. Tokens are appended behind its own, and a
prompt's end allocates new buffers, so usually nothing is copied. Before a store overwrites slots of a living snapshot
(when it rolls, is cropped, or returns to an older snapshot), the snapshot copies those slots, from the first changed
one on. Buffers never move: a restore writes into the snapshot's buffers.

Letters: B batch, Hkv KV heads, N slots, P page size.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.pages import TILE_PAGES, PageIndex, movable
from .decoding import DecodeTokens
from .lens import SeqLens
from .prompt import PromptTokens
from .protection import RowMarks

if TYPE_CHECKING:
    from .store import KVStore

# Tensors that are written slot by slot, or reordered with the rows. Small tensors are always copied: seq_lens, the
# query ring and, in static buffers, the residual's bias. A prompt's queries and outputs are replaced, never written;
# the sum of values is recomputed.
GUARDED = ("keys", "values", "bounds", "codes", "scales", "mean", "balance", "positions")


@dataclass(eq=False, kw_only=True)
class StoreSnapshot:
    """The state of one store at one time.

    Attributes:
        life: identifies the store's life, from one `clear` to the next.
        phase: a copy of the store's phase, which refers to the same tensors; None before the first token.
        tensors: the tensors of that phase by name.
        copies: copies of small tensors that are written in place, by name.
        lens: a copy of the host's counts.
        marks: marks of the rows.
        complete: whether every token seen was stored.
        restorable: least length that a crop can return to.
        saved: by name, the first overwritten slot (or tile of page bounds) of a tensor, and its contents from there on.
        changed: if anything is saved, the first overwritten slot.
        common: if anything is saved, tokens of the sequence that stayed the same.
    """

    life: object
    phase: PromptTokens | DecodeTokens | None
    tensors: dict[str, Tensor]
    copies: dict[str, Tensor]
    lens: SeqLens
    marks: tuple[RowMarks, ...] | None
    complete: bool
    restorable: int
    saved: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    changed: int = 0
    common: int = 0

    def changes(self) -> tuple[int, int]:
        """Return the first slot that a restore overwrites, and the length of the unchanged prefix in tokens."""
        if not self.saved:
            return self.lens.shortest, self.lens.seen
        return min(self.lens.shortest, self.changed), min(self.lens.seen, self.common)

    def _span(self, name: str, start: int) -> tuple[int, int]:
        """Return the range of a tensor's third dimension that has the slots from `start` on."""
        if name in ("mean", "balance"):  # written only together with everything else
            return 0, self.tensors[name].shape[2] if start == 0 else 0
        index = self.phase.index if isinstance(self.phase, DecodeTokens) else None
        if name != "bounds" or not isinstance(index, PageIndex):
            return start, self.lens.longest
        first, end = start // index.page_size, self.lens.longest // index.page_size  # of the full pages
        return (first // TILE_PAGES, -(-end // TILE_PAGES)) if first < end else (end, end)

    @torch.inference_mode(False)
    def save(self, start: int, common: int, written: set[int]) -> None:
        """Copy the slots from `start` on of tensors that are about to be written.

        Args:
            start: the first slot that will be written.
            common: tokens of the sequence that stay the same.
            written: the `id` of each tensor that will be written.
        """
        self.changed = min(start, self.changed) if self.saved else start
        self.common = min(common, self.common) if self.saved else common
        for name in GUARDED:
            tensor = self.tensors.get(name)
            if tensor is None or id(tensor) not in written:
                continue
            first, stop = self._span(name, start)
            known = self.saved.get(name)
            stop = stop if known is None else known[0]
            if first < stop:
                part = movable(tensor)[:, :, first:stop].clone()
                self.saved[name] = (first, part if known is None else torch.cat((part, known[1]), dim=2))

    def restored_phase(self) -> PromptTokens | DecodeTokens | None:
        """Write the saved slots and copies back, and return the phase with which the store continues."""
        for name, (first, part) in self.saved.items():
            held = movable(self.tensors[name])
            if isinstance(self.phase, DecodeTokens):
                held[:, :, first : first + part.shape[2]] = part
            else:
                # A prompt's first tensors come from the model and may be read-only here; nothing else refers to them.
                self.tensors[name] = torch.cat((held[:, :, :first], part), dim=2)
        self.saved.clear()
        for name, copied in self.copies.items():
            self.tensors[name].copy_(copied)
        phase = copy_phase(self.phase)
        if phase is not None:
            phase.set_tensors(self.tensors)
        return phase


def copy_phase(phase: PromptTokens | DecodeTokens | None) -> PromptTokens | DecodeTokens | None:
    """Return a copy of a phase that refers to the same tensors."""
    if isinstance(phase, DecodeTokens) and phase.ring is not None:
        return replace(phase, ring=replace(phase.ring, saved=None))
    return None if phase is None else replace(phase)


class Snapshots:
    """The living snapshots of one store, from one `clear` to the next; a copy of the store starts without any.

    Attributes:
        life: identifies the store's life in its snapshots.
        used: slots in use before the last crops, rolls and restores; slots from there on are empty.
    """

    def __init__(self) -> None:
        self.life = object()
        self.used = 0
        self._taken: list[weakref.ref[StoreSnapshot]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the snapshots, which belong to this store and not to its copy."""
        return {"used": self.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without snapshots."""
        self.life, self.used, self._taken = object(), state["used"], []

    def add(self, snapshot: StoreSnapshot) -> None:
        """Keep a weak reference to a snapshot."""
        self._taken = [*(taken for taken in self._taken if taken() is not None), weakref.ref(snapshot)]

    def living(self) -> Iterator[StoreSnapshot]:
        """Iterate over the snapshots that are still referenced."""
        for reference in self._taken:
            taken = reference()
            if taken is not None:
                yield taken

    def save_before_write(
        self, start: int, common: int, written: Iterable[Tensor], *, used: int, but: StoreSnapshot | None = None
    ) -> None:
        """Make every snapshot copy the slots that are about to be overwritten.

        Args:
            start: the first slot that will be written.
            common: tokens of the sequence that stay the same; snapshots of no more tokens need no copy.
            written: the tensors that will be written.
            used: slots in use now.
            but: a snapshot to leave out.
        """
        self.used = max(self.used, used)
        ids = {id(tensor) for tensor in written}
        for taken in self.living():
            if taken is not but and taken.lens.seen > common:
                taken.save(start, common, ids)


@torch.inference_mode(False)
def take_snapshot(store: "KVStore") -> StoreSnapshot:
    """Return the present state of a store; see `KVStore.snapshot`."""
    lens = store.settled()
    copies = {}
    if isinstance(store.phase, DecodeTokens):
        names = ("seq_lens", "query_ring", "residual_bias") if store.in_place else ("seq_lens", "query_ring")
        copies = {name: tensor.clone() for name, tensor in store.tensors().items() if name in names}
    taken = StoreSnapshot(
        life=store.snapshots.life,
        phase=copy_phase(store.phase),
        tensors=store.tensors(),
        copies=copies,
        lens=lens.copy(),
        marks=store.marks,
        complete=store.complete,
        restorable=store.restorable,
    )
    store.snapshots.add(taken)
    return taken


def restore_snapshot(store: "KVStore", snapshot: StoreSnapshot) -> None:
    """Return a store to a snapshot; see `KVStore.restore`."""
    if snapshot.life is not store.snapshots.life:
        raise ValueError("this snapshot is of another store, or of this one before it was cleared")
    held, now = snapshot.tensors, store.tensors()
    start, common = snapshot.changes()
    used = store.lens.longest
    store.snapshots.save_before_write(start, common, held.values(), used=used, but=snapshot)
    same = all(held.get(name) is now.get(name) for name in ("keys", "values", "positions"))
    behind = max(store.snapshots.used, snapshot.lens.longest) if same and not store.lens.uncounted else None
    store.phase = snapshot.restored_phase()
    store.lens = snapshot.lens.copy()
    store.lens.uncounted = store.lens.captured
    store.marks, store.complete, store.restorable = snapshot.marks, snapshot.complete, snapshot.restorable
    if isinstance(store.phase, DecodeTokens):
        buffers = store.phase.buffers
        if buffers.clock is not None:
            buffers.clock.fill_(store.lens.seen)
        store.phase.empty_behind(store.lens, behind)
        store.phase.sum_values(store.lens)
        store.snapshots.used = 0


def object_state(owner: Any, *, written: bool) -> dict[str, Any]:
    """Return the attributes of an object, with its tensors and dictionaries of tensors, for `set_object_state`.

    Args:
        owner: the object.
        written: whether the object writes into its tensors, so that they are copied; if not, it only replaces them.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(each) for name, each in value.items()}
        return value.clone() if written and isinstance(value, Tensor) else value

    return {name: kept(value) for name, value in vars(owner).items()}


def set_object_state(owner: Any, state: dict[str, Any], *, written: bool) -> None:
    """Set the attributes from `object_state`; an object that writes into its tensors keeps them."""

    def given(value: Any, now: Any) -> Any:
        if isinstance(value, dict):
            return {name: given(each, now.get(name) if isinstance(now, dict) else None) for name, each in value.items()}
        if not written or not isinstance(value, Tensor):
            return value
        fits = isinstance(now, Tensor) and now.shape == value.shape and now.dtype == value.dtype
        if fits and (torch.is_inference_mode_enabled() or not now.is_inference()):
            return now.copy_(value)
        return value.clone()

    attributes = {name: given(value, vars(owner).get(name)) for name, value in state.items()}
    vars(owner).clear()
    vars(owner).update(attributes)
