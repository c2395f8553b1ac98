"""The keys, values and index of one layer, for all sequences of a batch.

A store is empty or in one of two phases. In a *prompt*, tokens are stored in their order, padding included, and all of
them are attended to. `compress.close_prompt` runs stage 1, drops padding and compacts the kept tokens for *decoding*:
each row from slot 0 on, with room for generated tokens, and an index. Another prompt may follow.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, W observation window, P page size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.decode import Fill, append_token
from ..core.pages import movable, restored
from ..core.residual import subtract_last
from .decoding import DecodeTokens, grown_capacity
from .lens import SeqLens
from .prompt import PromptTokens
from .protection import RowMarks
from .snapshot import Snapshots, StoreSnapshot, restore_snapshot, take_snapshot


def alone(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its storage is larger than the tensor."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.itemsize else tensor.clone()


class KVStore:
    """Keys, values and index of one layer, through prompts and decoding.

    Attributes:
        lens: token counts on the host.
        phase: an open prompt, or the tokens of decoding; None before the first token.
        marks: protected ranges and message starts of each row, or None.
        complete: whether every token seen is still stored.
        restorable: least length that a crop can return to, unless `complete`.
        snapshots: the living snapshots.
    """

    lens: SeqLens
    phase: PromptTokens | DecodeTokens | None
    marks: tuple[RowMarks, ...] | None
    complete: bool
    restorable: int
    snapshots: Snapshots

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything; snapshots become invalid."""
        self.lens = SeqLens()
        self.phase = self.marks = None
        self.complete = True
        self.restorable = 0
        self.snapshots = Snapshots()

    @property
    def prompt(self) -> PromptTokens:
        """The open prompt.

        Raises:
            ValueError: there is none.
        """
        if isinstance(self.phase, PromptTokens):
            return self.phase
        raise ValueError("the store reads no prompt: extend it with a prompt's tokens first")

    @property
    def decoding(self) -> DecodeTokens:
        """The tokens of decoding.

        Raises:
            ValueError: no prompt has been closed.
        """
        if isinstance(self.phase, DecodeTokens):
            return self.phase
        raise ValueError("a decode step needs a store whose prompt is closed")

    @property
    def closed(self) -> bool:
        """Whether the prompt has ended."""
        return isinstance(self.phase, DecodeTokens)

    @property
    def keys(self) -> Tensor | None:
        """The keys [B, Hkv, capacity, D], or None before the first token."""
        return None if self.phase is None else self.phase.keys

    @property
    def values(self) -> Tensor | None:
        """The values [B, Hkv, capacity, Dv], or None before the first token."""
        return None if self.phase is None else self.phase.values

    @property
    def split(self) -> BudgetSplit | None:
        """The tokens and bytes that a step may read, or None in a prompt."""
        return self.phase.split if isinstance(self.phase, DecodeTokens) else None

    @property
    def seen(self) -> int:
        """Tokens of the sequence so far, padding and evicted ones included."""
        return self.settled().seen

    @property
    def stored(self) -> int:
        """N, tokens that the longest row stores."""
        return self.settled().longest

    @property
    def shortest(self) -> int:
        """Tokens that the shortest row stores."""
        return self.settled().shortest

    @property
    def uniform(self) -> bool:
        """Whether every row stores the same number of tokens."""
        lens = self.settled()
        return lens.shortest == lens.longest

    @property
    def capacity(self) -> int:
        """Slots of the buffers."""
        return 0 if self.phase is None else self.phase.keys.shape[2]

    @property
    def open_tokens(self) -> int:
        """Tokens of the open prompt; 0 while decoding."""
        return self.lens.longest - self.phase.start if isinstance(self.phase, PromptTokens) else 0

    @property
    def generated(self) -> int:
        """Stored tokens that were generated since the prompt."""
        return self.stored - self.decoding.prompt_stored

    def settled(self) -> SeqLens:
        """Return the counts, including steps that only the device has counted; may wait for the device.

        Raises:
            ValueError: the device ran more steps than static buffers have room for.
        """
        lens = self.lens
        if not lens.uncounted or not isinstance(self.phase, DecodeTokens) or self.phase.buffers.clock is None:
            return lens
        if not lens.settle(self.phase.buffers.clock, self.capacity):
            raise ValueError(self.out_of_room())
        return lens

    def out_of_room(self) -> str:
        """Return the error message for full static buffers."""
        room = self.decoding.decode_capacity
        return (
            f"the cache has room for decode_capacity={room} generated tokens, and all of it is used; "
            "raise decode_capacity to the tokens that you will generate, or leave it None for a cache that grows; with "
            "when_full='evict' and a method that evicts by attention, twice window_size is enough for any length"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the store by name, apart from the clock: for counting, copying and moving."""
        return {} if self.phase is None else self.phase.tensors()

    @torch.inference_mode(False)
    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by a function of it, for instance to reorder rows (their first dimension)."""
        if self.phase is None:
            return
        in_place = self.in_place
        if in_place:
            self._save_before_write(0, 0)
        new = {}
        for name, tensor in self.tensors().items():
            changed = restored(function(movable(tensor)), tensor.dtype)
            if in_place and changed.shape == tensor.shape:
                tensor.copy_(changed)  # static buffers keep their addresses
            else:
                new[name] = changed
        self.phase.set_tensors(new)

    @property
    def in_place(self) -> bool:
        """Whether rows are reordered in place: static buffers keep their addresses."""
        return isinstance(self.phase, DecodeTokens) and self.phase.decode_capacity is not None

    def extend(self, key: Tensor, value: Tensor, valid: Tensor | None = None, *, expected: int = 0) -> None:
        """Append tokens of a prompt.

        Args:
            key: [B, Hkv, n, D].
            value: [B, Hkv, n, Dv].
            valid: [B, n] bool, False at padding, or None.
            expected: tokens of the sequence when the prompt ends, to allocate room for; 0 if unknown.
        """
        key, value = key.detach(), value.detach()
        if self.closed:
            self._open_prompt()
        lens = self.lens
        start, stop = lens.longest, lens.longest + key.shape[2]
        if self.phase is None:
            # No copy: stage 1 compacts an unchunked prompt right after this. But a prompt that continues must not keep
            # the output of a fused projection alive.
            ends = stop >= expected > 0
            self.phase = PromptTokens(keys=key if ends else alone(key), values=value if ends else alone(value))
        else:
            prompt = self.prompt
            foreign = prompt.keys.is_inference() and not torch.is_inference_mode_enabled()
            if stop > self.capacity or foreign:
                prompt.reserve(max(stop, start + expected - lens.seen if expected else 2 * start), start)
            prompt.keys[:, :, start:stop] = key
            prompt.values[:, :, start:stop] = value
        prompt = self.prompt
        if valid is not None or prompt.positions is not None:
            prompt.write_positions(start, stop, lens.seen, valid)
        prompt.holes |= valid is not None
        lens.seen += stop - start
        lens.longest = lens.shortest = stop

    def _open_prompt(self) -> None:
        """Switch from decoding to a prompt; slots beyond a row's length, whose position is -1, are holes."""
        decoding, lens = self.decoding, self.settled()
        self.phase = PromptTokens(
            keys=decoding.keys,
            values=decoding.values,
            positions=decoding.positions,
            start=lens.longest,
            holes=lens.shortest < lens.longest,
            aligned=decoding.aligned,
            earlier=decoding.prompt_end,
        )

    def reopen(self, keys: Tensor, values: Tensor, positions: Tensor | None, stored: int) -> None:
        """Switch from decoding to a prompt in other buffers, which have every token of the sequence.

        Args:
            keys: [B, Hkv, capacity, D].
            values: [B, Hkv, capacity, Dv].
            positions: [B, 1, capacity] int32, -1 for padding, or None without padding.
            stored: slots in use.
        """
        holes = positions is not None
        self.settled()
        self.phase = PromptTokens(keys=keys, values=values, positions=positions, start=stored, holes=holes)
        self.lens.longest = self.lens.shortest = stored
        self.complete = True

    def allow_crops(self) -> None:
        """Allow crops to any length, for a history that keeps evicted tokens; not if protected tokens were moved."""
        if not self.decoding.moved:
            self.restorable = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append one generated token to every row without attending; grows if needed.

        Args:
            key: [B, Hkv, D].
            value: [B, Hkv, Dv].

        Raises:
            ValueError: the prompt is not closed.
        """
        decoding, fill = self.next_fill()
        append_token(None, key, value, decoding.buffers, decoding.index, fill)
        self.lens.advance()

    def next_fill(self) -> tuple[DecodeTokens, Fill]:
        """Make room for one more token in every row, and return the stored tokens and their fill.

        Raises:
            ValueError: the prompt is not closed, or the buffers are static and full.
        """
        decoding, lens = self.phase, self.lens
        if lens.uncounted:
            self.settled()
        if not isinstance(decoding, DecodeTokens):
            raise ValueError("a decode step needs a store whose prompt is closed")
        if lens.longest == decoding.buffers.keys.shape[2]:
            self._grow_or_roll(decoding)
        return decoding, Fill(lens.longest, lens.shortest, lens.seen)

    def _grow_or_roll(self, decoding: DecodeTokens) -> None:
        """Grow by a step, or roll."""
        if decoding.decode_capacity is not None:
            raise ValueError(self.out_of_room())
        kept, stored = decoding.split.kept_tokens, self.lens.longest
        if not decoding.split.rolling or kept is None or stored <= kept:
            decoding.reserve(grown_capacity(stored), stored)
            return
        self._save_before_write(0, 0)
        slack = (stored - kept) // 2
        decoding.roll(self.lens, kept, slack)
        self.complete = False
        self.restorable = self.lens.seen - slack

    def clock(self) -> Tensor:
        """Return the clock [1] int32: tokens of the sequence, incremented on the device. Its address is constant.

        Raises:
            ValueError: the prompt is not closed.
        """
        decoding = self.decoding
        if decoding.buffers.clock is None:
            with torch.inference_mode(False):
                clock = torch.full((1,), self.lens.seen, dtype=torch.int32, device=decoding.keys.device)
            decoding.buffers = decoding.buffers._replace(clock=clock)
            return clock
        return decoding.buffers.clock

    def drop_generated(self, count: int) -> None:
        """Subtract `count` re-evicted tokens of every row from the counts."""
        lens, decoding = self.lens, self.decoding
        ring, tensor = decoding.ring, decoding.buffers.query_ring
        if ring is not None and tensor is not None:
            # Crops can return to the first query of the ring.
            self.restorable = max(self.restorable, ring.start, lens.seen - tensor.shape[2])
        lens.longest -= count
        lens.shortest -= count
        decoding.aligned = self.complete = False

    def crop(self, length: int, subtract: Callable[..., None] = subtract_last) -> None:
        """Drop the tokens from position `length` on.

        Args:
            length: tokens of the sequence to keep, padding included.
            subtract: a backend's `rocketkv.core.residual.subtract_last`, which keeps the sum of values.

        Raises:
            ValueError: `length` lies before the last eviction, which cannot be undone.
        """
        lens = self.settled()
        removed = lens.seen - length
        if removed <= 0:
            return
        if length == 0:
            self.clear()
            return
        if length < self.restorable and not self.complete:
            raise ValueError(
                f"cannot crop to {length} tokens: of the first {self.restorable}, some were evicted, which cannot be "
                "undone, or protected ones moved to the front. "
                f"Crop to {self.restorable} or more, or start from a new cache."
            )
        start = lens.shortest - removed
        if isinstance(self.phase, DecodeTokens) and length < self.phase.prompt_end:
            start = length if self.phase.aligned else 0
        self._save_before_write(max(0, start), length)
        if isinstance(self.phase, DecodeTokens):
            self.phase.crop(lens, length, subtract)
        elif self.phase is not None:
            self.phase.crop(lens, length)

    def snapshot(self) -> StoreSnapshot:
        """Return the present state, for `restore`.

        It copies no keys and values. It keeps its buffers alive, and copies their slots before they are overwritten.

        Raises:
            ValueError: the device ran more steps than static buffers have room for.
        """
        return take_snapshot(self)

    def restore(self, snapshot: StoreSnapshot) -> None:
        """Return to a snapshot exactly, any number of times, without recomputing keys or values.

        Raises:
            ValueError: the snapshot is of another store, or was taken before this one was cleared.
        """
        restore_snapshot(self, snapshot)

    def _save_before_write(self, start: int, common: int) -> None:
        """Make every snapshot copy the slots from `start` on before they are overwritten; see `Snapshots`."""
        self.snapshots.save_before_write(start, common, self.tensors().values(), used=self.lens.longest)

    def save_generated(self, count: int) -> None:
        """Make every snapshot copy the last `count` slots of each row before they are overwritten."""
        self._save_before_write(max(0, self.lens.shortest - count), self.decoding.prompt_end)

    def note_captured(self) -> None:
        """Note that a CUDA graph may run steps, at any time, that the host does not count."""
        self.lens.captured = self.lens.uncounted = True
        for taken in self.snapshots.living():
            taken.lens.captured |= taken.tensors.get("keys") is self.keys
