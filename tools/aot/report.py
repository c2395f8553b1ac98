"""The report of a compiled kernel, and tables of reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """The result of compiling one kernel in one configuration; buffers, waits and instructions for NVIDIA alone.

    Attributes:
        target: name of the device.
        kernel: its name.
        configuration: its name.
        main: whether the configuration is a main one.
        error: the compiler's message, or None.
        constants: whole numbers that it is compiled for, by name.
        warps: of a program.
        registers: of a thread; of a lane for AMD.
        shared: bytes of shared memory that a program asks for.
        spill_stores: bytes that a thread's instructions spill.
        spill_loads: bytes that they read back.
        loads: for each pointer that the main loop loads from, instructions by the bytes that a thread loads with each.
        outside: the same of the other loads.
        buffers: for each pointer whose blocks a loop copies to shared memory while it computes, the blocks that fit.
        in_flight: for each of these, groups of copies that the loop's waits leave unfinished, at the least.
        instructions: for each pointer, instructions of a warp in one pass of the innermost loop that loads from it.
        permits: whether the next kernel may start before this one has ended.
        dependent: whether it is launched so that it may start before the kernel ahead has ended.
        before_wait: accesses to global memory, and branches, before it waits for the kernel ahead; None where it does
            not wait.
        seconds: how long it took.
    """

    target: str
    kernel: str
    configuration: str
    main: bool
    error: str | None = None
    constants: dict[str, int] = field(default_factory=dict)
    warps: int = 0
    registers: int = 0
    shared: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loads: dict[str, dict[int, int]] = field(default_factory=dict)
    outside: dict[str, dict[int, int]] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    permits: bool = False
    dependent: bool = False
    before_wait: int | None = None
    seconds: float = 0.0

    @property
    def wide(self) -> int:
        """Instructions of the main loop that load 16 bytes or more."""
        return sum(count for widths in self.loads.values() for width, count in widths.items() if width >= 16)

    @property
    def narrow(self) -> int:
        """Instructions of the main loop that load fewer than 4 bytes."""
        return sum(count for widths in self.loads.values() for width, count in widths.items() if width < 4)


_COLUMNS = ("kernel", "configuration", "warps", "registers", "shared", "spilled", "16 B", "<4 B")


def _loop(report: Report, pointer: str) -> str:
    """Return the loads from a pointer, its buffers and waits, and its loop's instructions, as the table has them."""
    said = " + ".join(f"{count}x{width}" for width, count in report.loads[pointer].items())
    if pointer in report.buffers:
        said += f" b{report.buffers[pointer]} w{report.in_flight[pointer]}"
    return said + (f" i{report.instructions[pointer]}" if pointer in report.instructions else "")


def table(reports: Sequence[Report]) -> str:
    """Return one device's reports as a table, then the errors; a main configuration has a star."""
    rows = [[*_COLUMNS, "loads, buffers and waits of the loop, its instructions"]]
    errors: dict[str, list[str]] = {}
    for report in sorted(reports, key=lambda report: report.kernel):
        row = [report.kernel, f"{report.configuration}{' *' if report.main else ''}"]
        if report.error is None:
            spilled = f"{report.spill_stores}/{report.spill_loads}"
            row += map(str, (report.warps, report.registers, report.shared, spilled, report.wide, report.narrow))
            row.append(", ".join(f"{name} {_loop(report, name)}" for name in report.loads))
        else:
            row += [*"------", "does not compile"]
            errors.setdefault(report.error.rstrip(), []).append(f"{report.kernel} {report.configuration}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if 2 <= i < 8 else cell.ljust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    said = [f"\n{', '.join(names)}:\n{error}" for error, names in errors.items()]
    return "\n".join([*(line.rstrip() for line in lines), *said])
