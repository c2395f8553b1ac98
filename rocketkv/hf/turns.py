"""The phase of a forward: how many of its tokens are prefill, and how many are decoded or verified."""

import warnings

VERIFIES = (
    "RocketKV: after a prompt has ended, a forward of several tokens verifies a draft, and evicts nothing. If "
    "it is the prompt of a new turn, call begin_turn() of its RocketKVCache before it"
)


def prompt_part(
    seen: int, given: int, prompt_end: int | None, *, closed: bool, begins: bool = False, verifies: bool = False
) -> int:
    """Return how many of a forward's `given` tokens belong to a prompt; the rest are decoded or verified.

    After a prompt has ended, a forward of several tokens verifies a draft, unless it begins a turn.

    Args:
        seen: tokens of the sequence before this forward.
        given: tokens of this forward.
        prompt_end: tokens of the sequence when the prompt ends, or None if unknown: then a forward of several tokens is
            a chunk of the prompt, and the first single token ends it.
        closed: whether the last prompt has ended.
        begins: whether this forward begins a turn (`begin_turn`), even with a single token.
        verifies: whether forwards of several tokens verify a draft (assisted decoding); a draft may follow the prompt's
            last tokens in the same forward.
    """
    if prompt_end is not None and seen < prompt_end:
        return min(given, prompt_end - seen) if verifies else given
    if seen == 0 or begins:
        return given
    return given if not closed and given > 1 and not verifies else 0


def check_prompt_length(length: object) -> None:
    """Check a `prompt_length` argument.

    Raises:
        TypeError: it is not an int.
        ValueError: it is less than 1.
    """
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"prompt_length must be an int (tokens), got {length!r} of type {type(length).__name__}")
    if length < 1:
        raise ValueError(f"prompt_length must be at least 1, got {length}; None where it is not known")


def check_queries(found: int, wanted: int) -> None:
    """Warn if a crop has removed queries of the observation window before the prompt ended; no others can replace them.

    Args:
        found: queries that are left to rank the prompt's tokens.
        wanted: queries that the observation window should have.

    Raises:
        ValueError: none is left.
    """
    if found >= wanted:
        return
    what = (
        f"the queries of a prompt's last {wanted} tokens rank its tokens, but {found} of them are left: a crop took "
        "the others before the prompt had ended. Crop after its end (tell the cache its prompt_length), or let "
        f"{wanted} tokens or more of the prompt follow the crop."
    )
    if found == 0:
        raise ValueError(what)
    warnings.warn(what, stacklevel=2)
