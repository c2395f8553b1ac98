"""What a store keeps beside its keys and values so that a step need not read them all: an index, and a sum.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values.
"""

from typing import Any

import torch
from torch import Tensor

from ..budget import BudgetSplit
from ..core.calibration import fitted_bias
from ..core.indexes import INDEX_TENSORS, index_of
from ..core.residual import sum_values, summable
from .window import QueryWindow


class Indexed(QueryWindow):
    """The index of a layer's closed store, and the sum of its values where the residual needs that.

    Attributes:
        values: [B, Hkv, capacity, Dv], or None before the first token.
        positions: [B, Hkv, capacity] int32, each slot's position in the sequence while decoding.
        lengths: [B, Hkv] int32, slots in use of each row while decoding; None before.
        split: what stage 1 and 2 may store and read, from the last prompt on.
        index: [B, Hkv, tile, rows, 128], the bounds of pages, or None where no pages are scored.
        codes: [B, Hkv, capacity, C] uint8, with the next two the sketch of the keys, or None where there is none.
        scales: [B, Hkv, capacity] bfloat16.
        mean: [B, Hkv, D] float32.
        value_sum: [B, Hkv, Dv] float64, the exact sum of all values of a row's tokens, or None without a residual.
        residual_bias: [B, H] float32, what is added to the logit of what a step does not attend to (`calibration`), or
            None where that is not calibrated.
        missed: [B, H] float32, the estimated weight of the tokens that the last step did not attend to, on the device;
            None where no step has estimated it.
    """

    values: Tensor | None
    positions: Tensor | None
    lengths: Tensor | None
    split: BudgetSplit | None
    index: Tensor | None
    codes: Tensor | None
    scales: Tensor | None
    mean: Tensor | None
    value_sum: Tensor | None
    residual_bias: Tensor | None
    missed: Tensor | None

    @property
    def uniform(self) -> bool:
        """Whether every row has the same number of tokens."""
        return self.shortest == self.stored

    def index_parts(self) -> dict[str, Tensor]:
        """Return the tensors of the index, by name."""
        return {name: tensor for name in INDEX_TENSORS if (tensor := getattr(self, name)) is not None}

    def _set(self, parts: dict[str, Tensor]) -> None:
        for name, tensor in parts.items():
            setattr(self, name, tensor)

    def _forget_index(self) -> None:
        """Have no index, as in a prompt."""
        for name in (*INDEX_TENSORS, "value_sum", "residual_bias", "missed"):
            setattr(self, name, None)

    @torch.inference_mode(False)  # it may be written in a later call that is not in inference mode
    def _close_index(self, dtype: torch.dtype | None) -> None:
        """Make the index of a closed prompt, where that was not made with the layout, and the sum of its values."""
        if self.keys is None or self.values is None:
            raise ValueError("an index is made of keys")
        index, lengths = index_of(self.split), None if self.uniform else self.lengths
        if index is not None and not self.index_parts():
            self._set(index.build(self.keys, self.stored, lengths, dtype))
        if self.split is not None and self.split.residual:
            self.value_sum = sum_values(self.values, self.stored, lengths)

    @torch.inference_mode(False)
    @torch.no_grad()  # a model's sinks are parameters
    def _calibrate(self, window: Tensor, exact: dict[str, Any]) -> None:
        """Fit what the residual weighs, by the queries [B, H, W, D] of the prompt's last tokens."""
        index = index_of(self.split)
        if self.split is None or index is None or self.keys is None or self.values is None:
            raise ValueError("calibration is of an index")
        if self.positions is None or self.lengths is None:
            raise ValueError("calibration comes after a prompt's end")
        self.residual_bias = fitted_bias(
            window,
            self.keys,
            self.values,
            self.positions,
            self.lengths,
            index,
            self.index_parts(),
            split=self.split,
            stored=self.stored,
            seen=self.seen,
            **exact,
        )

    def _index_token(self, value: Tensor, slot: int | None) -> None:
        """Take in the last token of every row, whose value is [B, Hkv, Dv]; it is in `slot`, or rows differ."""
        index = index_of(self.split)
        if index is not None and self.keys is not None and self.lengths is not None:
            index.append(self.index_parts(), self.keys, self.lengths, slot)
        if self.value_sum is not None:
            self.value_sum += summable(value)

    def _grow_index(self, capacity: int) -> None:
        """Make room for `capacity` slots."""
        index, parts = index_of(self.split), self.index_parts()
        if index is not None and parts:
            self._set(index.grow(parts, capacity))

    def missed_room(self, query: Tensor) -> Tensor:
        """Return where a step of queries [B, H, D] is to write what it missed, [B, H]; always the same tensor."""
        if self.missed is None or self.missed.is_inference():  # of a copy that was made in inference mode
            with torch.inference_mode(False):
                self.missed = torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
        return self.missed

    def note_missed(self, missed: Tensor) -> None:
        """Keep what a step missed, [B, H] float32; always in the same tensor."""
        self.missed_room(missed).copy_(missed.detach())

    def rebuild_index(self) -> None:
        """Write the index and the sum anew, in place, after tokens have been moved."""
        index = index_of(self.split)
        if index is not None and self.keys is not None:
            index.rebuild(self.index_parts(), self.keys, self.stored)
        self._sum_again()

    def _sum_again(self) -> None:
        """Make the sum of values anew, in place, after tokens have gone."""
        if self.value_sum is not None and self.values is not None:
            self.value_sum.copy_(sum_values(self.values, self.stored, None if self.uniform else self.lengths))
