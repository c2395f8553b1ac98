"""The software pipeline of a compiled loop: buffers in shared memory, and how much its waits leave in flight.

Read from Triton's own representation (TTGIR), which names both; of loops that copy blocks of global memory into shared
memory while they compute.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_PLACE = re.compile(r"^#(?P<name>loc\d*) = loc\((?P<value>.*)\)$", re.MULTILINE)
_FILE = re.compile(r'"(?P<file>[^"]+\.py)":(?P<line>\d+)')
_REFERENCE = re.compile(r"#(?P<name>loc\d*)")
_OWN_PLACE = re.compile(r"loc\(#(?P<name>loc\d*)\)$")
_FOR = re.compile(r"\bscf\.for\b")
_BUFFERS = re.compile(r"\blocal_alloc\s*: \(\) -> !\w+\.memdesc<(?P<count>\d+)x")
_COPY = re.compile(r"\basync_copy_global_to_local\b")
_WAIT = re.compile(r"\basync_wait\b.*\{num = (?P<count>\d+)")


def _places(ttgir: str) -> dict[str, tuple[str, int]]:
    """Return the file and line of each place that the program names; of inlined code, where it is written."""
    values = {found["name"]: found["value"] for found in _PLACE.finditer(ttgir)}

    def place(value: str) -> tuple[str, int] | None:
        if found := _FILE.search(value):
            return Path(found["file"]).name, int(found["line"])
        # A name, or a callee and its caller: the first is meant.
        reference = _REFERENCE.search(value)
        return None if reference is None or reference["name"] not in values else place(values[reference["name"]])

    return {name: found for name, value in values.items() if (found := place(value)) is not None}


def _loops(rows: list[str]) -> Iterator[list[int]]:
    """Return the rows of every loop, by number, without those of the loops inside of it, which come before it."""
    open_loops: list[tuple[int, list[int]]] = []
    for number, row in enumerate(rows):
        indent = len(row) - len(row.lstrip())
        if open_loops and row.lstrip().startswith("}") and indent == open_loops[-1][0]:
            yield open_loops.pop()[1]
        elif _FOR.search(row):
            open_loops.append((indent, []))
        elif open_loops:
            open_loops[-1][1].append(number)


def pipeline(ttgir: str, pointers: Mapping[tuple[str, int], str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the buffers of each pointer that a loop copies from, and the copies that its waits leave unfinished.

    Args:
        ttgir: the program.
        pointers: the pointer that each line of source loads from.

    Returns:
        By pointer: the blocks that its shared memory holds, and the least number of unfinished groups of copies that a
        wait inside of the loop permits.
    """
    places = _places(ttgir)

    def pointer(row: str) -> str | None:
        own = _OWN_PLACE.search(row)
        return None if own is None else pointers.get(places.get(own["name"], ("", 0)))

    rows = ttgir.splitlines()
    held = [(name, int(found["count"])) for row in rows if (found := _BUFFERS.search(row)) and (name := pointer(row))]
    buffers: dict[str, int] = {}
    in_flight: dict[str, int] = {}
    for loop in _loops(rows):
        waits = [int(found["count"]) for number in loop if (found := _WAIT.search(rows[number]))]
        for name in {name for number in loop if _COPY.search(rows[number]) and (name := pointer(rows[number]))}:
            counts = [count for owner, count in held if owner == name]
            if counts and waits:
                # Inner loops come first; an outer one has the copies before the inner, and the wait for all behind it.
                buffers.setdefault(name, min(counts))
                in_flight.setdefault(name, min(waits))
    return buffers, in_flight
