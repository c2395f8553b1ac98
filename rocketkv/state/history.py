"""All tokens of a conversation, for a store that decodes from one turn's selection of them.

Source: paper (arXiv 2502.14051), section 3.5, "RocketKV-MT". Nothing is evicted for good. At the end of a prompt, the
history keeps all keys and values, and the store keeps those that stage 1 selects for decoding. At the next prompt, all
tokens return to the store, the decoded ones included; the prompt attends to them, and stage 1 selects again. Slot and
position in the sequence are equal. Between prompts a history may be on another device, in pinned memory if that is the
host. Then the copy to the host overlaps the computation of the layers behind, and the copy back of each layer that of
the layer before it.

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
from .transfer import Fetched, buffer_like, copy_tokens, overlaps

NAMES = ("keys", "values", "positions")


@dataclass(eq=False, frozen=True)
class HistorySnapshot:
    """The state of one history at one time: its buffers, and its number of tokens in them.

    `held` tokens of the buffer `keys` must not be overwritten, also while the store uses that buffer for a prompt.
    """

    life: object
    tensors: dict[str, Tensor]
    seen: int
    keys: Tensor | None
    held: int


class History:
    """All keys and values of one layer's sequence while its store decodes; empty while a prompt runs on one device.

    Args:
        device: device of the buffers between prompts, or None for the store's device.

    Attributes:
        keys: [B, Hkv, capacity, D], or None.
        values: [B, Hkv, capacity, Dv], or None.
        positions: [B, 1, capacity] int32, each slot's position in the sequence, -1 for padding; None without padding.
        seen: tokens of the sequence in this history.
        following: the next layer's history, which is copied back while this layer computes; None in the last layer, and
            in a copy until its first forward. References point one way: a cycle would keep the cache alive.
    """

    keys: Tensor | None
    values: Tensor | None
    positions: Tensor | None

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.following: History | None = None
        self.clear()

    def clear(self) -> None:
        """Drop everything; snapshots become invalid."""
        self._home: torch.device | None = None  # device of the store
        self.keys = self.values = self.positions = None
        self.seen = 0
        self._fetched: Fetched | None = None
        self._copying: torch.cuda.Stream | None = None  # with copies to the host that may not have arrived
        self._life = object()
        self._snapshots: list[weakref.ref[HistorySnapshot]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the snapshots, which belong to this history, and copies in progress."""
        self._arrive()
        left_out = ("_life", "_snapshots", "_fetched", "_copying", "following")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without snapshots."""
        self._life, self._snapshots, self._fetched, self._copying, self.following = object(), [], None, None, None
        self.__dict__.update(state)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the history by name."""
        self._arrive()
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    @torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
    def keep(self, store: KVStore) -> None:
        """Keep the tokens of a prompt that is about to end; on one device, keep its buffers without a copy.

        Args:
            store: the layer's store, with an open prompt that has every token of the sequence.

        Raises:
            ValueError: the store has no open prompt.
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
        """Load the tokens of a saved history: all tokens that a store has seen.

        Raises:
            ValueError: their shapes do not fit the store.
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
            setattr(self, name, buffer_like(tensor, store.seen, store.seen, self.device or self._home))
        self.seen = store.seen

    @torch.inference_mode(False)
    def absorb(self, store: KVStore, room: int = 0) -> None:
        """Append the tokens that a store has decoded since the last call.

        Args:
            store: the layer's store, its prompt closed.
            room: tokens to allocate room for, which will follow before the next call.
        """
        decoded = self._decoded(store)
        if decoded is not None:
            self._append(*decoded, None, room)
            if self._copying is not None:
                # The store's buffers may be written next.
                torch.cuda.current_stream(decoded[0].device).wait_stream(self._copying)
            self.seen += decoded[0].shape[2]

    def resume(self, store: KVStore, given: int) -> None:
        """Return all tokens to a store, for another prompt that begins with `given` tokens.

        Args:
            store: the layer's store, its last prompt closed.
            given: tokens to allocate room for.

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
        # The store owns the buffers until its prompt ends: a buffer that grows must not exist twice.
        self.keys = self.values = self.positions = None
        self.seen = 0

    @torch.inference_mode(False)
    def _send(self, store: KVStore, given: int) -> None:
        """Run `resume` from another device."""
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
        self.absorb(store, given)
        keys, values, positions = fetched.arrived()
        if decoded is not None:
            # Decoded tokens are already on the store's device, and the copy in progress lacks them.
            for buffer, new in zip((keys, values), decoded, strict=True):
                buffer[:, :, held : self.seen].copy_(new)
            if positions is not None:
                arrived = torch.arange(held, self.seen, dtype=torch.int32, device=positions.device)
                positions[:, :, held : self.seen] = arrived
        store.reopen(keys, values, positions, self.seen)

    def head(self, store: KVStore, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Return keys [S, D] and values [S, Dv] of all tokens of a row and KV head, on the history's device.

        Args:
            store: the layer's store, its prompt closed.
            row: row of the batch.
            head: KV head.

        Raises:
            ValueError: nothing was kept.
        """
        if self.keys is None or self.values is None:
            raise ValueError("there is no history")
        self._arrive()
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
        """Return keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] that a store has decoded and the history lacks."""
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
        """Drop the tokens from position `length` on."""
        if length < self.seen:
            self.seen, self._fetched = length, None

    def guard(self, store: KVStore, length: int) -> None:
        """Copy the buffers of an open prompt if a snapshot needs more than `length` of their tokens."""
        if any(taken.keys is store.keys and taken.held > length for taken in self._living()):
            store.prompt.copy_buffers()

    def snapshot(self, store: KVStore) -> HistorySnapshot:
        """Return the present state for `restore`, in addition to the store's snapshot. Copies nothing."""
        lent = self.keys is None
        keys, held = (store.keys, store.stored) if lent else (self.keys, self.seen)
        taken = HistorySnapshot(self._life, self.tensors(), self.seen, keys, held)
        self._snapshots = [*(reference for reference in self._snapshots if reference() is not None), weakref.ref(taken)]
        return taken

    def restore(self, snapshot: HistorySnapshot) -> None:
        """Return to a snapshot.

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
        """Copy the buffers before slots from `start` on are written, if a snapshot needs these slots."""
        if any(taken.keys is self.keys and taken.held > start for taken in self._living()):
            for name, tensor in self.tensors().items():
                setattr(self, name, buffer_like(tensor, tensor.shape[2], start, tensor.device))

    def _append(self, keys: Tensor, values: Tensor, positions: Tensor | None, room: int = 0) -> None:
        """Append tokens to the buffers.

        Args:
            keys: [B, Hkv, n, D].
            values: [B, Hkv, n, Dv].
            positions: [B, 1, n] int32, or None without padding.
            room: slots to allocate beyond these tokens if the buffers grow.
        """
        start, stop = self.seen, self.seen + keys.shape[2]
        if self.keys is not None and (stop > self._capacity or self.keys.is_inference()):
            self._arrive()  # the buffers grow
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
                # Grow by half, so that a long conversation is rarely copied.
                capacity = stop + room if buffer is None else max(stop + room, start + start // 2)
                like = new if buffer is None else buffer
                buffer = buffer_like(like, capacity, 0 if buffer is None else start, self.device or new.device)
                setattr(self, name, buffer)
            if new.is_cuda and not buffer.is_cuda:
                self._start_copy(buffer[:, :, start:stop], new)
            else:
                copy_tokens(buffer[:, :, start:stop], new)

    def _start_copy(self, target: Tensor, source: Tensor) -> None:
        """Copy from a GPU to the host on a stream of its own, which does not wait for later computations."""
        current = torch.cuda.current_stream(source.device)
        if self._copying is None:
            self._copying = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]  # PyTorch's own
        self._copying.wait_stream(current)
        with torch.cuda.stream(self._copying):
            copy_tokens(target, source)
        source.record_stream(self._copying)

    def _arrive(self) -> None:
        """Wait for the copies to the host, before it reads the buffers: once a turn, if they grow."""
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.synchronize()

    @property
    def _capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @torch.inference_mode(False)
    def _fetch(self, device: torch.device, room: int, stream: "torch.cuda.Stream | None" = None) -> "Fetched":
        """Start to copy everything to a device, into buffers with room for more tokens."""
        held, capacity = self._held(), self.seen + room
        if device.type != "cuda":
            self._arrive()
        copies = [buffer_like(tensor, capacity, 0, device) for tensor in held]
        if device.type != "cuda":
            for copy, tensor in zip(copies, held, strict=True):
                copy[:, :, : self.seen].copy_(tensor[:, :, : self.seen])
            return Fetched(copies, self.seen, room)
        stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
        # The current stream allocated the buffers, and may still use their memory for something else.
        stream.wait_stream(torch.cuda.current_stream(device))
        if self._copying is not None:
            stream.wait_stream(self._copying)
        with torch.cuda.stream(stream):
            for copy, tensor in zip(copies, held, strict=True):
                copy_tokens(copy[:, :, : self.seen], tensor[:, :, : self.seen])
                copy.record_stream(stream)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
            done.record(stream)
        return Fetched(copies, self.seen, room, stream, done)

    def _held(self) -> list[Tensor]:
        return [tensor for tensor in (self.keys, self.values, self.positions) if tensor is not None]
