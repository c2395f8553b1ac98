"""The page of a report: its text against made records; in a real browser it draws, sorts, fits, and asks no host."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from browser import Visit
from made_records import made_record, made_sweep
from made_report import cells, made_arms
from rocketkv.eval.report import write as report
from rocketkv.eval.report.arms import Arm
from rocketkv.eval.report.bundle import PLOTLY
from rocketkv.eval.report.page import page
from rocketkv.eval.report.plots import log_ticks, styles
from rocketkv.eval.report.tables import figure_cell

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'><a href='http://h/'>%{x}"


class Page(HTMLParser):
    """What a page holds: elements, attributes, and the cells of each table by its caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self._rows: list[list[str]] = []
        self._in: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "small":
            self._rows[-1][-1] += ", "
        elif tag == "caption":
            self.tables[""] = self._rows
        if tag == "script":
            self.scripts.append("")
        if tag in ("td", "th", "caption", "script"):
            self._in = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = None

    def handle_data(self, data: str) -> None:
        if self._in in ("td", "th"):
            self._rows[-1][-1] += data.replace("\u2212", "-")
        elif self._in == "caption":
            self.tables[data] = self.tables.pop("")
        elif self._in == "script":
            self.scripts[-1] += data


def rows_of(table: list[list[str]]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table}


def plots_of(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Page(text).scripts[0])
    return found


def test_tables_have_the_figures_by_hand() -> None:
    tables = Page(page(report.gather(made_arms()))).tables
    rows = rows_of(tables["Scores, 4096 tokens, query-agnostic"])
    assert rows["Method"] == ["mean of 1 task", "a", "b"]
    assert rows["full"][1:] == ["75.0, (30.1 to 95.4)", "75.0"]
    assert rows["rocketkv 512"] == ["50.0, -25.0 (-75.0 to 0.0)"] * 2 + ["60.0, -15.0 (-20.0 to -10.0)"]
    assert rows["snapkv 512"][1:] == ["33.3, -33.3 (-100.0 to 0.0)", "-"]
    assert rows["quest 512"] == ["OOM", "75.0, 0.0 (0.0 to 0.0)", "OOM"]
    costs = rows_of(tables["Cost, 4096 tokens, query-agnostic"])
    assert costs["full"][-2:] == ["1.00", "800"]
    assert costs["rocketkv 512"][-2:] == ["0.250, 0.25\u00d7", "80.0, 0.10\u00d7"]
    measured = ["Time per output token, median, ms", "KV cache with index, kB", "Bytes read per step, B"]
    assert costs["Method"] == measured  # the others were measured for no method


def test_every_table_equals_that_of_the_markdown() -> None:
    made = report.gather(made_sweep(samples=6, lengths=(8192,)))
    text = report.markdown(made)
    tables = Page(page(made)).tables
    compared = 0
    for title in ("Scores", "Distances", "Cost"):
        for section in made.sections:
            name = f"{title}, {section.title}"
            if name not in tables:
                continue
            compared += 1
            for method, texts in cells(text, name).items():
                assert rows_of(tables[name])[method] == [re.sub(r"(\d)x$", "\\1\u00d7", cell) for cell in texts]
    assert compared == 5
    for arm in made.maps[0].arms:
        body = text.split("## Scores by depth")[1].split(f"### {arm.name}\n")[1].strip().split("\n\n")[0]
        expected = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]
        assert tables[arm.name][1:] == expected


def test_plots_have_the_figures_by_hand() -> None:
    records = [record for record in made_arms() if record["cell"]["method"] not in ("snapkv", "quest")]
    memory, time, read, _, distance = plots_of(page(report.gather(records)))
    assert [(line["name"], line["x"], line["y"]) for line in memory["lines"]] == [
        ("m0", [1.0], [75.0]),
        ("m1", [0.25], [55.0]),
    ]
    assert [line["x"] for line in time["lines"]] == [[10.0], [5.0]]
    assert [line["x"] for line in read["lines"]] == [[800.0], [80.0]]
    assert [line["y"] for line in distance["lines"]] == [[0.0], [0.5]]
    assert (memory["ticks"][-1], time["ticks"]) == ([1.0, "100 %"], None)
    assert memory["lines"][1]["text"][0].startswith("<b>rocketkv 512</b><br>55.0, -20.0 (-")


