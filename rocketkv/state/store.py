"""The keys, values and index of one layer, of all sequences of a batch, and what is known of their tokens.

A store is in one of two phases. In a *prompt*, tokens lie as they came, padding among them, and all of them are there
to be attended to. `close_prompt` runs stage 1, drops padding and lays the survivors out for *decoding*: row by row from
slot 0, with room for what will be generated, and an index beside them. Another prompt may follow.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N slots in use, W observation window, P page size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..budget import BudgetSplit, with_protected
from ..core.eviction import prompt_scores, recent_positions, select_top
from ..core.pages import gather_tokens, movable, restored
from .compact import LayOut, lay_out
from .protection import RowMarks, message_numbers, protected_first, protected_slots, with_fair_shares
from .snapshot import TENSORS, Restorable

# A rolling store keeps half of its room when it rolls, for drafts that are taken back.
ROLLING_ROOM = 64


def decode_room(split: BudgetSplit, decode_reserve: int) -> int:
    """Return the slots that a store has beyond a prompt's survivors when it is closed."""
    return max(decode_reserve, ROLLING_ROOM) if split.rolling else decode_reserve


def alone(tensor: Tensor) -> Tensor:
    """Return a tensor that keeps no more alive than itself."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.itemsize else tensor.clone()


class KVStore(Restorable):
    """Keys, values, index, positions, lengths and window queries of one layer; for the index see `Indexed`.

    Attributes:
        keys: [B, Hkv, capacity, D], or None before the first token.
        values: [B, Hkv, capacity, Dv], or None.
        positions: [B, Hkv, capacity] int32, each slot's position in the sequence, -1 for padding; None in a first
            prompt without padding, where slot and position are the same.
        lengths: [B, Hkv] int32, slots in use of each row while decoding; None before.
        window: [B, H, <= W, D], queries of the last tokens: see `QueryWindow`.
        marks: what is marked in each row's prompts, or None for nothing.
        split: what stage 1 and 2 may store and read, from the last prompt on.
        seen: tokens of the sequence so far, padding and evicted ones included.
        stored: N, slots in use of the longest row. Known to the host, like `shortest`: a decode step asks no device.
        shortest: slots in use of the shortest row.
        closed: whether the prompt is over.
        aligned: whether slot and position in the sequence are the same for every token.
    """

    marks: tuple[RowMarks, ...] | None
    _holes: bool  # whether slots of a prompt may hold no token
    _prompt_start: int  # slot of the prompt's first token
    _complete: bool  # whether every token seen is still stored
    _moved: bool  # whether the prompt's end has put protected tokens before earlier ones
    _restorable: int  # a crop to fewer tokens than these would need what was evicted
    _prompt_stored: int  # slots in use of the longest row when the prompt was closed

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        for name in TENSORS:
            setattr(self, name, None)
        self.split = self.marks = None
        self._clear_counts()
        self._forget_snapshots()
        self.closed = self._holes = self._moved = False
        self.aligned = self._complete = True
        self._prompt_start = self._prompt_end = self._restorable = self._ring_from = self._prompt_stored = 0

    @torch.inference_mode(False)
    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by a function of it, for instance to reorder rows (their first dimension)."""
        if self._in_place:
            self._protect(0, 0)
        for name, tensor in self.tensors().items():
            changed = restored(function(movable(tensor)), tensor.dtype)
            if self._in_place and changed.shape == tensor.shape:
                tensor.copy_(changed)  # a static buffer stays where it is
            else:
                setattr(self, name, changed)

    def valid(self) -> Tensor | None:
        """Return [B, 1 or Hkv, N] bool, True at slots of a prompt that hold a token, or None where all do."""
        if self.positions is None or not self._holes:
            return None
        return self.positions[:, :, : self.stored] >= 0

    def extend(self, key: Tensor, value: Tensor, valid: Tensor | None = None, *, expected: int = 0) -> None:
        """Append tokens of a prompt as they come.

        Args:
            key: [B, Hkv, n, D].
            value: [B, Hkv, n, Dv].
            valid: [B, n] bool, False at padding, or None.
            expected: tokens that the sequence will have when the prompt ends, where that is known: the room to make.
        """
        key, value = key.detach(), value.detach()
        if self.closed:
            self._reopen()
        start, stop = self.stored, self.stored + key.shape[2]
        if self.keys is None or self.values is None:
            # Held as they are: an unchunked prompt is never copied before stage 1 has made it small. But one that does
            # not end yet must not keep a fused projection alive with them.
            ends = stop >= expected > 0
            self.keys, self.values = (key, value) if ends else (alone(key), alone(value))
        else:
            foreign = self.keys.is_inference() and not torch.is_inference_mode_enabled()
            if stop > self.capacity or foreign:
                self._reserve(max(stop, start + expected - self.seen if expected else 2 * start))
            self.keys[:, :, start:stop] = key
            self.values[:, :, start:stop] = value
        if valid is not None or self.positions is not None:
            self._extend_positions(start, stop, valid)
        self._holes |= valid is not None
        self.seen += stop - start
        self.stored = self.shortest = stop

    def _reopen(self) -> None:
        """Turn from decoding to a prompt; slots beyond a row's length, whose position is -1, are holes."""
        self.closed = False
        self._prompt_start = self.stored
        self._holes = not self.uniform
        self.lengths = self.window = None
        self._forget_index()

    def reopen(self, keys: Tensor, values: Tensor, positions: Tensor | None, stored: int) -> None:
        """Turn from decoding to a prompt that goes on from other buffers, in which slot and position are the same.

        Args:
            keys: [B, Hkv, capacity, D], all of the sequence's.
            values: [B, Hkv, capacity, Dv].
            positions: [B, 1, capacity] int32, -1 for padding, or None without padding.
            stored: slots of those in use.
        """
        self._reopen()
        self.keys, self.values, self.positions = keys, values, positions
        self.stored = self.shortest = self._prompt_start = stored
        self._holes = positions is not None
        self.aligned = self._complete = True

    @torch.inference_mode(False)
    def move(self) -> None:
        """Go over to copies of the buffers."""
        for name in ("keys", "values", "positions"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.clone())

    def allow_crops(self) -> None:
        """Let crops go back to any length, since what stage 1 left out is not lost, if tokens lie in their order."""
        if not self._moved:
            self._restorable = 0

    @torch.inference_mode(False)
    def _extend_positions(self, start: int, stop: int, valid: Tensor | None) -> None:
        if self.keys is None:
            raise ValueError("positions follow keys")
        batch, device = self.keys.shape[0], self.keys.device
        if self.positions is None:
            self.positions = torch.arange(self.capacity, dtype=torch.int32, device=device).repeat(batch, 1, 1)
        if self.positions.shape[2] < self.capacity:
            missing = self.capacity - self.positions.shape[2]
            self.positions = torch.nn.functional.pad(self.positions, (0, missing), value=-1)
        new = torch.arange(self.seen, self.seen + stop - start, dtype=torch.int32, device=device)
        self.positions[:, :, start:stop] = new if valid is None else torch.where(valid, new, -1)[:, None]

    def close_prompt(
        self,
        split: BudgetSplit,
        *,
        decode_reserve: int,
        kernel_size: int,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        decode_capacity: int | None = None,
        index_dtype: torch.dtype | None = None,
        remembered: int = 0,
        scores: Callable[..., Tensor] = prompt_scores,
        choose: Callable[[Tensor, int], Tensor] = select_top,
        place: LayOut = lay_out,
    ) -> None:
        """End the prompt: evict by stage 1 where a row exceeds its share, drop padding, build the index.

        Args:
            split: what to keep and how to index it.
            decode_reserve: slots to make room for beyond the survivors.
            kernel_size: width of stage 1's max-pooling.
            scaling: factor of the logits.
            softcap: the model's soft-cap of the logits, or None.
            sinks: [H], the model's learned sinks, or None.
            decode_capacity: slots to make room for instead, never to be moved or added to until the next prompt ends;
                or None for buffers that grow.
            index_dtype: of the index, or None for the keys'.
            remembered: W, how many queries of the last tokens to remember while decoding; 0 for none.
            scores: `eviction.prompt_scores`, or what stands in its place.
            choose: `eviction.select_top`, or what stands in its place.
            place: `layout.lay_out`, or what stands in its place.

        Raises:
            ValueError: there is no prompt, or fewer of its tokens are kept than its queries rank.
        """
        if self.keys is None or self.values is None or self.window is None:
            raise ValueError("close_prompt ends a prompt: extend the store and remember its queries first")
        window = self.window
        keys, values = self.keys[:, :, : self.stored], self.values[:, :, : self.stored]
        valid = self.valid()
        longest = shortest = self.stored
        protected = None if self.marks is None else protected_slots(self.marks, self._prompt_positions())
        if protected is not None:
            split = with_protected(split, int(protected.sum(-1).max()))
        self.split = split
        if valid is not None:
            counts = valid.sum(-1)
            shortest, longest = (int(count) for count in torch.stack(counts.aminmax()).tolist())
            self._refuse_padded_ends(valid, counts)
        # A turn whose prompt evicts nothing can be taken back, to where the last eviction was.
        restorable = self._restorable
        slots: Tensor | None = None
        if split.kept_tokens is not None and longest > split.kept_tokens:
            if split.sinks is None:
                restorable = self.seen - window.shape[2]
                if split.kept_tokens < window.shape[2]:
                    raise ValueError(
                        f"kept_tokens must be at least the window of {window.shape[2]} tokens, got {split.kept_tokens}"
                    )
                exact = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
                counted = values if split.value_aware else None
                pools = {"kernel_size": kernel_size, "pool_offset": split.pool_offset}
                ranks = scores(window, keys, value=counted, valid=valid, **pools, **exact)
                slots = choose(self._with_marks(ranks, protected, split.kept_tokens), split.kept_tokens)
            else:
                restorable = self.seen - (split.kept_tokens - split.sinks)
                slots = recent_positions(self._all_valid(valid), split.kept_tokens, split.sinks)
            longest, shortest = split.kept_tokens, min(shortest, split.kept_tokens)
            self._complete = False
        elif valid is not None:
            slots = torch.arange(self.stored, device=keys.device).expand(*keys.shape[:3])
        self._moved = False
        if protected is not None and split.protected:
            present = torch.arange(self.stored, device=keys.device).expand(*keys.shape[:3]) if slots is None else slots
            ordered = protected_first(present, protected)
            self._moved = not torch.equal(ordered, present)
            if self._moved:
                # A crop to before the last of them would find tokens out of the sequence's order.
                last = int(self._prompt_positions().masked_fill(~protected, -1).amax())
                slots, restorable, self._complete = ordered, max(restorable, last + 1), False
        self.aligned = self.aligned and slots is None
        room = decode_room(split, decode_reserve) if decode_capacity is None else decode_capacity
        page_size = None if split.channels is None else split.page_size  # pages are made as keys are moved
        self.keys, self.values, self.positions, self.lengths, self.index = place(
            keys, values, slots, valid, self.positions, longest, longest + room, page_size, index_dtype
        )
        self.stored, self.shortest, self.closed, self._holes = longest, shortest, True, False
        self._close_index(index_dtype)
        if split.calibrated:
            self._calibrate(window, {"scaling": scaling, "softcap": softcap, "sinks": sinks})
        self._restorable, self._prompt_end, self._prompt_stored = restorable, self.seen, longest
        self.close_window(remembered)
        self.decode_capacity = decode_capacity
        self._captured = False
        if decode_capacity is not None:
            self.clock()

    def _prompt_positions(self) -> Tensor:
        """Return [B, 1 or Hkv, N] integers, the position in the sequence of each slot of a prompt, -1 for none."""
        if self.positions is not None:
            return self.positions[:, :, : self.stored]
        if self.keys is None:
            raise ValueError("there are no tokens")
        return torch.arange(self.stored, device=self.keys.device).repeat(self.keys.shape[0], 1, 1)

    def _with_marks(self, scores: Tensor, protected: Tensor | None, kept: int) -> Tensor:
        """Return the scores of a prompt in which marked tokens come before those that they must come before."""
        if self.marks is None or protected is None:
            return scores
        scores = scores.masked_fill(protected, torch.inf)
        if not any(mark.messages for mark in self.marks):
            return scores
        return with_fair_shares(scores, message_numbers(self.marks, self._prompt_positions()), kept)

    @property
    def open_tokens(self) -> int:
        """Tokens of the present prompt, which has not ended; 0 while decoding."""
        return 0 if self.closed else self.stored - self._prompt_start

    @property
    def generated(self) -> int:
        """Tokens decoded since the prompt that are stored."""
        return self.stored - self._prompt_stored

    def protect_generated(self, count: int) -> None:
        """Have snapshots copy what is about to be written over: the last `count` slots of every row."""
        self._protect(max(0, self.shortest - count), self._prompt_end)

    def drop(self, count: int) -> None:
        """Count `count` generated tokens less in every row, which were evicted for good; those of the ring stay."""
        size = 0 if self.window is None else self.window.shape[2]
        self._restorable = max(self._restorable, self._ring_from, self.seen - size)
        self._stored -= count
        self._shortest -= count
        self.aligned = self._complete = False

    def _refuse_padded_ends(self, valid: Tensor, counts: Tensor) -> None:
        """Refuse a row that stage 1 would rank by padding, because its prompt does not end with a token."""
        split = self.split
        if split is None or split.kept_tokens is None or split.sinks is not None:
            return
        wrong = ((counts > split.kept_tokens) & ~valid[..., -1]).any(-1)
        if bool(wrong.any()):
            rows = ", ".join(map(str, wrong.nonzero().flatten().tolist()))
            raise ValueError(
                f"a prompt must end with a token in every row, since its last queries rank its tokens, but row {rows} "
                "ends with padding; pad on the left (tokenizer.padding_side = 'left')"
            )

    def _all_valid(self, valid: Tensor | None) -> Tensor:
        if self.keys is None:
            raise ValueError("there are no tokens")
        if valid is not None:
            return valid.expand(*self.keys.shape[:2], self.stored)
        return torch.ones(*self.keys.shape[:2], self.stored, dtype=torch.bool, device=self.keys.device)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append one generated token to every row, growing by doubling, without a host sync.

        Args:
            key: [B, Hkv, D].
            value: [B, Hkv, Dv].

        Raises:
            ValueError: the prompt is not closed.
        """
        if not self.closed or self.keys is None or self.values is None or self.positions is None:
            raise ValueError("append comes after close_prompt")
        if self.lengths is None or self.split is None:
            raise ValueError("append comes after close_prompt")
        self.make_room()
        key, value = key.detach(), value.detach()
        uniform, slot = self.uniform, self.stored
        if uniform:
            self.keys.select(2, slot).copy_(key)
            self.values.select(2, slot).copy_(value)
            self.positions.select(2, slot).fill_(self.seen)
            self.lengths.fill_(slot + 1)
        else:
            place = self.lengths.long()[..., None]
            self.keys.scatter_(2, place[..., None].expand(-1, -1, 1, key.shape[-1]), key[:, :, None])
            self.values.scatter_(2, place[..., None].expand(-1, -1, 1, value.shape[-1]), value[:, :, None])
            self.positions.scatter_(2, place, self.seen)
            self.lengths += 1
        self.advance()
        if self.decode_capacity is not None:
            self.clock()
        self._index_token(value, slot if uniform else None)

    def make_room(self) -> None:
        """See to it that every row has room for one more token: grow by doubling, or roll.

        Raises:
            ValueError: the store is static, and its room has ended.
        """
        if self.stored < self.capacity or self.split is None:
            return
        if self.decode_capacity is not None:
            raise ValueError(self.at_end())
        kept = self.split.kept_tokens
        if self.split.rolling and kept is not None and self.stored > kept:
            self._roll(kept, (self.capacity - kept) // 2)
        else:
            self._reserve(2 * self.capacity)

    @torch.inference_mode(False)
    def _reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots."""

        def grown(tensor: Tensor, value: int) -> Tensor:
            larger = tensor.new_full((*tensor.shape[:2], capacity, *tensor.shape[3:]), value)
            larger[:, :, : self.stored] = tensor[:, :, : self.stored]
            return larger

        if self.keys is not None and self.values is not None:
            self.keys, self.values = grown(self.keys, 0), grown(self.values, 0)
        if self.positions is not None and self.closed:
            self.positions = grown(self.positions, -1)
        self._grow_index(capacity)

    def _roll(self, kept: int, slack: int) -> None:
        """Drop the oldest tokens that are no sinks, and have room again.

        Args:
            kept: tokens that a step attends to.
            slack: tokens to keep beyond those, so that drafts can be taken back.
        """
        if self.keys is None or self.values is None or self.lengths is None or self.split is None:
            raise ValueError("there is nothing to roll")
        self._protect(0, 0)
        count = kept + slack
        slot = torch.arange(self.stored, device=self.keys.device)
        slots = recent_positions(slot < self.lengths[..., None], count, self.split.sinks or 0)
        chosen = slots < self.lengths[..., None]
        for buffer, kept_tokens in zip(
            (self.keys, self.values), gather_tokens(slots, self.keys, self.values), strict=True
        ):
            buffer[:, :, :count] = kept_tokens
        if self.positions is not None:
            self.positions[:, :, :count] = torch.where(chosen, self.positions.gather(2, slots), -1)
            self.positions[:, :, count:] = -1
        self.lengths.clamp_(max=count)
        self.stored, self.shortest = count, min(self.shortest, count)
        self.aligned = self._complete = False
        self._restorable = self.seen - slack

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on, as if they had never come.

        Args:
            length: tokens of the sequence that stay, padding included.

        Raises:
            ValueError: `length` lies before the last eviction, which cannot be undone.
        """
        removed = self.seen - length
        if removed <= 0:
            return
        if length == 0:
            self.clear()
            return
        if length < self._restorable and not self._complete:
            raise ValueError(
                f"cannot crop to {length} tokens: stage 1 evicted tokens of the first {self._restorable}, and what it "
                "evicted is gone, or it moved protected ones to the front. "
                f"Crop to {self._restorable} or more, or start from a new cache."
            )
        self._protect_from_crop(length)
        self.crop_window(removed)
        self.seen = length
        if self.closed and self.positions is not None and self.lengths is not None:
            self.positions.masked_fill_(self.positions >= length, -1)
            self.lengths.copy_((self.positions >= 0).sum(-1))
            if length >= self._prompt_end:
                self.stored -= removed
                self.shortest -= removed
            else:
                self.shortest, self.stored = (int(n) for n in torch.stack(self.lengths.aminmax()).tolist())
                self._prompt_end, self._prompt_stored = length, self.stored
            self._sum_again()
            if self.decode_capacity is not None:
                self.clock()
            return
        behind = removed > self.stored - self._prompt_start  # tokens from before this prompt
        together = not self._holes and (self.aligned or length >= self._prompt_end)
        if not behind or together or self.positions is None:
            self.stored -= removed
            self.shortest = self.stored
            self._prompt_start = min(self._prompt_start, self.stored)
        else:
            # Rows end at different slots before this prompt: leave holes.
            with torch.inference_mode(False):  # the next prompt writes into them
                self.positions = torch.where(self.positions < length, self.positions, -1)
            self._prompt_start = self.stored
            self._holes, self.aligned = True, False
