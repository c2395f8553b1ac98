"""Heat maps: PNG files that a plain reader takes, with every cell in the colour of its value."""

from __future__ import annotations

import math
import struct
import zlib

import pytest

from rocketkv.eval.oracle.heatmap import DIVERGING, SEQUENTIAL, Scale, heatmap_png, number_text, scale_of

NAMES = {"title": "Storage, tokens", "rows": "head", "columns": "layer"}
Pixels = list[list[tuple[int, int, int]]]


def read(png: bytes) -> Pixels:
    """Read a PNG of eight bits a channel by its specification: signature, chunks and their sums, unfiltered rows."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = [], 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        assert struct.unpack(">I", png[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + data)
        chunks.append((kind, data))
        place += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, color, rest) == (8, 2, [0, 0, 0])
    content = zlib.decompress(chunks[1][1])
    assert len(content) == height * (1 + 3 * width)
    rows = [content[y * (1 + 3 * width) : (y + 1) * (1 + 3 * width)] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return [[tuple(row[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for row in rows]  # type: ignore[misc]


def runs(row: list[tuple[int, int, int]], wanted: set[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the colours of a row, each once, of those that are wanted."""
    found = [color for color in row if color in wanted]
    return [color for place, color in enumerate(found) if not place or color != found[place - 1]]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 30), (8, 80), (2, 300), (200, 3)])
def test_every_cell_has_the_colour_of_its_value(rows: int, columns: int) -> None:
    # Neighbours differ, so that each cell is a run of its own.
    grid = [[float((7 * y + 13 * x) % 101) for x in range(columns)] for y in range(rows)]
    scale = scale_of(grid)
    pixels = read(heatmap_png(grid, scale, **NAMES))
    assert len({len(row) for row in pixels}) == 1
    wanted = [[scale.color(value) for value in row] for row in grid]
    colors = {color for row in wanted for color in row}
    # The scale beside the grid has colours of its own: only what is left of it counts.
    found = [runs(row[: len(row) - 48], colors) for row in pixels]
    place = 0
    for row in wanted:
        while place < len(found) and found[place][:columns] != row:
            place += 1
        assert place < len(found)


def test_a_cell_without_a_value_is_grey_and_the_scale_stands_beside() -> None:
    scale = Scale(0, 10)
    pixels = read(heatmap_png([[0.0, None, 10.0, math.nan]], scale, **NAMES))
    every = {color for row in pixels for color in row}
    assert {SEQUENTIAL[0], SEQUENTIAL[-1], scale.color(None)} <= every
    assert scale.color(math.nan) == scale.color(None)
    column = next(x for x in range(len(pixels[0]) - 1, 0, -1) if any(row[x] == SEQUENTIAL[0] for row in pixels))
    bar = [row[column] for row in pixels if row[column] != (255, 255, 255)]
    assert bar[0] == SEQUENTIAL[-1]
    assert bar[-1] == SEQUENTIAL[0]


def test_scales_run_from_end_to_end_and_signed_ones_around_zero() -> None:
    scale = scale_of([[3.0, None], [5.0, 4.0]])
    assert (scale.low, scale.high) == (3.0, 5.0)
    assert scale.color(3) == SEQUENTIAL[0]
    assert scale.color(99) == scale.color(5) == SEQUENTIAL[-1]
    assert scale.color(-99) == SEQUENTIAL[0]
    around = scale_of([[-0.25, 1.0]], signed=True)
    assert (around.low, around.high) == (-1.0, 1.0)
    assert around.color(0) == DIVERGING[2]
    assert around.color(1) == DIVERGING[-1]
    lightness = [sum(color) for color in SEQUENTIAL]
    assert lightness == sorted(lightness)


def test_a_grid_of_one_value_or_of_none_has_a_scale() -> None:
    for grid in ([[2.0, 2.0]], [[None, None]], [[0.0]]):
        for signed in (False, True):
            read(heatmap_png(grid, scale_of(grid, signed=signed), **NAMES))


def test_letters_are_drawn_and_unknown_ones_blank() -> None:
    def ink(title: str) -> int:
        pixels = read(heatmap_png([[1.0]], Scale(0, 1), title=title, rows="", columns=""))
        return sum(color == (28, 33, 38) for row in pixels for color in row)

    blank = ink(" ")
    assert ink("8") - blank == 4 * 13  # the pixels of an 8, each of two by two
    assert ink("\u00e9") == blank
    assert ink("layer") == ink("LAYER") > blank


def test_the_same_grid_gives_the_same_file() -> None:
    grid = [[0.1, 0.2], [0.3, None]]
    assert heatmap_png(grid, scale_of(grid), **NAMES) == heatmap_png(grid, scale_of(grid), **NAMES)


@pytest.mark.parametrize("grid", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_a_grid_that_is_none_is_refused(grid: list[list[float | None]]) -> None:
    with pytest.raises(ValueError, match="rows of one length"):
        heatmap_png(grid, Scale(0, 1), **NAMES)


def test_numbers_have_three_digits() -> None:
    assert [number_text(value) for value in (0.0, 0.1234, 12.34, 1976.4, -0.5)] == [
        "0",
        "0.123",
        "12.3",
        "1976",
        "-0.5",
    ]
