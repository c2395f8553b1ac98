"""Markers: block ids beyond all real blocks, by which the scheduler tells a worker about a request."""

FIRST_MARKER = 1 << 30
LAST_MARKER = (1 << 31) - 1  # block tables are int32


def marker(row: int, prompt_tokens: int, max_model_len: int) -> int:
    """Return the block id that tells a worker the row of the slab and the prompt's tokens."""
    return FIRST_MARKER + row * (max_model_len + 1) + prompt_tokens


def read_marker(block_id: int, max_model_len: int) -> tuple[int, int] | None:
    """Return the row and the prompt's tokens of a marker, or None for a real block."""
    return divmod(block_id - FIRST_MARKER, max_model_len + 1) if block_id >= FIRST_MARKER else None


def most_rows(max_model_len: int) -> int:
    """Return how many rows markers can encode."""
    return (LAST_MARKER - FIRST_MARKER + 1) // (max_model_len + 1)
