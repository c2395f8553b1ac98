"""The page of a server, in a real browser: a chat on a document, its figures, a phone; it asks no other host.

With ROCKETKV_SCREENSHOTS=docs it asks SmolLM2 in place of a tiny model, and writes the pictures of docs/serve.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import chromium
from serving import FIELDS, NAME, TEXT, Gate, model, serving, tokenizer

pytestmark = pytest.mark.browser

PICTURES = os.environ.get("ROCKETKV_SCREENSHOTS")
HOSTILE = "</textarea><img src=x onerror=window.hit=1><script>window.hit=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Gate]]:
    if PICTURES is None:
        made, names, fields = model(), tokenizer(), FIELDS
    else:
        from rocketkv.hf.loading import load_smollm2

        made, names = load_smollm2()
        fields = {"method": "rocketkv+", "token_budget": 128}
    gate = Gate(made)
    with serving(made, names, fields, output_tokens=24, name=NAME if PICTURES is None else "SmolLM2-135M") as url:
        yield url, gate


class Visit:
    """A page open in a browser, and all that it said and asked for."""

    def __init__(self, browser: Any, url: str, width: int, height: int = 800) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(60_000 if PICTURES is None else 1_800_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.locator("#model").filter(has_text=re.compile(".")).wait_for()

    def ask(self, question: str, key: str = "Enter") -> None:
        before = self.page.locator("#talk small").count()
        self.page.locator("#question").fill(question)
        self.page.locator("#question").press(key)
        self.page.locator("#talk small").nth(before).wait_for()

    def figure(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").inner_text())

    def picture(self, name: str) -> None:
        if PICTURES is not None:
            self.page.screenshot(path=Path(PICTURES) / f"serve-{name}.png", full_page=True)


def document() -> str:
    if PICTURES is None:
        return f"{HOSTILE} {TEXT}"
    from rocketkv.eval.tasks.text import prose

    return f"{prose(3, 80)} {prose(4, 80)}"


def test_a_document_is_asked_twice(browser: Any, served: tuple[str, Gate]) -> None:
    visit = Visit(browser, served[0], 1280)
    visit.page.locator("#text").fill(document())
    visit.ask("What is this text about?")
    assert visit.figure("reused") == "0.0 %"
    assert 0 < float(visit.figure("saved").split()[0]) < 100
    assert visit.page.locator("#source").is_disabled()
    visit.ask("Say it in five words.")
    assert float(visit.figure("reused").split()[0]) > 80
    assert re.fullmatch(r"\d+ of \d+ tokens", visit.figure("tokens"))
    assert re.fullmatch(r"[\d.]+ %", visit.figure("missed"))
    assert re.fullmatch(r"\d+\.\d\d s", visit.figure("first"))
    assert visit.page.locator("#talk li").count() == 4
    assert all(visit.page.locator("#talk .assistant p").all_inner_texts())
    visit.picture("desktop")
    visit.page.locator("#new").click()
    assert visit.page.locator("#talk li").count() == 0
    assert visit.page.locator("#source").is_enabled()
    assert visit.page.evaluate("window.hit") is None
    assert visit.said == []
    assert all(url.startswith((served[0], "data:")) for url in visit.asked)
    visit.page.close()


def test_page_fits_a_phone(browser: Any, served: tuple[str, Gate]) -> None:
    visit = Visit(browser, served[0], 360, 740)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    visit.page.locator("#text").fill(document())
    visit.ask(f"Which places does it name? {HOSTILE if PICTURES is None else ''}".strip())
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    small = """[...document.querySelectorAll('button, select, #question')].filter(
        each => each.offsetHeight && each.getBoundingClientRect().height < 36).length"""
    assert visit.page.evaluate(small) == 0, "too small for a finger"
    assert visit.page.evaluate("window.hit") is None
    assert visit.said == []
    visit.picture("phone")
    visit.page.close()


def test_an_answer_can_be_stopped(browser: Any, served: tuple[str, Gate]) -> None:
    url, gate = served
    visit = Visit(browser, url, 1280)
    gate.close(after=16)
    visit.page.locator("#question").fill("How many doors?")
    visit.page.locator("#send").click()
    visit.page.locator("#talk .assistant p").filter(has_text=re.compile(".")).wait_for()
    assert visit.page.locator("#send").is_disabled()
    visit.page.locator("#stop").click()
    visit.page.locator("#stop").wait_for(state="hidden")
    gate.open()
    visit.ask("And now?")
    assert visit.page.locator("#talk li").count() == 4
    assert visit.said == []
    visit.page.close()


@pytest.mark.skipif(PICTURES is not None, reason="pictures show the other tests")
def test_a_key_is_asked_for(browser: Any) -> None:
    with serving(model(), tokenizer(), key="secret", output_tokens=8) as url:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        page.locator("#key").fill("wrong")
        page.locator("#key").press("Tab")
        page.get_by_text("the API key is missing or wrong").wait_for()
        page.locator("#key").fill("secret")
        page.locator("#key").press("Tab")
        page.locator("#model").filter(has_text=NAME).wait_for()
        page.close()
