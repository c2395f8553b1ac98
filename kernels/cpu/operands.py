"""The operands of a step as compiled code gets them: one block of integers and addresses, then float64 numbers.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv value dim, n queries of a verify step (1 in a
decode step), M = n Hkv selections of a row of the batch. A *line* is one of the B M selections.
"""

from typing import NamedTuple


class Sizes(NamedTuple):
    """The integers that belong to a workspace: addresses of its scratch memory, sizes and settings."""

    counters: int  # int64: next task, threads that came; two for each line
    lines_done: int  # int64: lines that are done, of the step or of each row of a slab
    scores: int  # float32 [lines, G, padded units], then e^(score - peak)
    chosen: int  # int32 [lines, k]
    rest: int  # float64 [lines, G, 3]: largest score; sums over chosen and other tokens of e^(score - largest)
    records: int  # float32 [lines, parts, 2 G + (G + 1) Dv]
    local: int  # what each thread has for itself
    local_bytes: int
    rotation: int  # float32 [D, D]
    kv_heads: int  # M
    queries: int  # n
    group: int
    head_dim: int
    value_dim: int
    capacity: int
    tiles: int
    page_size: int
    channels: int
    top_k: int  # -1: every stored token is attended to
    budget: int
    sinks: int  # -1 unless the most recent tokens are attended to
    protected: int
    by_largest: int
    residual: int
    bits: int
    code_bytes: int  # of a token's sketch
    grid: int
    splits: int  # tasks of a line that score
    parts: int  # tasks of a line that attend, at most


class Tensors(NamedTuple):
    """The integers that belong to a layer's step: strides in elements, and addresses, 0 where there is no tensor.

    The last six are of a step of any rows of a slab, and 0 without one; `SlabRows` explains them.
    """

    lines: int
    ring_size: int
    query_stride: int  # from one row of the batch to the next
    key_stride: int
    value_stride: int
    query: int
    key: int
    value: int
    out: int
    keys: int
    values: int
    positions: int
    seq_lens: int
    units: int  # the index: bounds of pages, or codes of tokens
    scales: int
    mean: int
    balance: int
    value_sum: int
    bias: int
    missed: int
    ring: int
    clock: int
    learned_sinks: int  # [M G]
    rows: int
    rules: int
    row_tokens: int
    row_slots: int
    row_lines: int
    line_bytes: int  # bytes of 128 page bounds


class Reals(NamedTuple):
    """The float64 numbers, behind the integers: two of the step, and three of a sketch's encoding."""

    scaling: int
    softcap: int  # 0: none
    norm: int  # `rotation_norm` over the grid
    spacing: int
    rotation_norm: int


# Where each integer is, and each real number.
SIZE = Sizes(*range(len(Sizes._fields)))
AT = Tensors(*range(len(SIZE), len(SIZE) + len(Tensors._fields)))
REAL = Reals(*range(len(Reals._fields)))
INTEGERS = len(SIZE) + len(AT)
REALS = len(REAL)

SPARE_COUNTERS = 2  # before those of the lines
REST = 3  # numbers that a line remembers of a head's scores
OWN_BYTES = -(-8 * INTEGERS // 64) * 64  # of a thread's copy of the integers, before its scratch memory
PART = 64  # tokens that one task attends to: the sums depend on it, so it does not change with the number of threads
