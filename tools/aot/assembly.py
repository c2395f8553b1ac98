"""Disassembled kernels: memory accesses, loops, and the lines of source that they come from."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_SASS_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_SASS_ACCESS = re.compile(r"\s(?P<kind>LDG|LDGSTS|LDL|STL)(?P<parts>(?:\.\w+)*)\s")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SASS_LABEL = re.compile(r"^(?P<label>\.L_\w+):")
_SASS_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?P<text>[^;]*);")
_SASS_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*`\((?P<label>\.L_\w+)\)")
# The waits for the kernel ahead on the stream, and the permission of the next one: `griddepcontrol` of PTX.
_SASS_WAIT = re.compile(r"\bACQBULK\b")
_SASS_PERMISSION = re.compile(r"\bPREEXIT\b")
_SASS_ORDERED = re.compile(r"\b(?:LDG|LDGSTS|LD|STG|ST|ATOMG?|RED|UBLK\w+|UTMA\w+|BRA|BRX|CALL)\b")
_GCN_FILE = re.compile(r'\s\.file\s+(?P<number>\d+)\s+(?:"[^"]*"\s+)?"(?P<file>[^"]+)"')
_GCN_LINE = re.compile(r"\s\.loc\s+(?P<number>\d+)\s+(?P<line>\d+)")
_GCN_ACCESS = re.compile(r"\s(?P<kind>global_load|buffer_load|scratch_load|scratch_store)(?:_lds)?_(?P<type>\w+)")
_GCN_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_KINDS = {
    "LDG": "load", "LDGSTS": "load", "LDL": "spill load", "STL": "spill store",
    "global_load": "load", "buffer_load": "load", "scratch_load": "spill load", "scratch_store": "spill store",
}  # fmt: skip

Access = tuple[tuple[str, int], str, int]
"""Where an instruction comes from (file, line), whether it loads, spills or reads back, and the bytes of a thread."""


def nvidia_accesses(text: str) -> Iterator[Access]:
    """Return the memory accesses of a disassembly by `nvdisasm -g`."""
    place = ("", 0)
    for row in text.splitlines():
        if found := _SASS_LINE.search(row):
            place = (Path(found["file"]).name, int(found["line"]))
        elif found := _SASS_ACCESS.search(row):
            parts = found["parts"].split(".")
            yield place, _KINDS[found["kind"]], next((_SASS_WIDTHS[part] for part in parts if part in _SASS_WIDTHS), 4)


def loop_instructions(text: str, pointers: Mapping[tuple[str, int], str]) -> dict[str, int]:
    """Return, for each pointer, the instructions of the innermost loop that loads from it, of `nvdisasm -g -c`.

    A loop is what lies between a label and the last branch back to it. Loads before a loop, which a pipelined loop
    repeats, count for that loop only.

    Args:
        text: the disassembly.
        pointers: the pointer that each line of source loads from.
    """
    place = ("", 0)
    count = 0
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    loads: list[tuple[str, int]] = []
    for row in text.splitlines():
        if found := _SASS_LABEL.match(row):
            labels[found["label"]] = count
        elif found := _SASS_LINE.search(row):
            place = (Path(found["file"]).name, int(found["line"]))
        elif _SASS_INSTRUCTION.match(row):
            access = _SASS_ACCESS.search(row)
            if access and _KINDS[access["kind"]] == "load" and place in pointers:
                loads.append((pointers[place], count))
            branch = _SASS_BRANCH.search(row)
            if branch and branch["label"] in labels:
                loops[labels[branch["label"]]] = count
            count += 1
    found_in: dict[str, int] = {}
    for pointer, position in loads:
        for start, end in loops.items():
            if start <= position <= end:
                found_in[pointer] = min(found_in.get(pointer, count), end - start + 1)
    return found_in


def permits_successor(text: str) -> bool:
    """Return whether a disassembled kernel lets the next one start before it has ended."""
    return _SASS_PERMISSION.search(text) is not None


def accesses_before_wait(text: str) -> int | None:
    """Return a disassembled kernel's accesses to global memory and branches before it waits for the kernel ahead.

    None where it does not wait. Zero shows that no access can come before the wait: what stands before it runs first.
    """
    wait = _SASS_WAIT.search(text)
    if wait is None:
        return None
    rows = (_SASS_INSTRUCTION.match(row) for row in text[: wait.start()].splitlines())
    return sum(_SASS_ORDERED.search(row["text"]) is not None for row in rows if row is not None)


def amd_accesses(text: str) -> Iterator[Access]:
    """Return the memory accesses of an assembly for AMD."""
    place = ("", 0)
    files: dict[str, str] = {}
    for row in text.splitlines():
        if found := _GCN_FILE.search(row):
            files[found["number"]] = Path(found["file"]).name
        elif found := _GCN_LINE.search(row):
            place = (files.get(found["number"], ""), int(found["line"]))
        elif found := _GCN_ACCESS.search(row):
            width = _GCN_WIDTHS.get(found["type"])
            yield place, _KINDS[found["kind"]], width or (1 if "byte" in found["type"] else 2)


_INLINE = re.compile(r"[ \t]*// begin inline asm\n.*?// end inline asm", re.DOTALL)
_PLACE = re.compile(r"^\s*\.loc\s.*\n", re.MULTILINE)


def one_line(ptx: str) -> str:
    """Return the program with each inlined piece of assembly at the line of source that it comes from.

    LLVM gives each line of inlined assembly, as of most loads, another line of source, counting up from the first.
    """

    def first_only(piece: re.Match[str]) -> str:
        places = _PLACE.findall(piece[0])
        return piece[0] if len(places) < 2 else places[0] + _PLACE.sub("", piece[0])

    return _INLINE.sub(first_only, ptx)
