"""A heat map as a PNG file, by nothing but zlib: cells of a grid in the colours of a scale, which stands beside it."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

RGB = tuple[int, int, int]
Grid = Sequence[Sequence[float | None]]

_INK, _PAPER, _NONE = (28, 33, 38), (255, 255, 255), (223, 228, 233)
# From dark to light, lightness rising evenly; and to both sides of white, as the report's heat maps have it.
SEQUENTIAL: tuple[RGB, ...] = (
    (36, 22, 76),
    (44, 73, 132),
    (31, 122, 140),
    (74, 168, 122),
    (163, 209, 92),
    (250, 235, 90),
)
DIVERGING: tuple[RGB, ...] = ((166, 76, 12), (224, 123, 46), (247, 247, 247), (0, 114, 178), (0, 62, 107))

# Three columns and five rows a letter: the bits of a row, from the top, as an octal digit.
_FONT = (
    ". 00002 - 00700 % 51245 , 00024 : 02020 ( 12221 ) 42224 / 11244 = 07070 + 02720 0 75557 1 26227 2 71747 3 71317 "
    "4 55711 5 74717 6 74757 7 71222 8 75757 9 75717 A 25755 B 65656 C 34443 D 65556 E 74647 F 74644 G 34553 H 55755 "
    "I 72227 J 11152 K 55655 L 44447 M 57755 N 65555 O 25552 P 65644 Q 25563 R 65655 S 34216 T 72222 U 55557 V 55552 "
    "W 55775 X 55255 Y 55222 Z 71247"
)
_GLYPHS = dict(zip(_FONT.split()[::2], _FONT.split()[1::2], strict=True))
_BLANK = "00000"
_PIXEL = 2  # of a letter, in pixels of the picture
_ADVANCE, _LINE = 4 * _PIXEL, 5 * _PIXEL
_MARGIN = 12
_MOST_TICKS = 12


@dataclass(frozen=True)
class Scale:
    """Which colour a value has: evenly from `low` to `high` through the ramp, and its ends beyond."""

    low: float
    high: float
    ramp: tuple[RGB, ...] = SEQUENTIAL

    def color(self, value: float | None) -> RGB:
        """Return a value's colour; grey where there is none."""
        if value is None or math.isnan(value):
            return _NONE
        width = self.high - self.low
        place = 0.5 if width == 0 else min(1.0, max(0.0, (value - self.low) / width))
        before = min(int(place * (len(self.ramp) - 1)), len(self.ramp) - 2)
        part = place * (len(self.ramp) - 1) - before
        first, second = self.ramp[before], self.ramp[before + 1]
        return (
            _between(first[0], second[0], part),
            _between(first[1], second[1], part),
            _between(first[2], second[2], part),
        )


def _between(first: int, second: int, part: float) -> int:
    return round(first + (second - first) * part)


def scale_of(grid: Grid, *, signed: bool = False) -> Scale:
    """Return a scale from the least to the largest value, or, of signed ones, as far to both sides of 0."""
    values = [value for row in grid for value in row if value is not None and not math.isnan(value)] or [0.0]
    if signed:
        most = max(map(abs, values)) or 1.0
        return Scale(-most, most, DIVERGING)
    return Scale(min(values), max(values))


class _Canvas:
    """Pixels, row by row."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [bytearray(bytes(_PAPER) * width) for _ in range(height)]

    def fill(self, x: int, y: int, width: int, height: int, color: RGB) -> None:
        for row in self._rows[y : y + height]:
            row[3 * x : 3 * (x + width)] = bytes(color) * width

    def write(self, x: int, y: int, text: str) -> None:
        for letter in text.upper():
            for row, bits in enumerate(map(int, _GLYPHS.get(letter, _BLANK))):
                for column in range(3):
                    if bits & (4 >> column):
                        self.fill(x + column * _PIXEL, y + row * _PIXEL, _PIXEL, _PIXEL, _INK)
            x += _ADVANCE

    def png(self) -> bytes:
        """Return the file: eight bits a channel, no filter."""
        pixels = b"".join(b"\0" + bytes(row) for row in self._rows)
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, chunks))


def _chunk(given: tuple[bytes, bytes]) -> bytes:
    kind, data = given
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _width(text: str) -> int:
    return _ADVANCE * len(text) - _PIXEL


def number_text(value: float) -> str:
    """Return a number for a scale: three digits, and thousands in full."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def heatmap_png(
    grid: Grid,
    scale: Scale,
    *,
    title: str,
    rows: str,
    columns: str,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
) -> bytes:
    """Return the PNG file of a grid, its rows from the top and its columns from the left.

    Args:
        grid: the values; None is grey.
        scale: their colours.
        title: what is shown. Letters have no case; those that are not ASCII letters, digits or `.-%,:()/=+` are blank.
        rows: what a row is.
        columns: what a column is.
        row_names: of each row, or None for its number from 0.
        column_names: likewise.

    Raises:
        ValueError: the grid has no cell, or its rows are not as long as each other.
    """
    height, width = len(grid), len(grid[0]) if grid else 0
    if not width or any(len(row) != width for row in grid):
        raise ValueError(f"grid must have rows of one length, with a value at least; got {[len(row) for row in grid]}")
    down = [str(place) for place in range(height)] if row_names is None else list(row_names)
    across = [str(place) for place in range(width)] if column_names is None else list(column_names)
    cell = max(4, min(28, 900 // width, 700 // height))
    left = _MARGIN + max([_width(rows), *map(_width, down)]) + _PIXEL * 3
    top = _MARGIN + _LINE + _MARGIN
    bottom = _LINE * 2 + _PIXEL * 8
    ends = [number_text(scale.high), number_text(scale.low)]
    bar = 5 * _LINE
    total = max(left + cell * width + 4 * _MARGIN + max(map(_width, ends)) + _MARGIN, 2 * _MARGIN + _width(title))
    canvas = _Canvas(total, top + max(cell * height, bar) + bottom)
    canvas.write(_MARGIN, _MARGIN, title)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            canvas.fill(left + x * cell, top + y * cell, cell - (cell > 4), cell - (cell > 4), scale.color(value))
    for y in _ticks(height, cell, _LINE + _PIXEL):
        canvas.write(left - _PIXEL * 3 - _width(down[y]), top + y * cell + (cell - _LINE) // 2, down[y])
    for x in _ticks(width, cell, max(map(_width, across)) + 2 * _PIXEL):
        canvas.write(left + x * cell + (cell - _width(across[x])) // 2, top + height * cell + _PIXEL * 2, across[x])
    canvas.write(_MARGIN, top + height * cell + _PIXEL * 2, rows)
    canvas.write(left, top + height * cell + _LINE + _PIXEL * 5, columns)
    x = left + cell * width + 2 * _MARGIN
    for y in range(bar):
        canvas.fill(x, top + y, _MARGIN, 1, scale.color(scale.high + (scale.low - scale.high) * y / (bar - 1)))
    for text, y in zip(ends, (top, top + bar - _LINE), strict=True):
        canvas.write(x + _MARGIN + 2 * _PIXEL, y, text)
    return canvas.png()


def _ticks(count: int, cell: int, room: int) -> range:
    """Return which of so many cells get a name, a round number of them apart."""
    for step in (1, 2, 5, 10, 20, 50, 100):
        if step * cell >= room and count <= step * _MOST_TICKS * (2 if step == 1 else 1):
            return range(0, count, step)
    return range(0, count, max(1, count - 1))
