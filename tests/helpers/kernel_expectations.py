"""What the compiled loops of kernels must have in the main configurations, by version of Triton."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """A loop that copies blocks to shared memory while it computes.

    Attributes:
        pointers: that it copies from.
        buffers: blocks of each that shared memory holds, at least.
        in_flight: groups of copies that its waits leave unfinished, at least.
        issued: instructions of all warps for one token, at most, or None where they do not count.
        tokens: the kernel's constant that says how many tokens a pass scores.
    """

    pointers: tuple[str, ...]
    buffers: int
    in_flight: int
    issued: float | None = None
    tokens: str = "BN"


@dataclass(frozen=True)
class Dependence:
    """How a kernel of a decode step depends on its neighbours on the stream, where launches can overlap.

    Attributes:
        waits: whether it waits for the kernel ahead, before anything else.
        permits: whether the kernel behind it may start before it ends.
    """

    waits: bool
    permits: bool


DEPENDENCES = {
    # The first of a step starts when everything ahead of it has ended: it overwrites what the last step reads.
    "append_score_kernel": Dependence(waits=False, permits=True),
    "append_sketch_kernel": Dependence(waits=False, permits=True),
    "select_parts_kernel": Dependence(waits=True, permits=True),
    "select_kernel": Dependence(waits=True, permits=True),
    # Nothing of a step follows.
    "select_attend_kernel": Dependence(waits=True, permits=False),
}

# From the named version of Triton on: which loops it pipelines, and how, changed in 3.8.
_SINCE: dict[str, dict[tuple[int, int], Loop]] = {
    "append_score_kernel": {(3, 2): Loop(("bounds",), 2, 1)},
    # Before 3.8 codes that become words go through shared memory, without asynchronous copies.
    "append_sketch_kernel": {
        (3, 2): Loop(("sketched",), 0, 0, issued=31.0),
        (3, 8): Loop(("sketched",), 2, 1, issued=16.0),
    },
    "select_attend_kernel": {(3, 2): Loop(("keys", "values"), 2, 1)},
    "dense_partial_kernel": {(3, 2): Loop(("key_places", "value_places"), 2, 1)},
    "window_statistics_kernel": {(3, 2): Loop(("block",), 2, 1)},
    "prefill_kernel": {(3, 2): Loop(("keys", "values"), 2, 1)},
}


# Bytes that main configurations store and load as spilled registers, where a version of Triton spills any.
_SPILLS = {
    ((3, 7), "sm_100"): {
        "append_sketch_kernel, llama-3.1-8b-32k-sketch": (12, 12),
        "prefill_kernel, gpt-oss-20b-chunk-8k": (12, 20),
    },
}


def expected_spills(version: tuple[int, int], target: str) -> dict[str, tuple[int, int]]:
    """Return the spills of main configurations, compiled by this version of Triton: bytes stored and loaded."""
    return _SPILLS.get((version, target), {})


def expected_loops(version: tuple[int, int]) -> dict[str, Loop]:
    """Return the loop that each kernel must have when compiled by this version of Triton."""
    return {
        kernel: versions[max(since for since in versions if since <= version)] for kernel, versions in _SINCE.items()
    }
