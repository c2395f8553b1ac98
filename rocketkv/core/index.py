"""The index of stage 2 that a budget split needs."""

from ..budget import BudgetSplit
from .pages import PageIndex
from .sketch import SketchIndex
from .token_index import TokenIndex


def index_of(split: BudgetSplit | None) -> TokenIndex | None:
    """Return the index that a split needs, or None if its steps score nothing."""
    if split is None:
        return None
    if split.sketch_bits is not None:
        return SketchIndex(split.sketch_bits)
    return None if split.channels is None else PageIndex(split.page_size, split.channels)
