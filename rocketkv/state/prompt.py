"""The prefill phase of a store: a prompt whose end has not come yet.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, N stored tokens, W observation window.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .lens import SeqLens
from .queries import last_of_window


@dataclass(eq=False, kw_only=True)
class PromptTokens:
    """Tokens of a prompt in their order, padding included, behind the tokens that earlier turns kept.

    Attributes:
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        positions: [B, 1 or Hkv, capacity] int32, each slot's position in the sequence, -1 for padding; None if slot
            and position are the same.
        queries: [B, H, <= W, D], queries of the last tokens (the observation window), or None before the first ones.
        outputs: [B, H, <= W, Dv], their attention outputs, or None where they are not known.
        start: slot of the prompt's first token.
        holes: whether some slots may have no token.
        aligned: whether slot and position in the sequence are the same for every token.
        earlier: tokens of the sequence when the previous prompt ended.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    queries: Tensor | None = None
    outputs: Tensor | None = None
    start: int = 0
    holes: bool = False
    aligned: bool = True
    earlier: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        names = ("keys", "values", "positions", "queries", "outputs")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by name."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def valid(self, stored: int) -> Tensor | None:
        """Return [B, 1 or Hkv, N] bool, True at slots with a token, or None if all slots have one."""
        if self.positions is None or not self.holes:
            return None
        return self.positions[:, :, :stored] >= 0

    def slot_positions(self, stored: int) -> Tensor:
        """Return [B, 1 or Hkv, N] integers, the position in the sequence of each slot, -1 for none."""
        if self.positions is not None:
            return self.positions[:, :, :stored]
        return torch.arange(stored, device=self.keys.device).repeat(self.keys.shape[0], 1, 1)

    def remember(self, query: Tensor, window_size: int) -> None:
        """Keep the queries of the last W tokens of the prompt so far; `query` [B, H, n, D] has the newest.

        Their outputs are unknown until `remember_outputs`.
        """
        self.queries, self.outputs = last_of_window(self.queries, query, window_size), None

    def remember_outputs(self, before: Tensor | None, out: Tensor, window_size: int) -> None:
        """Keep the outputs of the tokens whose queries are kept.

        Args:
            before: `outputs` before the last `remember`.
            out: [B, n, H, Dv], the attention outputs of the newest tokens.
            window_size: W.
        """
        newest = out[:, -window_size:].transpose(1, 2).clone()  # a copy: the model may write into its tensor
        found = last_of_window(before, newest, window_size)
        # None once any chunk came without outputs.
        self.outputs = found if self.queries is not None and found.shape[2] == self.queries.shape[2] else None

    @torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
    def write_positions(self, start: int, stop: int, seen: int, valid: Tensor | None) -> None:
        """Write the positions of the tokens in slots `start` to `stop`; `valid` [B, n] is False at padding."""
        capacity, device = self.keys.shape[2], self.keys.device
        if self.positions is None:
            self.positions = torch.arange(capacity, dtype=torch.int32, device=device).repeat(self.keys.shape[0], 1, 1)
        if self.positions.shape[2] < capacity:
            self.positions = F.pad(self.positions, (0, capacity - self.positions.shape[2]), value=-1)
        new = torch.arange(seen, seen + stop - start, dtype=torch.int32, device=device)
        self.positions[:, :, start:stop] = new if valid is None else torch.where(valid, new, -1)[:, None]

    @torch.inference_mode(False)
    def copy_buffers(self) -> None:
        """Replace keys, values and positions by copies."""
        self.keys, self.values = self.keys.clone(), self.values.clone()
        self.positions = None if self.positions is None else self.positions.clone()

    @torch.inference_mode(False)
    def reserve(self, capacity: int, stored: int) -> None:
        """Move to buffers of `capacity` slots, of which `stored` are in use."""
        self.keys, self.values = larger(self.keys, capacity, stored), larger(self.values, capacity, stored)

    def crop(self, lens: SeqLens, length: int) -> None:
        """Drop the tokens from position `length` on, and update the counts."""
        removed = lens.seen - length
        self.queries, self.outputs = (
            None if tensor is None else tensor[:, :, : max(0, tensor.shape[2] - removed)]
            for tensor in (self.queries, self.outputs)
        )
        from_earlier_turns = removed > lens.longest - self.start
        together = not self.holes and (self.aligned or length >= self.earlier)
        lens.seen = length
        if not from_earlier_turns or together or self.positions is None:
            lens.longest -= removed
            lens.shortest = lens.longest
            self.start = min(self.start, lens.longest)
            return
        # Rows end at different slots before this prompt: leave holes.
        with torch.inference_mode(False):  # the next prompt writes into them
            self.positions = torch.where(self.positions < length, self.positions, -1)
        self.start = lens.longest
        self.holes, self.aligned = True, False


def larger(tensor: Tensor, capacity: int, stored: int, empty: int = 0) -> Tensor:
    """Return a buffer [B, Hkv, capacity, ...] with a tensor's first `stored` slots, and `empty` in the others."""
    grown = tensor.new_full((*tensor.shape[:2], capacity, *tensor.shape[3:]), empty)
    grown[:, :, :stored] = tensor[:, :, :stored]
    return grown
