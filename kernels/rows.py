"""Steps of any rows of a slab, each with a capacity, page size, number of channels and k of its own.

A *slab* is buffers with more rows than a step has. `rows` names the row that each row of the batch reads and writes, or
a negative number for none. `rules` has the capacity, page size, channels and k of each row. A row's positions, codes
and scales lie from the row's first slot on, its KV heads one after another, each with as many slots as its capacity.
Its keys, values and index share memory, so that a row with a large index has fewer tokens: keys come first, values
after them, and the tiles of the index end where the row ends.

Without `rows`, row i of the batch is row i of the buffers, and the kernels are compiled as if there were no slabs.

Letters: B batch, Hkv KV heads, P page size, k tokens read.
"""

import triton
import triton.language as tl

from .operands import RULE_FIELDS

_FIELDS = tl.constexpr(RULE_FIELDS)


@triton.jit
def capacity_of(rules, buffer_row):
    """Return a row's slots for each KV head."""
    return tl.load(rules + buffer_row * _FIELDS)


@triton.jit
def page_size_of(rules, buffer_row):
    """Return the tokens of a row's pages."""
    return tl.load(rules + buffer_row * _FIELDS + 1)


@triton.jit
def channels_of(rules, buffer_row):
    """Return the channels that a row's pages are scored by."""
    return tl.load(rules + buffer_row * _FIELDS + 2)


@triton.jit
def top_k_of(rules, buffer_row):
    """Return the tokens that a row reads."""
    return tl.load(rules + buffer_row * _FIELDS + 3)
