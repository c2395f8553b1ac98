"""Every token of a conversation, beside the store of the few that one turn's prompt selected (paper, RocketKV-MT).

Nothing is evicted for good: at the end of each prompt all keys and values come here, and the store keeps those that
stage 1 selects for decoding; at the next prompt they go back, the tokens decoded since included, to be attended to and
selected from anew. Slot and position in the sequence are the same. Between prompts a history may live on another
device, in pinned memory where that is the host: then each layer's way back overlaps the layer before it.

Letters: B batch, Hkv KV heads, D head dim, S tokens of the sequence.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.topk import gather_tokens
from .store import KVStore, alone

NAMES = ("keys", "values", "positions")


@dataclass(eq=False, frozen=True)
class HistorySnapshot:
    """The state of one history at one time: the buffers that it had, and how many tokens of them are its own.

    While a prompt runs on one device, the store has those buffers, and `held` of their tokens are not to be written
    over either.
    """

    life: object
    tensors: dict[str, Tensor]
    seen: int
    keys: Tensor | None
    held: int


class History:
    """All keys and values of one layer's sequence, while its store decodes; empty while a prompt runs on one device.

    Args:
        device: where they live between prompts, or None for the device of the store.

    Attributes:
        keys: [B, Hkv, capacity, D], or None.
        values: [B, Hkv, capacity, Dv], or None.
        positions: [B, 1, capacity] int32, each slot's position in the sequence, -1 for padding; None without padding.
        seen: tokens of the sequence that are here.
        following: the next layer's history, which is fetched while this layer computes; None behind the last, and in a
            copy until its first forward. It points one way only: a ring would outlive its cache.
    """

    keys: Tensor | None
    values: Tensor | None
    positions: Tensor | None

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.following: History | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything; snapshots too."""
        self._home: torch.device | None = None  # of the store
        self.keys = self.values = self.positions = None
        self.seen = 0
        self._fetched: _Fetched | None = None
        self._life = object()
        self._snapshots: list[weakref.ref[HistorySnapshot]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy does not have: snapshots, which are of this history, and what is under way."""
        left_out = ("_life", "_snapshots", "_fetched", "following")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without snapshots."""
        self._life, self._snapshots, self._fetched, self.following = object(), [], None, None
        self.__dict__.update(state)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that lives here, by name."""
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    @torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
    def keep(self, store: KVStore) -> None:
        """Take in the tokens of a prompt that is about to end; on one device its buffers themselves.

        Args:
            store: its prompt not closed, which holds every token of the sequence.

        Raises:
            ValueError: the store holds none.
        """
        prompt = store.prompt
        self._home = prompt.keys.device
        if self.device is None:
            self.keys, self.values, self.positions = alone(prompt.keys), alone(prompt.values), prompt.positions
        else:
            start, stop = self.seen, store.stored
            new = (prompt.keys[:, :, start:stop], prompt.values[:, :, start:stop])
            padded = None if prompt.positions is None else prompt.positions[:, :, start:stop]
            self._append(*new, padded)
        self.seen = store.stored

    @torch.inference_mode(False)
    def fill(self, tensors: dict[str, Tensor], store: KVStore) -> None:
        """Take in the tokens of a history that was saved: all that a store has seen.

        Raises:
            ValueError: they are not those of such a store.
        """
        if store.keys is None or store.values is None:
            raise ValueError("there is no store that a history could belong to")
        batch, kv_heads, _, head_dim = store.keys.shape
        expected: dict[str, tuple[int, ...]] = {
            "keys": (batch, kv_heads, store.seen, head_dim),
            "values": (batch, kv_heads, store.seen, store.values.shape[3]),
        }
        if "positions" in tensors:
            expected["positions"] = (batch, 1, store.seen)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"the tensors of a history do not go together: {found} for {expected}")
        self._home = store.keys.device
        for name, tensor in tensors.items():
            setattr(self, name, _like(tensor, store.seen, store.seen, self.device or self._home))
        self.seen = store.seen

    @torch.inference_mode(False)
    def absorb(self, store: KVStore, room: int = 0) -> None:
        """Take in the tokens that a store has decoded since the last call.

        Args:
            store: its prompt closed.
            room: tokens that will follow before the next call, to make room for.
        """
        decoded = self._decoded(store)
        if decoded is not None:
            self._append(*decoded, None, room)
            self.seen += decoded[0].shape[2]

    def resume(self, store: KVStore, given: int) -> None:
        """Give a store all tokens back, for another prompt that begins with `given` tokens.

        Args:
            store: its last prompt closed.
            given: tokens to make room for.

        Raises:
            ValueError: nothing was kept.
        """
        if self.device is not None:
            self._send(store, given)
            return
        self.absorb(store, given)
        self._protect(self.seen)
        if self.keys is None or self.values is None:
            raise ValueError("there is no history to resume")
        store.reopen(self.keys, self.values, self.positions, self.seen)
        # The store has it all until its prompt ends: a buffer that grows must not live twice.
        self.keys = self.values = self.positions = None
        self.seen = 0

    @torch.inference_mode(False)
    def _send(self, store: KVStore, given: int) -> None:
        """Do what `resume` does, from another device."""
        if self.keys is None or store.keys is None:
            raise ValueError("there is no history to resume")
        held, decoded = self.seen, self._decoded(store)
        room = given + (0 if decoded is None else decoded[0].shape[2])
        fetched, self._fetched = self._fetched, None
        if fetched is None or fetched.seen != held or fetched.room < room:
            fetched = self._fetch(store.keys.device, room)
        following = self.following
        there = None if following is None or following.keys is None else following._home
        if following is not None and there is not None and overlaps(there):
            stream = fetched.stream if there == store.keys.device else None
            following._fetched = following._fetch(there, room, stream)
        self.absorb(store, given)  # a host waits here: what is to run beside the computation has begun
        keys, values, positions = fetched.arrived()
        if decoded is not None:
            # What the store has decoded is there already; what was under way did not know of it.
            for buffer, new in zip((keys, values), decoded, strict=True):
                buffer[:, :, held : self.seen].copy_(new)
            if positions is not None:
                arrived = torch.arange(held, self.seen, dtype=torch.int32, device=positions.device)
                positions[:, :, held : self.seen] = arrived
        store.reopen(keys, values, positions, self.seen)

    def head(self, store: KVStore, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Return keys [S, D] and values [S, Dv] of all tokens of a row and KV head, where they are kept.

        Args:
            store: its prompt closed.
            row: of the batch.
            head: KV head.

        Raises:
            ValueError: nothing was kept.
        """
        if self.keys is None or self.values is None:
            raise ValueError("there is no history")
        held = [self.keys[row, head, : self.seen], self.values[row, head, : self.seen]]
        if self.positions is not None:
            real = self.positions[row, 0, : self.seen] >= 0
            held = [tensor[real] for tensor in held]
        decoded = self._decoded(store)
        if decoded is not None:
            new = (tensor[row, head].to(self.keys.device) for tensor in decoded)
            held = [torch.cat(both) for both in zip(held, new, strict=True)]
        return held[0], held[1]

    def _decoded(self, store: KVStore) -> tuple[Tensor, Tensor] | None:
        """Return keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] that a store has decoded and are not here, or None."""
        count = store.seen - self.seen
        if not store.closed or count <= 0:
            return None
        keys, values, _, seq_lens = store.decoding.buffers[:4]
        if store.uniform:
            first = store.stored - count
            return keys[:, :, first : store.stored], values[:, :, first : store.stored]
        slots = seq_lens.long()[..., None] - count + torch.arange(count, device=seq_lens.device)
        keys, values = gather_tokens(slots, keys, values)
        return keys, values

    @torch.inference_mode(False)
    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by a function of it, for instance to reorder rows (their first dimension)."""
        self._fetched = None
        for name, tensor in self.tensors().items():
            changed = function(tensor)
            setattr(self, name, changed.pin_memory() if tensor.is_pinned() else changed)

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if length < self.seen:
            self.seen, self._fetched = length, None

    def guard(self, store: KVStore, length: int) -> None:
        """Have a store that runs a prompt on our buffers leave those to the snapshots that hold more than `length`."""
        if any(taken.keys is store.keys and taken.held > length for taken in self._living()):
            store.prompt.copy_buffers()

    def snapshot(self, store: KVStore) -> HistorySnapshot:
        """Return the present state, to which `restore` goes back, beside that of the store. It copies nothing."""
        lent = self.keys is None
        keys, held = (store.keys, store.stored) if lent else (self.keys, self.seen)
        taken = HistorySnapshot(self._life, self.tensors(), self.seen, keys, held)
        self._snapshots = [*(reference for reference in self._snapshots if reference() is not None), weakref.ref(taken)]
        return taken

    def restore(self, snapshot: HistorySnapshot) -> None:
        """Go back to a snapshot.

        Raises:
            ValueError: it is of another history, or was taken before this one was cleared.
        """
        if snapshot.life is not self._life:
            raise ValueError("this snapshot is of another history, or of this one before it was cleared")
        self._fetched = None
        for name in NAMES:
            setattr(self, name, snapshot.tensors.get(name))
        self.seen = snapshot.seen

    def _living(self) -> list[HistorySnapshot]:
        return [taken for reference in self._snapshots if (taken := reference()) is not None]

    @torch.inference_mode(False)
    def _protect(self, start: int) -> None:
        """Have buffers of our own before slots from `start` on are written, if a snapshot holds those."""
        if any(taken.keys is self.keys and taken.held > start for taken in self._living()):
            for name, tensor in self.tensors().items():
                setattr(self, name, _like(tensor, tensor.shape[2], start, tensor.device))

    def _append(self, keys: Tensor, values: Tensor, positions: Tensor | None, room: int = 0) -> None:
        """Write tokens behind those that are here.

        Args:
            keys: [B, Hkv, n, D].
            values: [B, Hkv, n, Dv].
            positions: [B, 1, n] int32, or None where all are tokens.
            room: slots to have beyond those, where there are not enough.
        """
        start, stop = self.seen, self.seen + keys.shape[2]
        self._protect(start)
        if positions is not None or self.positions is not None:
            arrived = torch.arange(start, stop, dtype=torch.int32, device=keys.device).expand(keys.shape[0], 1, -1)
            positions = arrived if positions is None else positions
            if self.positions is None:
                first = torch.arange(self._capacity, dtype=torch.int32, device=self.device or keys.device)
                self.positions = first.repeat(keys.shape[0], 1, 1)
        for name, new in (("keys", keys), ("values", values), ("positions", positions)):
            if new is None:
                continue
            buffer: Tensor | None = getattr(self, name)
            if buffer is None or stop > buffer.shape[2] or buffer.is_inference():
                # A conversation goes on: half as much room again spares most copies.
                capacity = stop + room if buffer is None else max(stop + room, start + start // 2)
                like = new if buffer is None else buffer
                buffer = _like(like, capacity, 0 if buffer is None else start, self.device or new.device)
                setattr(self, name, buffer)
            _copy(buffer[:, :, start:stop], new)
            if new.is_cuda and not buffer.is_cuda:
                torch.cuda.current_stream(new.device).synchronize()  # a host may read it next

    @property
    def _capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @torch.inference_mode(False)
    def _fetch(self, device: torch.device, room: int, stream: "torch.cuda.Stream | None" = None) -> "_Fetched":
        """Begin to copy everything to a device, into buffers with room for more tokens."""
        held, capacity = self._held(), self.seen + room
        copies = [_like(tensor, capacity, 0, device) for tensor in held]
        if device.type != "cuda":
            for copy, tensor in zip(copies, held, strict=True):
                copy[:, :, : self.seen].copy_(tensor[:, :, : self.seen])
            return _Fetched(copies, self.seen, room)
        stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
        # The buffers are of the present stream, which may still use the memory for something else.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for copy, tensor in zip(copies, held, strict=True):
                _copy(copy[:, :, : self.seen], tensor[:, :, : self.seen])
                copy.record_stream(stream)
        return _Fetched(copies, self.seen, room, stream)

    def _held(self) -> list[Tensor]:
        return [tensor for tensor in (self.keys, self.values, self.positions) if tensor is not None]


@dataclass(eq=False)
class _Fetched:
    """A history on its way to a device: keys, values and perhaps positions, and the stream that copies them."""

    tensors: list[Tensor]
    seen: int
    room: int
    stream: "torch.cuda.Stream | None" = None

    def arrived(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and positions, there for what runs next."""
        if self.stream is not None:
            torch.cuda.current_stream(self.tensors[0].device).wait_stream(self.stream)
        return self.tensors[0], self.tensors[1], self.tensors[2] if len(self.tensors) > 2 else None


def overlaps(device: torch.device) -> bool:
    """Whether copies to a device run beside what computes there, so that it pays to begin them early."""
    return device.type == "cuda"


def _like(tensor: Tensor, capacity: int, count: int, device: torch.device) -> Tensor:
    """Return a buffer of so many slots on a device, with the first `count` of a tensor's; pinned beside its GPU."""
    pinned = device.type == "cpu" and (tensor.is_cuda or tensor.is_pinned())
    value = 0 if tensor.is_floating_point() else -1
    shape = (*tensor.shape[:2], capacity, *tensor.shape[3:])
    buffer = torch.full(shape, value, dtype=tensor.dtype, device=device, pin_memory=pinned)
    if count:
        buffer[:, :, :count].copy_(tensor[:, :, :count])
    return buffer


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy [B, Hkv, n, ...], between host and device without waiting for it where the host's memory is pinned.

    Head by head there: PyTorch takes what is not contiguous through memory that is not pinned.
    """
    if target.is_cuda == source.is_cuda:
        target.copy_(source)
        return
    for row, from_row in zip(target, source, strict=True):
        for tokens, given in zip(row, from_row, strict=True):
            tokens.copy_(given, non_blocking=True)
