"""The shape of a layer's decode steps, for the kernels and the CPU step, and which shapes the kernels support.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, t token budget, P page size,
r channels, k tokens read.
"""

from dataclasses import dataclass

import torch

TILE_PAGES = 128  # pages a tile of the index, also in rocketkv.core.pages; a test compares them

LARGEST_PAGE = 16
LARGEST_HEAD_DIM = 256
LARGEST_GROUP = 128
LARGEST_QUERIES = 32768  # bytes of one group's queries, which lie in shared memory beside blocks of keys and values
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class SketchRule:
    """The rule by which keys are sketched.

    Attributes:
        bits: of a channel, 1 to 4.
        grid: the largest whole number to which differences are rounded.
        norm: length of a row of the rotation, whose entries are whole numbers.
        step: distance of levels, over the length of a rounded difference.
    """

    bits: int
    grid: int
    norm: float
    step: float

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the digits that a code is packed as, from the lowest."""
        return (2, 1) if self.bits == 3 else (self.bits,)


@dataclass(frozen=True)
class DecodeShape:
    """Sizes and settings of a layer that determine the launches of its decode steps.

    Attributes:
        batch: B.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv.
        capacity: slots of the buffers of keys and values.
        page_size: P.
        channels: r, or None where nothing is scored.
        top_k: k, or None where every stored token is read.
        token_budget: t: a row that stores no more attends to all of it.
        sinks: for `streaming`, how many first tokens are read beside the most recent; else None.
        protected: how many first tokens are read whatever their rank.
        sketch: the rule by which keys are sketched, or None where pages are scored or nothing is.
        residual: whether the tokens not read count as one.
        by_largest: whether tokens rank by the largest weight of the group's heads, not by their average.
        queries: n, the queries of a verify step, each of which has KV heads of its own in `heads` and `kv_heads`, next
            to those of the KV head's other queries; 1 in a decode step.
        pages: of a slab, the most pages of a row, since rows differ in their page size; None: those of `capacity`.
            Capacity, page size, channels and k are the largest of a row.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    capacity: int
    page_size: int
    channels: int | None
    top_k: int | None
    token_budget: int
    sinks: int | None
    protected: int = 0
    sketch: SketchRule | None = None
    residual: bool = False
    by_largest: bool = False
    queries: int = 1
    pages: int | None = None

    @property
    def group(self) -> int:
        """G, the query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def scored(self) -> bool:
        """Whether tokens are chosen by the index."""
        return self.top_k is not None and self.sinks is None

    @property
    def lines(self) -> int:
        """Selections of the batch: one for each row and KV head."""
        return self.batch * self.kv_heads

    @property
    def tiles(self) -> int:
        """Tiles of the index."""
        pages = self.pages or -(-self.capacity // self.page_size)
        return -(-pages // TILE_PAGES)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is at least a number."""
    return 1 << (number - 1).bit_length()


def refusal(shape: DecodeShape, dtype: torch.dtype) -> str | None:
    """Return why these kernels cannot decode such a layer, with keys of this dtype, or None if they can."""
    if dtype not in DTYPES:
        return f"keys are {dtype}; the kernels take float16, bfloat16 and float32"
    if max(shape.head_dim, shape.value_dim) > LARGEST_HEAD_DIM:
        return f"head_dim is {max(shape.head_dim, shape.value_dim)}; the kernels take up to {LARGEST_HEAD_DIM}"
    if shape.group > LARGEST_GROUP:
        return f"{shape.group} query heads share a KV head; the kernels take up to {LARGEST_GROUP}"
    held = max(16, _power_of_two(shape.group)) * _power_of_two(shape.head_dim) * dtype.itemsize
    if held > LARGEST_QUERIES:
        return (
            f"the {shape.group} queries of a KV head take {held} bytes of shared memory in {dtype} with "
            f"head_dim={shape.head_dim}; the kernels take up to {LARGEST_QUERIES}"
        )
    if shape.residual and shape.sketch is None:
        return "the mean value of what is not read needs the scores of a sketch; the kernels have it for no other index"
    if shape.scored and shape.page_size > LARGEST_PAGE:
        return f"pages hold {shape.page_size} tokens; the kernels take up to {LARGEST_PAGE}"
    return None
