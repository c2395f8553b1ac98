"""The records that launch wrappers take; any object with these attributes will do.

Letters: B batch, H query heads, Hkv KV heads, D head dim, Dv value dim, W query ring.
"""

from typing import Protocol

from torch import Tensor

RULE_FIELDS = 4  # numbers of a row in `SlabRows.rules`: capacity, page size, channels, k


class Params(Protocol):
    """The parameters of a model's attention: they turn products of queries and keys into weights."""

    @property
    def scaling(self) -> float:
        """Factor of the logits."""

    @property
    def softcap(self) -> float | None:
        """The c of `c * tanh(logit / c)`, or None."""

    @property
    def sinks(self) -> Tensor | None:
        """[H], one learned logit a head that joins the softmax's denominator, or None."""


class SlabRows(Protocol):
    """The rows of a slab that a step runs on, with the rules of each row; see `rows.py`.

    The `Buffers` of such a step have R rows, and tensors without dimensions of slots. Keys, values and page bounds are
    the same memory, keys as wide as values. The clock is [R].
    """

    @property
    def rows(self) -> Tensor:
        """[B] int32, the row of the slab for each row of the batch, negative for none; no row twice."""

    @property
    def rules(self) -> Tensor:
        """[R, 4] int32: capacity, page size, channels and k of each row."""

    @property
    def row_tokens(self) -> int:
        """Keys that have room from one row to the next, in the memory of keys, values and page bounds."""

    @property
    def row_slots(self) -> int:
        """Slots from one row to the next, in all other tensors."""

    @property
    def row_lines(self) -> int:
        """Lines of 128 page bounds from one row to the next, in that memory; 0 without them."""


class Buffers(Protocol):
    """The tensors that a decode step reads and writes, of one layer."""

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, capacity, D], with room for one token in every row; written."""

    @property
    def values(self) -> Tensor:
        """[B, Hkv, capacity, Dv]; written."""

    @property
    def positions(self) -> Tensor:
        """[B, Hkv, capacity] int32; written."""

    @property
    def seq_lens(self) -> Tensor:
        """[B, Hkv] int32, tokens of each row; raised by one."""

    @property
    def index_tensors(self) -> tuple[Tensor, ...]:
        """The index, written.

        Page bounds [B, Hkv, tiles, D or 2D, 128] in the keys' dtype or a float of 8 bits; or a sketch: codes
        [B, Hkv, capacity, C] uint8, scales [B, Hkv, capacity] bfloat16, mean key [B, Hkv, D] float32 and balance of the
        channels [B, Hkv, D] bfloat16; or nothing.
        """

    @property
    def value_sum(self) -> Tensor | None:
        """[B, Hkv, Dv] float64, the sum of each row's values, raised by the new one; with a residual."""

    @property
    def residual_bias(self) -> Tensor | None:
        """[B, H] float32, added to the logit of the tokens that are not read, or None."""

    @property
    def missed(self) -> Tensor | None:
        """[B, H] float32, the weight of the tokens that are not read, written; None without a residual."""

    @property
    def query_ring(self) -> Tensor | None:
        """[B, H, W, D], the query of token i is written at place i mod W; or None."""

    @property
    def clock(self) -> Tensor | None:
        """[1] int32, position of the new token; raised by one."""
