"""The operands of a line: those of the step or, of a step of any rows of a slab, those of its row alone.

`kernels/rows.py` describes a slab. A row's own operands are those of a step of one row, so that the parts of a step
know nothing of slabs, and a row gets the bits that it gets alone.

Letters: D head dim, Dv value dim, G query heads of a line, P page size, r channels, k tokens read.
"""

import numpy as np

from ..operands import RULE_FIELDS
from .lowlevel import LANES, array, bytes_of, exact, load
from .operands import AT, REST, SIZE

_NONE = np.int64(-1)


@exact
def line_of(step, ints, number, dtype):
    """Return the line with this number in the step as one of `ints`, its operands, or -1 if it has no row."""
    if step[AT.rows] == 0:
        return number
    place = number // step[SIZE.kv_heads]
    row = np.int64(load(step[AT.rows] + 4 * place, np.int32))
    if row < 0:
        return _NONE
    _take_rule(step, ints, row)
    _take_tensors(step, ints, place, row, bytes_of(dtype))
    _take_scratch(step, ints, place)
    return number % step[SIZE.kv_heads]


@exact
def _take_rule(step, ints, row):
    """Write capacity, P, r, k and tiles of a row."""
    rule = array(step[AT.rules] + 4 * RULE_FIELDS * row, RULE_FIELDS, np.int32)
    capacity, page_size = np.int64(rule[0]), np.int64(rule[1])
    ints[SIZE.capacity], ints[SIZE.page_size], ints[SIZE.channels] = capacity, page_size, np.int64(rule[2])
    if step[SIZE.top_k] >= 0:
        ints[SIZE.top_k] = np.int64(rule[3])
    ints[SIZE.tiles] = -(-capacity // (page_size * LANES))


@exact
def _moved(address, distance):
    """Return the address of a row in a tensor, or 0 where there is no tensor."""
    return address + distance if address else address


@exact
def _take_tensors(step, ints, place, row, size):
    """Write the addresses of a row's tensors: inputs and outputs of the batch at its place, all others of the slab."""
    kv_heads, head_dim, value_dim = step[SIZE.kv_heads], step[SIZE.head_dim], step[SIZE.value_dim]
    heads, capacity, page_size = kv_heads * step[SIZE.group], ints[SIZE.capacity], ints[SIZE.page_size]
    ints[AT.lines] = kv_heads
    ints[AT.query] = step[AT.query] + size * place * step[AT.query_stride]
    ints[AT.key] = step[AT.key] + size * place * step[AT.key_stride]
    ints[AT.value] = step[AT.value] + size * place * step[AT.value_stride]
    ints[AT.out] = step[AT.out] + size * place * heads * value_dim

    first = row * step[AT.row_slots]
    ints[AT.keys] = step[AT.keys] + size * row * step[AT.row_tokens] * head_dim
    ints[AT.values] = ints[AT.keys] + size * kv_heads * capacity * head_dim
    ints[AT.positions] = step[AT.positions] + 4 * first
    if step[AT.line_bytes]:  # page bounds end the row
        own = kv_heads * ints[SIZE.tiles] * (head_dim if page_size == 1 else 2 * head_dim)
        ints[AT.units] = step[AT.units] + step[AT.line_bytes] * ((row + 1) * step[AT.row_lines] - own)
    else:
        ints[AT.units] = _moved(step[AT.units], first * step[SIZE.code_bytes])
    ints[AT.scales] = _moved(step[AT.scales], 2 * first)
    ints[AT.mean] = _moved(step[AT.mean], 4 * row * kv_heads * head_dim)
    ints[AT.balance] = _moved(step[AT.balance], 2 * row * kv_heads * head_dim)
    ints[AT.seq_lens] = step[AT.seq_lens] + 4 * row * kv_heads
    ints[AT.value_sum] = _moved(step[AT.value_sum], 8 * row * kv_heads * value_dim)
    ints[AT.bias] = _moved(step[AT.bias], 4 * row * heads)
    ints[AT.missed] = _moved(step[AT.missed], 4 * row * heads)
    ints[AT.ring] = _moved(step[AT.ring], size * row * heads * step[AT.ring_size] * head_dim)
    ints[AT.clock] = step[AT.clock] + 4 * row


@exact
def _take_scratch(step, ints, place):
    """Write the addresses of the scratch memory of a row at its place in the batch, which is for the largest rule."""
    kv_heads, group = step[SIZE.kv_heads], step[SIZE.group]
    heads, first = kv_heads * group, place * kv_heads
    record = 2 * group + (group + 1) * step[SIZE.value_dim]
    ints[SIZE.scores] = step[SIZE.scores] + 4 * place * heads * step[SIZE.tiles] * LANES
    ints[SIZE.chosen] = step[SIZE.chosen] + 4 * first * max(step[SIZE.top_k], 0)
    ints[SIZE.rest] = step[SIZE.rest] + 8 * REST * place * heads
    ints[SIZE.records] = step[SIZE.records] + 4 * record * first * step[SIZE.parts]
    ints[SIZE.lines_done] = step[SIZE.lines_done] + 8 * place
