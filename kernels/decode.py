"""A decode step of stage 2 in two launches, or three, and the buffers that it works in.

`append_score` writes the token and scores the pages, `append_sketch` in its place the tokens of a sketch;
`select_attend` chooses, attends and combines. Where one program's registers do not hold all pages (more than
`REGISTER_PAGES`), `select_parts` chooses in a launch between them, or `select` where k is too large for it. Of a sketch
a page is a token.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, t token budget, P page size,
r channels, k tokens read, C bytes of a token's codes.
"""

import functools
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .append_score import append_score_kernel
from .append_sketch import append_sketch_kernel, arranged
from .decode_shape import TILE_PAGES, DecodeShape
from .dependent import launches_dependently
from .launch import Launcher
from .launches import Launch, architecture_of, launch_of
from .operands import Buffers, Params, SlabRows
from .score_plan import score_launch, sketch_launch
from .select import select_kernel
from .select_attend import ALL, GIVEN, RANKED, RECENT, select_attend_kernel
from .select_parts import select_parts_kernel
from .select_plan import TOKEN_BLOCK, SelectTree, parts_at_once, select_tree

REGISTER_PAGES = 8192
SELECT_CHUNK = 2048  # pages that a row's only program loads at once

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Prepared = tuple[tuple[int, ...], dict[str, int]]
"""Constants and options of a launch."""


def _side_by_side(heads: Tensor, dim: int) -> Tensor:
    """Return a tensor [B, heads, dim], each row's heads one after another."""
    return heads if heads.stride()[1:] == (dim, 1) else heads.contiguous()


