"""The scratch memory of decode steps on a CPU, and the operands that depend on the shape alone.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, k selected tokens.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..decode_shape import TILE_PAGES, DecodeShape
from .operands import OWN_BYTES, PART, REST, SPARE_COUNTERS, Sizes
from .threads import thread_count

_HEADS = 4  # heads of a sketch that are scored at once
_LINE = 64  # bytes of a cache line


def _parts(shape: DecodeShape) -> int:
    """Return into how many parts a line's attention is cut, at most."""
    longest = shape.capacity if shape.top_k is None else max(shape.top_k, shape.token_budget)
    return -(-min(longest, shape.capacity) // PART)


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE + _LINE


class CpuWorkspace:
    """The scratch memory of decode steps of one shape, which layers share in turn, with a part for each thread.

    Args:
        shape: the layer's.
        buffers: those of an earlier workspace of the shape, in the order of `tensors`, or None for new ones.
        rotation: [D, D] float32, R of `rocketkv.core.sketch` times the length of its rows; with a sketch.
    """

    backend = "cpu"

    def __init__(
        self, shape: DecodeShape, buffers: Sequence[Tensor] | None = None, rotation: Tensor | None = None
    ) -> None:
        self.shape = shape
        self.warm = False
        group, lines = shape.group, shape.lines
        units = shape.tiles * TILE_PAGES if shape.scored else 0
        chosen = (shape.top_k or 0) if shape.scored else 0
        record = 2 * group + (group + 1) * shape.value_dim
        rest = lines * group * REST if shape.scored else 0
        sizes = (
            8 * (SPARE_COUNTERS + 2 * lines + shape.batch), 4 * lines * group * units, 4 * lines * chosen, 8 * rest,
            4 * lines * _parts(shape) * record,
        )  # fmt: skip
        self.counter_bytes = sizes[0]
        self.local_bytes = self._local_bytes(units)
        if buffers is None:
            self.shared = torch.zeros(sum(_padded(size) for size in sizes), dtype=torch.uint8)
            self.local = torch.zeros(thread_count(), self.local_bytes, dtype=torch.uint8)
            self.rotation = torch.zeros(0) if rotation is None else rotation.float().contiguous()
        else:
            self.shared, self.local, self.rotation = buffers
        self._sizes = sizes
        self._packed: tuple[int, bytes, bytes] = (0, b"", b"")
        # Tasks of a line that score; outputs do not depend on their number.
        threads = len(self.local)
        self.splits = max(1, min(shape.tiles if shape.scored else 1, -(-2 * threads // lines)))

    def places(self) -> tuple[int, int, int, int, int]:
        """Return the addresses of the counters, scores, chosen tokens, masses of scores and records of parts."""
        place, found = -(-self.shared.data_ptr() // _LINE) * _LINE, []
        for size in self._sizes:
            found.append(place)
            place += -(-size // _LINE) * _LINE
        counters, scores, chosen, rest, records = found
        return counters, scores, chosen, rest, records

    def operands(self) -> tuple[bytes, bytes]:
        """Return the packed sizes and addresses of this workspace, and the packed constants of its sketch."""
        place = self.shared.data_ptr()
        if self._packed[0] == place:
            return self._packed[1:]
        shape, sketch = self.shape, self.shape.sketch
        counters, scores, chosen, rest, records = self.places()
        widths = () if sketch is None else sketch.widths
        sizes = Sizes(
            counters=counters,
            lines_done=counters + 8 * (SPARE_COUNTERS + 2 * shape.lines),
            scores=scores,
            chosen=chosen,
            rest=rest,
            records=records,
            local=self.local.data_ptr(),
            local_bytes=self.local_bytes,
            rotation=self.rotation.data_ptr(),
            kv_heads=shape.kv_heads,
            queries=shape.queries,
            group=shape.group,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            capacity=shape.capacity,
            tiles=shape.tiles,
            page_size=shape.page_size,
            channels=shape.channels or 0,
            top_k=-1 if shape.top_k is None else shape.top_k,
            budget=shape.token_budget,
            sinks=-1 if shape.sinks is None else shape.sinks,
            protected=shape.protected,
            by_largest=shape.by_largest,
            residual=shape.residual and shape.scored,
            bits=0 if sketch is None else sketch.bits,
            code_bytes=sum(-(-shape.head_dim * width // 8) for width in widths),
            grid=0 if sketch is None else sketch.grid,
            splits=self.splits,
            parts=_parts(shape),
        )
        constants = (0.0, 0.0, 0.0) if sketch is None else (sketch.norm / sketch.grid, sketch.step, sketch.norm)
        self._packed = place, struct.pack(f"={len(sizes)}q", *sizes), struct.pack("=3d", *constants)
        return self._packed[1:]

    @property
    def chosen(self) -> Tensor:
        """The tokens that the last step chose, [lines, k] int32, ascending; arbitrary where it attended to all.

        Of a step of rows of a slab, each row's lines lie one after another with its own k.
        """
        start, size = self.places()[2] - self.shared.data_ptr(), self._sizes[2]
        return self.shared[start : start + size].view(torch.int32).view(self.shape.lines, -1)

    def _local_bytes(self, units: int) -> int:
        """Return the bytes of scratch memory that a thread needs."""
        shape = self.shape
        group, head_dim = shape.group, shape.head_dim
        heads = -(-group // _HEADS) * _HEADS
        words = 0 if shape.sketch is None else (head_dim * shape.sketch.bits // 8 + 8) * 8
        pages = 2 * group * head_dim + 3 * head_dim + 4 * TILE_PAGES
        sketch = (group + 1) * head_dim + (words + 2 + TILE_PAGES) * heads + 3 * TILE_PAGES
        attend = group * head_dim + (group + 3) * PART
        return OWN_BYTES + _padded(4 * max(pages, sketch, attend, 2 * units + TILE_PAGES, 2 * shape.value_dim))

    def tensors(self) -> dict[str, Tensor]:
        """Return every buffer by name."""
        return {"shared": self.shared, "local": self.local, "rotation": self.rotation}
