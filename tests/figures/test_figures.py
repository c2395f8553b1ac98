"""Figures against the tensors that they draw, by loops; plotly takes them; and what they refuse."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy
import plotly.graph_objects
import pytest
import torch
from PIL import Image

from rocketkv import figures
from rocketkv.figures.levels import binned, share_levels, weight_levels
from rocketkv.figures.maps import POINTS
from rocketkv.figures.raster import LEVELS, alpha
from rocketkv.state.trace import Trace
from traced import NEW_TOKENS, PROMPT, traced, words

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def trace() -> Trace:
    return traced()


def opacity(figure: dict[str, Any], rows: int, columns: int) -> numpy.ndarray:
    """Return the opacity of a map's cells, [rows, columns] from 0 to 255."""
    (image,) = figure["layout"]["images"]
    picture = Image.open(io.BytesIO(base64.b64decode(image["source"].removeprefix("data:image/png;base64,"))))
    pixels = numpy.asarray(picture.convert("RGBA"))[..., 3]
    assert image["sizex"] == columns
    assert image["sizey"] == rows
    cell_rows, cell_columns = pixels.shape[0] // rows, pixels.shape[1] // columns
    blocks = pixels.reshape(rows, cell_rows, columns, cell_columns)
    assert (blocks == blocks[:, :1, :, :1]).all(), "a cell has one colour"
    return blocks[:, 0, :, 0]


@pytest.mark.parametrize("row", [0, 1])
def test_the_map_of_kept_tokens_is_theirs(trace: Trace, row: int) -> None:
    figure = figures.kept(trace.kept, words(), row=row)
    expected = [
        [255 * (token in kept[row, head].tolist()) for token in range(PROMPT)]
        for kept in trace.kept.values()
        for head in range(2)
    ]
    assert opacity(figure, 4, PROMPT).tolist() == expected
    shares = [round(sum(column) / 4 / 255, 5) for column in zip(*expected, strict=True)]
    assert figure["data"][0]["y"] == shares
    assert 0 < sum(shares) < PROMPT
    assert figure["data"][0]["hovertext"][7] == f"<b>Kept by {shares[7]:.0%} of the heads</b><br>tokens 7 to 7<br>w7"
    assert figure["layout"]["yaxis2"]["ticktext"] == ["0", "1"]
    assert figure["layout"]["yaxis2"]["tickvals"] == [1, 3]


def test_the_map_of_reads_has_the_weights_of_each_step(trace: Trace) -> None:
    end = PROMPT + NEW_TOKENS - 1
    found = opacity(figures.reads(trace, words()), NEW_TOKENS - 1, end)
    one = opacity(figures.step(trace, 2), 4, PROMPT + 3)
    for number, step in enumerate(trace.steps):
        rows = []
        for reads in step.layers.values():
            for head in range(2):
                weights = torch.zeros(end)
                for place, first, second in zip(
                    reads.positions[0, head].tolist(), *reads.weights[0, 2 * head : 2 * head + 2], strict=True
                ):
                    if place >= 0:
                        weights[place] += (first + second) / 2
                rows.append(weights)
        mean = torch.stack(rows).mean(0)
        assert found[number].tolist() == [shade(weight) for weight in mean.tolist()]
        if number == 2:
            assert one.tolist() == [[shade(weight) for weight in row.tolist()][: PROMPT + 3] for row in rows]
    assert len(set(found.flatten().tolist())) > 4


def shade(weight: float) -> int:
    """Return the opacity of a weight: none, less than 0.0001, then half decades."""
    bounds = [0.0, 1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1, 10**-0.5]
    return round(255 * alpha(sum(weight > 0 and weight >= bound for bound in bounds)))


def test_lines_of_missed_mass_are_means_over_heads(trace: Trace) -> None:
    lines = figures.missed(trace, words())["data"]
    assert [line["name"] for line in lines] == ["Layer 0", "Layer 1", "Mean of all layers"]
    for number, line in enumerate(lines[:2]):
        assert line["x"] == list(range(PROMPT, PROMPT + NEW_TOKENS - 1))
        assert line["y"] == pytest.approx(
            [float(step.layers[number].missed[0].mean()) for step in trace.steps], abs=1e-5
        )
    assert lines[2]["y"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(*(line["y"] for line in lines[:2]), strict=True)], abs=2e-5
    )
    assert lines[0]["hovertext"][0].endswith(f"missed at token {PROMPT}<br>w{PROMPT}")


def test_plotly_takes_them(trace: Trace) -> None:
    for figure in (figures.kept(trace.kept), figures.reads(trace), figures.step(trace, 0), figures.missed(trace)):
        assert len(plotly.graph_objects.Figure(figure).data) == len(figure["data"])


def test_long_prompts_are_drawn_by_bins() -> None:
    kept = torch.arange(0, 5000, 4, dtype=torch.int32).expand(1, 3, -1)
    figure = figures.kept({7: kept})
    assert len(figure["data"][0]["x"]) <= POINTS
    assert figure["layout"]["images"][0]["sizex"] == 714 * 7  # columns of 7 tokens
    assert set(figure["data"][0]["y"][:-1]) == {0.25}
    sums, size = binned(torch.ones(1, 10), 4)
    assert (sums.tolist(), size) == ([[3, 3, 3, 1]], 3)
    assert share_levels(torch.tensor([0, 1e-6, 0.5, 1])).tolist() == [0, 1, 5, LEVELS]
    assert weight_levels(torch.tensor([0, 1e-9, 2e-4, 1])).tolist() == [0, 1, 2, LEVELS]


def test_texts_are_escaped_and_short(trace: Trace) -> None:
    hostile = ["<a href='http://h/'>", *words()[1:]]
    label = figures.kept(trace.kept, hostile)["data"][0]["hovertext"][0]
    assert "<a" not in label
    assert "&lt;a" in label


def test_what_cannot_be_drawn_is_refused(trace: Trace) -> None:
    for call, message in (
        (lambda: figures.kept({}), "positions has no layers"),
        (lambda: figures.kept(trace.kept, row=2), "row must be one of the batch's 2 rows"),
        (lambda: figures.reads(Trace()), "the trace has no steps"),
        (lambda: figures.missed(trace, row=-1), "row must be"),
        (lambda: figures.step(trace, NEW_TOKENS), f"one of the trace's {NEW_TOKENS - 1} steps"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_tokens_that_share_a_character_are_joined() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    assert figures.token_texts(Bytes(), torch.tensor([list("aé€".encode())])) == ["a", "", "é", "", "", "€"]
    assert figures.token_texts(Bytes(), [255, 98, 98, 98, 98])[-1] == "b"


def test_the_space_before_a_token_is_kept() -> None:
    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join([" the", " cat", "s"][number] for number in ids).lstrip()

    assert figures.token_texts(Pieces(), [0, 1, 2, 0]) == ["the", " cat", "s", " the"]