class DecodeWorkspace:
    """The buffers that a decode step works in, for one shape; steps of several layers may share them in turn.

    Args:
        shape: the layer's.
        device: where.
        programs: programs that fill the device, by default its multiprocessors.
        buffers: those of an earlier workspace for the same, in the order of `tensors`, or None for new ones.
        rotation: [D, D] in the queries' dtype, R of `rocketkv.core.sketch` times the length of its rows; where keys are
            sketched and no buffers are given.
        architecture: that the kernels are for, by default the device's.
    """

    backend = "triton"

    def __init__(
        self,
        shape: DecodeShape,
        device: torch.device,
        programs: int | None = None,
        buffers: Sequence[Tensor] | None = None,
        rotation: Tensor | None = None,
        architecture: str | None = None,
    ) -> None:
        self.shape = shape
        self.launch = Launcher()
        self.warm = False
        self.architecture = architecture or architecture_of(device)
        self.dependent = launches_dependently(self.architecture, device)
        self._forced: dict[str, Launch] = {}
        self._first: dict[tuple[torch.dtype, torch.dtype, int], Prepared] = {}
        self._select: Prepared | None = None
        self._attend: dict[tuple[torch.dtype, torch.dtype], Prepared] = {}
        if programs is None:
            on_gpu = device.type == "cuda"
            programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        self.rows = rows = shape.batch * shape.kv_heads
        self.group_block = max(16, triton.next_power_of_2(shape.group))
        self.value_block = max(16, triton.next_power_of_2(shape.value_dim))
        # On AMD an announcement covers the stores of its own wave alone: others' may not have reached memory yet.
        announces = torch.version.hip is None

        def programs_of(rows: int) -> tuple[int, int]:
            """Return the programs of a row in the first launch and in the last."""
            wanted = max(1, triton.cdiv(programs, rows))
            # The first launch has one program to append, and for scores two waves: most of them have one tile.
            splits = 1 + (triton.cdiv(shape.tiles, triton.cdiv(shape.tiles, 2 * wanted)) if shape.scored else 0)
            # Of the last no more than have a block to read.
            blocks = triton.cdiv(shape.top_k or shape.capacity, TOKEN_BLOCK)
            return splits, triton.cdiv(blocks, triton.cdiv(blocks, wanted)) if announces else 1

        self.splits, self.parts = programs_of(rows)
        # A verify step is compiled for as many as a decode step has, which are no fewer: it compiles nothing anew.
        most_splits, most_parts = programs_of(rows // shape.queries)
        self.split_block, self.part_block = triton.next_power_of_2(most_splits), triton.next_power_of_2(most_parts)
        self.page_capacity = shape.tiles * TILE_PAGES
        self.separate = shape.scored and self.page_capacity > REGISTER_PAGES
        self.select_tree: SelectTree | None = None
        if self.separate and announces:
            smallest = shape.page_size if shape.pages is None else 1
            self.select_tree = select_tree(self.page_capacity, shape.top_k or 1, smallest)
        self.rank_block = max(16, triton.next_power_of_2(shape.channels or 1))

        given = None if buffers is None else iter(buffers)

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device) if given is None else next(given)

        scored = rows if shape.scored else 0
        paged = 0 if shape.sketch is not None else scored
        residual = rows if shape.residual else 0
        combined = rows if self.part_block > 1 else 0
        self.scores = empty(scored, shape.group, self.page_capacity)
        self.peaks = empty(scored, self.splits, self.group_block)
        self.sums = empty(scored, self.splits, self.group_block)
        self.ranked = empty(paged, self.splits, self.rank_block, dtype=torch.int32)
        self.chosen = empty(scored, shape.top_k or 1, dtype=torch.int32)
        tree = self.select_tree
        chunks, slots = (0, 0) if tree is None else (tree.chunks, tree.slots)
        alone = rows if self.separate and tree is None else 0
        self.ordered = empty(alone, self.page_capacity, dtype=torch.int32)
        self.candidates = empty(scored, 2, chunks, slots, dtype=torch.int32)
        self.logits = empty(residual, shape.group, chunks, slots)
        self.others = empty(residual, chunks, 2, self.group_block)
        self.records = empty(combined, self.parts, 2 * self.group_block + (shape.group + 1) * self.value_block)
        self.rest = empty(residual, 4, self.group_block)
        self.missed = empty(residual, shape.group)
        self.turn = self._turn(rotation) if given is None else next(given)
        self.finished = empty(rows, 0 if tree is None else tree.nodes_above, dtype=torch.int32)
        self.arrivals = empty(rows, dtype=torch.int32)
        if given is None:
            self.finished.zero_()
            self.arrivals.zero_()

    def _turn(self, rotation: Tensor | None) -> Tensor:
        """Return the rotation as the kernel reads it, or nothing where there is none."""
        if self.shape.sketch is None:
            return self.scores.new_empty(0)
        if rotation is None:
            raise ValueError("a workspace for a sketch needs the rotation")
        return arranged(rotation, self.shape.sketch)

    def sizes(self, kernel: str, itemsize: int) -> dict[str, int]:
        """Return what of this workspace the table of launches knows a kernel by, with keys of so many bytes a number.

        Pages count where a kernel holds their weights in registers.
        """
        head_dim = max(16, triton.next_power_of_2(self.shape.head_dim))
        held = self.shape.scored and not (kernel == "select_attend" and self.separate)
        pages = triton.next_power_of_2(self.page_capacity) if held else 1
        return {"head_dim": head_dim, "value_dim": self.value_block, "itemsize": itemsize, "pages": pages}

    def force(self, kernel: str, launch: Launch | None) -> None:
        """Cut a kernel in this way, or with None as the table of launches says; for `rocketkv bench tune`."""
        self._first.clear()
        self._attend.clear()
        if launch is None:
            self._forced.pop(kernel, None)
        else:
            self._forced[kernel] = launch

    def _cut(self, kernel: str, itemsize: int, exact: bool) -> Launch:
        """Return how a kernel is cut, with float32 products or not."""
        if kernel in self._forced:
            return self._forced[kernel]
        blocks = {"group": self.group_block, "channels": self.rank_block}
        return launch_of(kernel, self.architecture, **self.sizes(kernel, itemsize), **blocks, exact=exact)

    def first_launch(self, query_dtype: torch.dtype, dtype: torch.dtype, ring: int) -> Prepared:
        """Return constants and options of the first launch, for queries and keys of these dtypes and a query ring."""
        known = self._first.get((query_dtype, dtype, ring))
        if known is not None:
            return known
        shape, exact = self.shape, query_dtype == torch.float32 or query_dtype != dtype
        sizes = shape.kv_heads // shape.queries, shape.group, shape.head_dim, shape.value_dim
        blocks = self.group_block, max(16, triton.next_power_of_2(shape.head_dim)), self.value_block
        if shape.sketch is None:
            cut = self._cut("append_score", dtype.itemsize, exact)
            launch = score_launch(
                sizes, blocks, shape.page_size, ring, self.rank_block, cut, exact or INTERPRETED, self.dependent
            )
        else:
            cut, widths = self._cut("append_sketch", dtype.itemsize, exact), shape.sketch.widths
            launch = sketch_launch(
                sizes, blocks, widths, ring, cut, exact or INTERPRETED, dtype.itemsize, self.dependent
            )
        self._first[query_dtype, dtype, ring] = launch
        return launch

    def select_launch(self) -> Prepared:
        """Return constants and options of the launch that chooses, where the choice has one."""
        if self._select is None:
            shape, tree = self.shape, self.select_tree
            page_size = shape.page_size
            if tree is None:
                ends: tuple[int, ...] = (self.split_block, SELECT_CHUNK)
                ranked: tuple[int, ...] = (shape.residual, shape.by_largest)
            else:
                ends, ranked = (self.split_block, tree.block, tree.slots, tree.fan), (shape.by_largest,)
            constants = (shape.group, page_size, *ranked, self.group_block, *ends, self.dependent)
            self._select = constants, {"num_warps": 16, **self._dependently()}
        return self._select

    def attend_launch(self, query_dtype: torch.dtype, dtype: torch.dtype) -> Prepared:
        """Return constants and options of the launch that attends, for queries and keys of these dtypes."""
        known = self._attend.get((query_dtype, dtype))
        if known is not None:
            return known
        shape = self.shape
        exact = INTERPRETED or query_dtype == torch.float32 or query_dtype != dtype
        mode = ALL.value
        if shape.sinks is not None:
            mode = RECENT.value
        elif shape.top_k is not None:
            mode = GIVEN.value if self.separate else RANKED.value
        head_block = max(16, triton.next_power_of_2(shape.head_dim))
        page_block = triton.next_power_of_2(self.page_capacity) if mode == RANKED.value else 1
        cut = self._cut("select_attend", dtype.itemsize, exact)
        few_heads = triton.next_power_of_2(shape.group)
        constants = (
            mode, shape.group, shape.head_dim, shape.value_dim, shape.page_size if shape.scored else 1, exact,
            shape.by_largest, self.part_block > 1, self.group_block, few_heads, head_block, self.value_block,
            self.split_block, page_block, cut.tile, self.part_block,
            parts_at_once(self.part_block, few_heads * self.value_block, cut.warps), self.dependent,
        )  # fmt: skip
        launch = constants, {"num_warps": cut.warps, "num_stages": cut.stages, **self._dependently()}
        self._attend[query_dtype, dtype] = launch
        return launch

    def _dependently(self) -> dict[str, int]:
        """Return the options of a kernel that may start before the one ahead has ended, where there are any."""
        return {"launch_pdl": True} if self.dependent else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return every buffer by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def decode_step_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: Buffers,
    workspace: DecodeWorkspace,
    params: Params,
    out: Tensor | None = None,
    *,
    slab: SlabRows | None = None,
    compile_only: bool = False,
) -> Tensor:
    """Append one token to every row and attend to the tokens that stage 2 selects, writing everything on the device.

    Nothing is read back and, given `out`, nothing is allocated: the launches can be captured in a CUDA graph.

    Args:
        query: [B, H, D], after rotary embedding.
        key: [B, Hkv, D], after rotary embedding.
        value: [B, Hkv, Dv].
        buffers: the layer's, with a clock; written in place.
        workspace: made for these shapes.
        params: the model's attention parameters.
        out: [B, H, Dv] to write to, or None for a new one.
        slab: rows of a slab to run on, or None for all rows of the buffers. For a negative row nothing is written.
        compile_only: whether only to compile what the step would launch, and to write nothing.

    Returns:
        [B, H, Dv] in the query's dtype.

    Raises:
        ValueError: the buffers have no clock.
    """
    if buffers.clock is None:
        raise ValueError("the kernels read the new token's position from a clock; these buffers have none")
    keys, values, seq_lens, ring = buffers.keys, buffers.values, buffers.seq_lens, buffers.query_ring
    scaling, softcap, sinks = params.scaling, params.softcap, params.sinks
    value_sum, bias, missed = buffers.value_sum, buffers.residual_bias, buffers.missed
    shape, space = workspace.shape, workspace
    query = _side_by_side(query, shape.head_dim)
    key = _side_by_side(key, shape.head_dim)
    value = _side_by_side(value, shape.value_dim)
    if out is None:
        out = query.new_empty(query.shape[0], shape.heads, shape.value_dim)
    if compile_only and INTERPRETED:
        return out  # nothing to compile
    rows = query.shape[0] * shape.kv_heads
    appended = (query, key, value, keys, values, buffers.positions)
    strides = (query.stride(0), key.stride(0), value.stride(0))
    places = 0 if ring is None else ring.shape[2]
    own = (None, None) if slab is None else (slab.rows, slab.rules)
    apart = (None, None, None) if slab is None else (slab.row_tokens, slab.row_slots, slab.row_lines)
    launch = functools.partial(space.launch, compile_only=compile_only)
    if shape.sketch is None:
        launch(
            append_score_kernel, (rows, space.splits, 1),
            (
                *appended, buffers.index_tensors[0] if shape.scored else None, seq_lens, buffers.clock, space.scores,
                space.peaks, space.sums, space.ranked, ring, *own,
            ),
            (
                *strides, shape.capacity, shape.tiles, shape.queries, shape.token_budget, shape.channels or 0, scaling,
                softcap, *apart,
            ),
            *space.first_launch(query.dtype, keys.dtype, places),
        )  # fmt: skip
    else:
        rule = shape.sketch
        launch(
            append_sketch_kernel, (rows, space.splits, 1),
            (
                *appended, *buffers.index_tensors, value_sum if shape.residual else None, space.turn, seq_lens,
                buffers.clock, space.scores, space.peaks, space.sums, ring, *own,
            ),
            (
                *strides, shape.capacity, shape.tiles, shape.queries, shape.token_budget, scaling, softcap, rule.grid,
                rule.norm / rule.grid, rule.step, *apart[:2],
            ),
            *space.first_launch(query.dtype, keys.dtype, places),
        )  # fmt: skip
    constants, options = space.attend_launch(query.dtype, keys.dtype)
    top_k, tree = shape.top_k or shape.capacity, space.select_tree
    scored = (sinks, space.scores, space.peaks, space.sums)
    if space.separate:
        selects, options_of = space.select_launch()
        if tree is not None:
            logits, others = (space.logits, space.others) if shape.residual else (None, None)
            launch(
                select_parts_kernel, (rows, tree.chunks, 1),
                (seq_lens, *scored, space.candidates, logits, others, space.finished, space.chosen, space.rest, *own),
                (
                    shape.capacity, shape.tiles, space.splits, tree.chunks, tree.nodes_above, shape.kv_heads,
                    shape.token_budget, top_k, shape.protected,
                ),
                selects, options_of,
            )  # fmt: skip
        else:
            launch(
                select_kernel, (rows, 1, 1), (seq_lens, *scored, space.ordered, space.chosen, space.rest, *own),
                (
                    shape.capacity, shape.tiles, space.splits, shape.kv_heads, shape.token_budget, top_k,
                    shape.protected,
                ),
                selects, options_of,
            )  # fmt: skip
    launch(
        select_attend_kernel, (rows, space.parts, 1),
        (
            query, keys, values, seq_lens, buffers.clock, *scored, value_sum if shape.residual else None,
            None if bias is None else bias.contiguous(), space.rest, space.missed if missed is None else missed,
            space.chosen, space.records, space.arrivals, out, *own,
        ),
        (
            *query.stride()[:2], shape.capacity, shape.tiles, space.splits, space.parts, shape.queries,
            shape.kv_heads // shape.queries, shape.token_budget, top_k, shape.sinks or 0, shape.protected, scaling,
            softcap, apart[0],
        ),
        constants, options,
    )  # fmt: skip
    return out