def test_a_method_has_one_look_everywhere() -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for plot in plots_of(page(report.gather(made_sweep(samples=4, lengths=(8192,))))):
        for line in plot["lines"]:
            looks.setdefault(line["name"], set()).add((line["color"], line["symbol"]))
    assert len(looks) == 7
    assert all(len(look) == 1 for look in looks.values())
    many = styles(Arm(f"adapter-{n}", 8) for n in range(40))
    assert len({(look.color, look.symbol) for look in many.values()}) == 41


@pytest.mark.parametrize(("low", "high"), [(0.06, 1.06), (3e7, 1.1e9), (1.0, 1.001), (1e3, 1e12), (5.0, 5.0)])
def test_ticks_are_few_and_within_the_axis(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert all(0.9 * low <= tick <= 1.1 * high for tick in ticks)


def hostile_report() -> report.Report:
    records = [
        made_record(
            [100, 0], task=HOSTILE, model=HOSTILE, notes=[{"depth": 0.5}] * 2, source=HOSTILE, git_hash=HOSTILE
        ),
        made_record(
            [0, 0],
            task=HOSTILE,
            model=HOSTILE,
            method=HOSTILE,
            token_budget=8,
            prediction=HOSTILE,
            hardware={HOSTILE: HOSTILE},
            notes=[{"depth": 0.5}] * 2,
            cost={"kv_bytes": 5.0, "full_kv_bytes": 10.0, "step_seconds": 1.0, "step_bytes": 1.0},
        ),
        made_record(
            [0.1, 0.2],
            task="kl",
            model=HOSTILE,
            metric=HOSTILE,
            higher_is_better=False,
            values={HOSTILE: 1.0},
            cost={"step_bytes": 1.0},
        ),
    ]
    return report.gather(records)


def test_what_comes_from_records_is_text() -> None:
    text = page(hostile_report())
    found = Page(text)
    assert found.tags.count("script") == 3
    assert "img" not in found.tags
    assert all(value is None or value.startswith("#") for name, value in found.attributes if name == "href")
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert any(HOSTILE in row[0] for table in found.tables.values() for row in table)
    labels = [label for plot in plots_of(text) for line in plot["lines"] for label in line["text"]]
    titles = [plot["y"] for plot in plots_of(text)]
    assert len(labels) > 2
    assert any("window.hit" in label for label in labels)
    assert "<" not in found.scripts[0]
    assert not re.search(r"<(?!/?b>|br>)", "".join([*labels, *titles]))  # plotly takes some tags for its own


def test_the_policy_allows_the_own_scripts_alone() -> None:
    text = page(report.gather(made_arms()))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', text)
    assert gzip.decompress(base64.b64decode(packed)) == PLOTLY.read_bytes()
    scripts.append(PLOTLY.read_text(encoding="utf-8"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2 == policy.count("sha256-")
    assert all(f"'sha256-{digest}'" in policy for digest in hashes)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_the_released_file() -> None:
    # `npm pack plotly.js-basic-dist-min@4.1.1`; update version, hash and licence together.
    content = PLOTLY.read_bytes()
    assert content[:100].split(b"\n")[1] == b"* plotly.js (basic - minified) v4.1.1"
    assert hashlib.sha256(content).hexdigest() == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert "MIT License" in PLOTLY.with_name("plotly-basic.LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sweep() -> report.Report:
    return report.gather(made_sweep(samples=6, lengths=(8192, 32768)))


@pytest.fixture(scope="module")
def sweep_file(sweep: report.Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(sweep), encoding="utf-8")
    return path


@pytest.mark.browser
def test_page_draws_its_plots_and_asks_no_host(browser: Any, sweep: report.Report, sweep_file: Path) -> None:
    visit = Visit(browser, sweep_file, 1280)
    plots = visit.page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.point').length)")
    marks = [len(section.points) for section in sweep.sections for _ in range(3)]
    distances = [len(section.arms) for section in sweep.sections if section.distances for _ in range(2)]
    assert sorted(plots) == sorted([*marks, *distances])
    assert min(plots) > 10
    fronts = "p => p.querySelectorAll('.trace.scatter').length === p.data.length && p.querySelector('.yerror') !== null"
    assert visit.page.evaluate(f"[...document.querySelectorAll('.plot')].every({fronts})")
    full = "p => p.layout.shapes.map(shape => shape.y0).join() === p.data.find(line => line.name === 'm0').y.join()"
    assert visit.page.evaluate(f"[...document.querySelectorAll('.plot')].every({full})")
    assert visit.page.locator(".plot a").count() == 0  # no link to plotly's makers
    assert visit.said == []
    assert visit.asked == [sweep_file.as_uri()]
    visit.page.close()


@pytest.mark.browser
def test_table_is_sorted_by_click_and_by_key(browser: Any, sweep: report.Report, sweep_file: Path) -> None:
    visit = Visit(browser, sweep_file, 1280)
    section = sweep.sections[2]  # some of its cells are missing, and memory did not suffice for some
    table = visit.page.get_by_role("region", name=f"Scores, {section.title}")
    names = "rows => rows.map(row => row.cells[0].textContent)"
    before = table.locator("tbody tr").evaluate_all(names)
    assert before == [arm.name for arm in section.arms]

    head = table.locator("thead th").nth(1)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    scores = {arm.name: section.mean[arm].score for arm in section.arms}
    after = table.locator("tbody tr").evaluate_all(names)
    falling = [scores[name] for name in after]
    known = [score for score in falling if score is not None]
    assert known == sorted(known, reverse=True)
    assert falling[: len(known)] == known  # out of memory comes last, either way
    assert len(known) == len(after) - 1

    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [scores[name] for name in table.locator("tbody tr").evaluate_all(names)]
    assert rising[: len(known)] == sorted(known)
    assert rising[-1] is None

    table.locator("thead th").first.locator("button").press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert table.locator("tbody tr").evaluate_all(names) == before
    visit.page.close()


@pytest.mark.browser
def test_figures_on_the_screen_are_those_of_the_report(browser: Any, sweep: report.Report, sweep_file: Path) -> None:
    visit = Visit(browser, sweep_file, 1280)
    for section in sweep.sections:
        region = visit.page.get_by_role("region", name=f"Scores, {section.title}")
        shown = region.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.querySelector('b')?.innerText ?? cell.innerText))"
        )
        expected = [
            [arm.name, *(figure_cell(f).text for f in
             [section.mean[arm], *(column.figures[arm] for column in section.scores)])]
            for arm in section.arms
        ]  # fmt: skip
        assert shown == expected
    visit.page.close()


@pytest.mark.browser
def test_nothing_from_records_runs(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(hostile_report()), encoding="utf-8")
    visit = Visit(browser, path, 1280)
    visit.page.locator(".plot .point path, .plot path.point").first.hover(force=True)
    assert visit.page.evaluate("window.hit") is None
    assert visit.page.locator("img, .plot a").count() == 0
    assert visit.said == []
    assert visit.near() == []
    visit.page.close()


@pytest.mark.browser
def test_page_fits_a_phone_and_paper(browser: Any, sweep_file: Path) -> None:
    visit = Visit(browser, sweep_file, 360)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    beyond = """[...document.querySelectorAll('.plot')].filter(plot =>
        plot.querySelector('.main-svg').getBoundingClientRect().width > plot.getBoundingClientRect().width + 1 ||
        plot.getBoundingClientRect().right > innerWidth).length"""
    assert visit.page.evaluate(beyond) == 0
    assert visit.page.evaluate("[...document.querySelectorAll('.scroll')].some(b => b.scrollWidth > b.clientWidth)")

    visit.page.set_viewport_size({"width": 1280, "height": 800})
    visit.until("document.querySelector('.plot .main-svg').clientWidth > 330")  # plotly waits before it draws anew
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    visit.page.emulate_media(media="print")
    visit.page.set_viewport_size({"width": 695, "height": 1000})  # A4 within its margins
    assert visit.page.evaluate(beyond) == 0
    assert not visit.page.locator("nav").is_visible()
    visit.page.close()


@pytest.mark.browser
def test_a_method_can_be_hidden_in_the_plots(browser: Any, sweep_file: Path) -> None:
    visit = Visit(browser, sweep_file, 1280)
    section = visit.page.locator("section").first
    count = section.locator(".plot").first.locator("path.point").count()
    button = section.get_by_role("button", name="rocketkv", exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert section.locator(".plot").first.locator("path.point").count() == count - 3
    button.click()
    assert section.locator(".plot").first.locator("path.point").count() == count
    assert visit.said == []
    visit.page.close()
