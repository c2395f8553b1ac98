"""Screenshots of a real report, as docs/ shows them: `ROCKETKV_SCREENSHOTS=1` writes them anew."""

from __future__ import annotations

import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from browser import Visit
from rocketkv.eval.report.write import write_report

ROOT = Path(__file__).resolve().parents[2]
HEIGHT = 1560  # of both pictures


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the recipe `quick` on SmolLM2."""
    folder = tmp_path_factory.mktemp("quick")
    with tarfile.open(ROOT / "tests" / "golden" / "quick.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    write_report(folder, folder / "report.html")
    return folder / "report.html"


def size_of(picture: bytes) -> tuple[int, int]:
    """Return width and height of a PNG."""
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


@pytest.mark.browser
@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
def test_the_report_of_quick_fits_the_screen(name: str, width: int, browser: Any, report: Path) -> None:
    visit = Visit(browser, report, width)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    cut = """(() => {
        const lines = box => {
            const range = document.createRange();
            range.selectNodeContents(box);
            return range.getClientRects().length;
        };
        return [...document.querySelectorAll('h1, h2, h3, h5, p, dd, li, summary, .plot, .legend button, .answers b')]
            .filter(box => box.scrollWidth > box.clientWidth + 1 || (box.matches('.answers b') && lines(box) > 1))
            .map(box => box.outerHTML.slice(0, 99));
    })()"""
    assert visit.page.evaluate(cut) == []
    assert visit.page.locator(".plot .point").count() > 20
    assert visit.said == []
    assert visit.near() == []
    visit.page.set_viewport_size({"width": width, "height": HEIGHT})
    visit.page.wait_for_timeout(300)
    picture = visit.page.screenshot()
    visit.page.close()
    place = ROOT / "docs" / f"report-{name}.png"
    if os.environ.get("ROCKETKV_SCREENSHOTS"):
        place.write_bytes(picture)
    assert size_of(picture) == size_of(place.read_bytes()) == (width, HEIGHT)
