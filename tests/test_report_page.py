"""The page in a real browser, as wide as a desk's and as a phone's.

Screenshots are kept where the environment variable LEVELFIELD_SCREENSHOTS says, or else below pytest's own folder.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from harness.analysis.page import write_report
from harness.analysis.sweep import read_sweep
from tests.analysis.synthetic import comparison, write_sweep

playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed, and none is downloaded"),
]

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DESK, PHONE = 1280, 390
HOSTILE = "<script>alert(1)</script><b>x</b><img src=x onerror=alert(2)>"
WIDEST = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@dataclass
class Visit:
    """A page that is open, and what happened while it was."""

    page: "playwright.Page"
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep with failed cells, whose samples are made to look like a page of their own."""
    sweep = write_sweep(tmp_path_factory.mktemp("results") / "sweep", comparison())
    for file in sweep.glob("*/samples.jsonl"):
        file.write_text(file.read_text().replace("<script>alert('x')</script>", HOSTILE))
    write_report(read_sweep(sweep), sweep / "report")
    return sweep / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


def visit(browser: "playwright.Browser", file: Path, width: int, **options: object) -> Visit:
    seen = Visit(browser.new_page(viewport={"width": width, "height": 900}, **options))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    seen.page.goto(file.as_uri())
    return seen


@pytest.fixture(params=[DESK, PHONE])
def opened(browser: "playwright.Browser", report: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    seen = visit(browser, report / "report.html", request.param)
    yield seen
    seen.page.close()


def column(page: "playwright.Page", table: str, index: int) -> list[str]:
    """What the cells of a column are sorted by."""
    cells = page.locator(f"table.{table} tbody tr td:nth-child({index})").all()
    return [cell.get_attribute("data-value") or cell.inner_text() for cell in cells]


def test_it_opens_without_complaint_and_asks_no_host(opened: Visit) -> None:
    hosts = [address for address in opened.requests if not address.startswith(("file:", "data:"))]
    assert (opened.complaints, hosts, opened.dialogs) == ([], [], [])
    assert sum(address.startswith("file:") for address in opened.requests) == 1  # the page itself
    figures = opened.page.evaluate("Array.from(document.images, (image) => image.naturalWidth)")
    assert len(figures) >= 6 and all(figures)


def test_nothing_is_wider_than_the_screen_but_what_scrolls_in_its_own_box(opened: Visit) -> None:
    widest, screen = opened.page.evaluate(WIDEST)
    assert widest <= screen
    boxes = opened.page.evaluate("Array.from(document.querySelectorAll('.wide'), (e) => e.scrollWidth - e.clientWidth)")
    assert (max(boxes) > 0) == (opened.page.viewport_size["width"] == PHONE)  # a desk has room for every table


def test_numbers_sort_as_numbers_and_a_second_press_turns_them_round(opened: Visit, report: Path) -> None:
    page, table = opened.page, pd.read_csv(report / "tables" / "clip_fraction.csv")
    name = "times the smallest"  # shown as 1.0, 2.5, 30.1 and 150.4, which text would put elsewhere
    at = list(table).index(name) + 1
    header = page.locator(f"table.clip_fraction th:nth-child({at})")
    before = list(map(float, column(page, "clip_fraction", at)))
    assert before == table[name].tolist() and before not in (sorted(before), sorted(before, reverse=True))
    header.get_by_role("button", name=name).click()
    assert list(map(float, column(page, "clip_fraction", at))) == sorted(before)
    assert header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").click()
    assert list(map(float, column(page, "clip_fraction", at))) == sorted(before, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"


def test_words_among_numbers_come_after_them(opened: Visit) -> None:
    page, cells = opened.page, "table.clip_fraction td:nth-child(3)"
    page.locator(cells).nth(1).evaluate("(cell) => { delete cell.dataset.value; cell.textContent = 'over 1,000'; }")
    page.locator("table.clip_fraction th:nth-child(3) button").click()
    assert [text == "over 1,000" for text in page.locator(cells).all_inner_texts()][-2:] == [False, True]


def test_text_sorts_too_and_one_column_at_a_time_says_so(opened: Visit) -> None:
    page = opened.page
    for index in (2, 1):
        page.locator(f"table.final_scores th:nth-child({index}) button").press("Enter")
    assert column(page, "final_scores", 1) == sorted(column(page, "final_scores", 1))
    assert page.locator("table.final_scores th[aria-sort]").count() == 1
    assert column(page, "final_scores", 2) != sorted(column(page, "final_scores", 2))


def test_what_is_absent_stays_last_whichever_way(opened: Visit) -> None:
    page, cells = opened.page, "table.budget_by_phase td:nth-child(5)"
    for _ in range(2):
        page.locator("table.budget_by_phase th:nth-child(5) button").click()
        shown = [text == "–" for text in page.locator(cells).all_inner_texts()]
        assert shown == sorted(shown) and 0 < sum(shown) < len(shown)


def test_text_that_looks_like_a_page_is_shown_as_text(opened: Visit) -> None:
    page = opened.page
    assert HOSTILE in page.locator("table.samples").inner_text()
    assert page.locator("td script, td b, td img").count() == 0
    assert page.locator("script").count() == 1
    assert opened.dialogs == []


def test_a_script_that_got_in_would_not_run(browser: "playwright.Browser", report: Path, tmp_path: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    intruder = "<script>document.title = 'taken'</script><img src='data:,' onerror=\"document.title = 'taken'\">"
    (tmp_path / "page.html").write_text(html.replace("<main>", f"<main>{intruder}"), encoding="utf-8")
    seen = visit(browser, tmp_path / "page.html", DESK)
    assert seen.page.title() == "Levelfield: synthetic"
    assert len(seen.complaints) >= 2  # the browser says what it refused
    assert seen.page.locator("table.final_scores th button").count() > 0
    seen.page.close()


def test_without_its_script_the_page_still_says_everything(browser: "playwright.Browser", report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((report / "report.html").as_uri())
    assert page.locator("th button").count() == 0
    assert "nothing is ranked" in page.locator("#verdict + .verdict").inner_text()
    assert page.locator("table.final_scores tbody tr").count() == len(
        pd.read_csv(report / "tables" / "final_scores.csv")
    )
    context.close()


def test_in_print_nothing_is_cut_off(browser: "playwright.Browser", report: Path) -> None:
    seen = visit(browser, report / "report.html", 718)  # A4 between margins
    seen.page.emulate_media(media="print")
    widest, paper = seen.page.evaluate(WIDEST)
    assert widest <= paper
    assert not seen.page.locator("nav").is_visible()
    seen.page.close()


def test_screenshots_are_kept_and_show_something(opened: Visit, tmp_path: Path) -> None:
    folder = Path(os.environ.get("LEVELFIELD_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    width = opened.page.viewport_size["width"]
    for name, whole in (("top", False), ("page", True)):
        file = folder / f"report-{width}-{name}.png"
        opened.page.screenshot(path=file, full_page=whole)
        with Image.open(file) as image:
            assert image.width == width
            colors = image.convert("RGB").getcolors(image.width * image.height)
        assert len(colors) > 100
        assert max(count for count, _ in colors) < 0.97 * image.width * image.height
