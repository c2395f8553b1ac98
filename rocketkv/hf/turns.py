"""The phase of a forward: which of its tokens are a prompt's, and which are decoded or verified."""

import warnings


def prompt_part(
    seen: int, given: int, prompt_end: int | None, *, closed: bool, begins: bool = False, verifies: bool = False
) -> int:
    """Return how many of the `given` tokens of a forward belong to a prompt; the rest are decoded.

    After a prompt has ended, several tokens at once verify a draft unless a turn begins: nothing is evicted in them.

    Args:
        seen: tokens of the sequence before this forward.
        given: tokens of this forward.
        prompt_end: tokens of the sequence when the prompt ends, or None where unknown: then a forward of several tokens
            is a chunk of the prompt, and the first single token ends it.
        closed: whether the last prompt has ended.
        begins: whether `begin_turn` was called for this forward, however few tokens it has.
        verifies: whether forwards of several tokens verify a draft, which may begin in the prompt's forward.
    """
    if prompt_end is not None and seen < prompt_end:
        return min(given, prompt_end - seen) if verifies else given
    if seen == 0 or begins:
        return given
    return given if not closed and given > 1 and not verifies else 0


def check_prompt_length(length: object) -> None:
    """Check the number of tokens that a prompt is said to have.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than 1.
    """
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"prompt_length must be an int (tokens), got {length!r} of type {type(length).__name__}")
    if length < 1:
        raise ValueError(f"prompt_length must be at least 1, got {length}; None where it is not known")


def check_queries(found: int, wanted: int) -> None:
    """Say so where a crop has forgotten queries of a prompt's last tokens before it ended: those before are not kept.

    Args:
        found: how many of them are at hand to rank the prompt's tokens.
        wanted: how many there should be.

    Raises:
        ValueError: there is none.
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
