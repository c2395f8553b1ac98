"""Snapshots of a store: back to an earlier state without computing anything again.

A snapshot refers to the buffers that the store had when it was taken. Tokens are added behind those that it holds, and
a prompt's end makes new buffers, so mostly that is all there is to it. What a store is about to write over, because
it rolls, or because a crop or the way back to an older snapshot lets other tokens take the place of later ones, the
snapshots that hold it copy first: from the first slot that will change, and no more. Buffers never move: the way back
writes into those that the snapshot refers to.

Letters: B batch, Hkv KV heads, N slots, P page size.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.indexes import INDEX_TENSORS
from ..core.pages import TILE_PAGES, movable
from .indexed import Indexed

TENSORS = ("keys", "values", *INDEX_TENSORS, "value_sum", "residual_bias", "missed", "positions", "lengths", "window")
# What is written slot by slot, or where rows are reordered. Lengths, the queries of a closed store, and in a static one
# the residual's bias, are few and always copied; those of a prompt are replaced, never written; the sum of values is
# made anew, and what was missed is that of the last step whatever comes back.
GUARDED = ("keys", "values", *INDEX_TENSORS, "positions")
FIELDS = (
    *("decode_capacity", "split", "marks", "closed", "aligned"),
    *("_holes", "_prompt_start", "_complete", "_restorable", "_prompt_end", "_ring_from", "_prompt_stored"),
)


@dataclass(eq=False, kw_only=True)
class StoreSnapshot:
    """The state of one store at one time.

    Attributes:
        life: of the store, from one `clear` to the next.
        home: the tensors that the store had, by name.
        lengths: [B, Hkv] int32, a copy of what they were, or None in a prompt.
        ring: [B, H, W, D], a copy of the queries that a closed store remembers, or None.
        bias: [B, H], a copy of the residual's bias where reordered rows are written in place, or None.
        fields: the store's settings, by name.
        seen: tokens of the sequence.
        stored: slots in use of the longest row.
        shortest: slots in use of the shortest row.
        captured: whether a CUDA graph writes into the store's tensors.
        saved: by name, from which slot (or tile of the index) on its tensor has been written over, and what was there.
        changed: where something has been saved, the first slot from which on that is so.
        common: likewise, tokens of the sequence that were the same for what has been written there.
    """

    life: object
    home: dict[str, Tensor]
    lengths: Tensor | None
    ring: Tensor | None
    bias: Tensor | None
    fields: dict[str, Any]
    seen: int
    stored: int
    shortest: int
    captured: bool
    saved: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    changed: int = 0
    common: int = 0

    def changes(self) -> tuple[int, int]:
        """Return from which slot on the way back to this, and tokens after it, write; how many tokens stay the same."""
        if not self.saved:
            return self.shortest, self.seen
        return min(self.shortest, self.changed), min(self.seen, self.common)

    def _span(self, name: str, start: int) -> tuple[int, int]:
        """Return the entries of a tensor, along its third dimension, that hold what lies from slot `start` on."""
        split = self.fields["split"]
        if name == "mean":  # written only with everything else
            return 0, self.home[name].shape[2] if start == 0 else 0
        if name != "index" or split is None:
            return start, self.stored
        first, end = start // split.page_size, self.stored // split.page_size  # of the full pages
        return (first // TILE_PAGES, -(-end // TILE_PAGES)) if first < end else (end, end)

    @torch.inference_mode(False)
    def save(self, start: int, common: int, written: set[int]) -> None:
        """Copy what is held from slot `start` on in tensors that are about to be written.

        Args:
            start: the first slot that will be.
            common: tokens of the sequence that stay as they are.
            written: the `id` of each of those tensors.
        """
        if self.saved:
            self.changed, self.common = min(start, self.changed), min(common, self.common)
        else:
            self.changed, self.common = start, common
        for name in GUARDED:
            tensor = self.home.get(name)
            if tensor is None or id(tensor) not in written:
                continue
            first, stop = self._span(name, start)
            known = self.saved.get(name)
            stop = stop if known is None else known[0]
            if first < stop:
                part = movable(tensor)[:, :, first:stop].clone()
                self.saved[name] = (first, part if known is None else torch.cat((part, known[1]), dim=2))

    def put_back(self) -> None:
        """Write what was saved back to where it was."""
        for name, (first, part) in self.saved.items():
            held = movable(self.home[name])
            if self.fields["closed"]:
                held[:, :, first : first + part.shape[2]] = part
            else:
                # A prompt's first tensors are the model's own, which may not be writable here; nothing points to them.
                self.home[name] = torch.cat((held[:, :, :first], part), dim=2)
        self.saved.clear()


class Restorable(Indexed):
    """A store's snapshots, and what protects them.

    Attributes:
        positions: [B, 1 or Hkv, capacity] int32, or None.
        aligned: whether slot and position in the sequence are the same for every token.
    """

    positions: Tensor | None
    aligned: bool
    _prompt_end: int  # tokens seen when the prompt was closed: those after it are in every row
    _highest: int  # slots in use before the last crops, rolls and ways back: what lies behind the tokens ends there
    _life: object  # a new one after each `clear`
    _snapshots: list[weakref.ref[StoreSnapshot]]

    def _forget_snapshots(self) -> None:
        """Refuse every snapshot taken so far."""
        self._life, self._snapshots, self._highest = object(), [], 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the snapshots: they are of this store, not of its copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_life", "_snapshots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without snapshots."""
        self._forget_snapshots()
        self.__dict__.update(state)

    @property
    def _in_place(self) -> bool:
        """Whether rows are reordered in place: buffers of a static store stay where they are."""
        return self.decode_capacity is not None and self.closed

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that lives in this store, by name: the one walk for counting, copying and moving."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    @torch.inference_mode(False)
    def snapshot(self) -> StoreSnapshot:
        """Return the present state, to which `restore` goes back.

        It copies no keys and values; a rolling store, a crop or a way back may have it copy some later. While it
        lives, so do the buffers of its time.

        Raises:
            ValueError: a static store has taken more tokens than it has room for.
        """
        seen, stored, shortest = self.seen, self.stored, self.shortest
        taken = StoreSnapshot(
            life=self._life,
            home=self.tensors(),
            lengths=None if self.lengths is None else self.lengths.clone(),
            ring=self.window.clone() if self.closed and self.window is not None else None,
            bias=self.residual_bias.clone() if self._in_place and self.residual_bias is not None else None,
            fields={name: getattr(self, name) for name in FIELDS},
            seen=seen,
            stored=stored,
            shortest=shortest,
            captured=self._captured,
        )
        self._snapshots = [reference for reference in self._snapshots if reference() is not None]
        self._snapshots.append(weakref.ref(taken))
        return taken

    def restore(self, snapshot: StoreSnapshot) -> None:
        """Go back to a snapshot, as often as you like: exactly, and without computing anything again.

        Raises:
            ValueError: the snapshot is of another store, or was taken before this one was cleared.
        """
        if snapshot.life is not self._life:
            raise ValueError("this snapshot is of another store, or of this one before it was cleared")
        self._protect(*snapshot.changes(), tensors=snapshot.home.values(), but=snapshot)
        same = all(snapshot.home.get(name) is getattr(self, name) for name in ("keys", "values", "positions"))
        used = max(self._highest, snapshot.stored) if same and self.counted else None
        snapshot.put_back()
        for name in TENSORS:
            setattr(self, name, snapshot.home.get(name))
        for name, value in snapshot.fields.items():
            setattr(self, name, value)
        self._seen, self._stored, self._shortest = snapshot.seen, snapshot.stored, snapshot.shortest
        self._uncounted, self._captured = False, snapshot.captured
        self._clock_shows = snapshot.seen
        if self.ticks is not None:
            self.ticks.fill_(snapshot.seen)
        if self.window is not None and snapshot.ring is not None:
            self.window.copy_(snapshot.ring)
        if self.residual_bias is not None and snapshot.bias is not None:
            self.residual_bias.copy_(snapshot.bias)
        if self.lengths is not None and snapshot.lengths is not None:
            self.lengths.copy_(snapshot.lengths)
            self._empty_behind(self.lengths, used)
            self._sum_again()
            self._highest = 0

    def _empty_behind(self, lengths: Tensor, used: int | None) -> None:
        """Empty the slots behind each row's tokens: up to slot `used`, or all of them.

        An append to rows of different lengths leaves a slot that no token took as it is, and NaN times nothing is NaN.
        """
        first = self._shortest
        for tensor, value in ((self.keys, 0), (self.values, 0), (self.positions, -1)):
            if tensor is not None:
                room = tensor[:, :, first:used]
                empty = torch.arange(first, first + room.shape[2], device=room.device) >= lengths[..., None]
                room.masked_fill_(empty.view(*empty.shape, *[1] * (room.dim() - 3)), value)

    def _living(self) -> Iterator[StoreSnapshot]:
        """Iterate over the snapshots that somebody still holds."""
        for reference in self._snapshots:
            taken = reference()
            if taken is not None:
                yield taken

    def _protect(
        self, start: int, common: int, *, tensors: Iterable[Tensor] | None = None, but: StoreSnapshot | None = None
    ) -> None:
        """Have every snapshot copy what is about to be written over.

        Args:
            start: the first slot that will be.
            common: tokens of the sequence that stay as they are: snapshots of no more have nothing to lose.
            tensors: which tensors will be written; None for the store's.
            but: a snapshot to leave out.
        """
        self._highest = max(self._highest, self._stored)
        written = {id(tensor) for tensor in (self.tensors().values() if tensors is None else tensors)}
        for taken in self._living():
            if taken is not but and taken.seen > common:
                taken.save(start, common, written)

    def _protect_from_crop(self, length: int) -> None:
        """Have snapshots copy what a crop to `length` tokens, and tokens after it, write over."""
        if not self.closed or length >= self._prompt_end:
            start = self.shortest - (self.seen - length)
        else:
            start = length if self.aligned else 0
        self._protect(max(0, start), length)

    def advance_uncounted(self, *, captured: bool) -> None:
        """Note that the device takes a step, or will, which the host does not count; see `TokenCounts`."""
        super().advance_uncounted(captured=captured)
        if captured:
            for taken in self._living():
                taken.captured |= taken.home.get("keys") is self.keys


def kept_state(owner: Any, *, written: bool) -> dict[str, Any]:
    """Return the attributes of an object, its tensors among them, also those in dictionaries, to `give_back` later.

    Args:
        owner: the object.
        written: whether it writes into its tensors, which are copied then; otherwise it only ever replaces them.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(each) for name, each in value.items()}
        return value.clone() if written and isinstance(value, Tensor) else value

    return {name: kept(value) for name, value in vars(owner).items()}


def give_back(owner: Any, state: dict[str, Any], *, written: bool) -> None:
    """Give an object the attributes of `kept_state` back, in its own tensors where it writes into them."""

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
