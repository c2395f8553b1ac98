"""The page of figures, in a real browser: it draws, shades the text, fits a phone, and asks no host.

With ROCKETKV_SCREENSHOTS=1 it is of SmolLM2, and the pictures of docs/telemetry.md are written anew.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rocketkv
from browser import Visit
from chromium import chromium
from rocketkv import figures
from rocketkv.state.trace import Trace
from traced import NEW_TOKENS, PROMPT, traced, words

pytestmark = [pytest.mark.browser, pytest.mark.integration]

ROOT = Path(__file__).resolve().parents[2]
PICTURES = os.environ.get("ROCKETKV_SCREENSHOTS")
HEIGHT = 1700  # of both pictures
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def trace() -> Trace:
    return traced()


@pytest.fixture(scope="module")
def page(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("figures") / "page.html"
    texts = words()
    texts[5] = HOSTILE
    figures.write_page(path, trace.kept, texts, trace, facts=[("Answer", HOSTILE)])
    return path


def shading(visit: Visit) -> dict[int, int]:
    """Return the level of each token in the box, by the number in its word."""
    spans = (
        "[...document.querySelectorAll('#text span')].map(span => [span.className.slice(1) || '0', span.textContent])"
    )
    return {
        int(place): int(level)
        for level, text in visit.page.evaluate(spans)
        for place in re.findall(r"w(\d+)", text.replace(HOSTILE, ""))
    }


def test_the_text_is_shaded_by_what_was_kept_and_read(browser: Any, trace: Trace, page: Path) -> None:
    visit = Visit(browser, page, 1280)
    assert visit.said == []
    assert visit.asked == [page.as_uri()]
    assert visit.page.evaluate("window.hit") is None
    assert visit.page.locator(".plot").count() == 4
    assert visit.page.locator(".plot image").count() == 3
    kept = torch.zeros(PROMPT)
    for places in trace.kept.values():
        for head in places[0]:
            kept[head[head >= 0].long()] += 1
    found = shading(visit)
    expected = {place: -(-9 * count // 4) for place, count in enumerate(kept.int().tolist()) if place != 5}
    expected |= dict.fromkeys(range(PROMPT, PROMPT + NEW_TOKENS), 0)
    assert found == expected
    assert len(set(expected.values())) > 3

    visit.page.locator("#view").select_option(label=f"{PROMPT + 1}: w{PROMPT + 1}")
    found = shading(visit)
    read = {place for of in trace.steps[1].layers.values() for place in of.positions[0].flatten().tolist()}
    assert {place for place, level in found.items() if level} == read - {5, -1}
    visit.page.close()


@pytest.fixture(scope="module")
def pictured(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that docs/ shows: of SmolLM2 if pictures are to be written."""
    if PICTURES is None:
        return page
    from rocketkv.eval.tasks.needle import needle_prompt
    from rocketkv.hf.loading import load_smollm2

    model, tokenizer = load_smollm2()
    given, trace = needle_prompt(tokenizer, tokens=1800, depth=0.4, seed=1), Trace()
    inputs = tokenizer(given.text, return_tensors="pt", add_special_tokens=False)
    with rocketkv.patch(model, method="rocketkv+", token_budget=128, on_step=trace):
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    facts = [("Model", "SmolLM2-135M-Instruct"), ("Method", "rocketkv+, budget 128"), ("Answer", answer)]
    path: Path = tmp_path_factory.mktemp("figures") / "page.html"
    figures.write_page(path, trace.kept, figures.token_texts(tokenizer, ids), trace, facts=facts)
    return path


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
def test_it_fits_the_screen(name: str, width: int, browser: Any, pictured: Path) -> None:
    visit = Visit(browser, pictured, width)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    wide = "plot => plot.querySelector('.main-svg').clientWidth > plot.clientWidth + 1"
    assert not visit.page.evaluate(f"[...document.querySelectorAll('.plot')].some({wide})")
    assert visit.said == []
    visit.page.set_viewport_size({"width": width, "height": HEIGHT})
    visit.page.wait_for_timeout(300)
    picture = visit.page.screenshot()
    visit.page.close()
    place = ROOT / "docs" / f"show-{name}.png"
    if PICTURES is not None:
        place.write_bytes(picture)
    assert struct.unpack(">II", picture[16:24]) == struct.unpack(">II", place.read_bytes()[16:24]) == (width, HEIGHT)


def test_without_a_trace_it_has_what_is_kept(browser: Any, trace: Trace, tmp_path: Path) -> None:
    figures.write_page(tmp_path / "page.html", trace.kept, words(PROMPT))
    visit = Visit(browser, tmp_path / "page.html", 1280)
    assert visit.page.locator(".plot").count() == 1
    assert visit.page.locator("#view option").count() == 3
    assert visit.said == []
    visit.page.close()
    with pytest.raises(ValueError, match="tokens must be"):
        figures.write_page(tmp_path / "page.html", trace.kept, [])
