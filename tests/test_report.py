import contextlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from harness.report import main
from tests.analysis.synthetic import Cell, comparison, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("results") / "sweep", comparison())


@pytest.fixture(scope="module")
def said(sweep: Path) -> str:
    """What the command prints; it must end with 0 although cells failed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([str(sweep)]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def report(sweep: Path, said: str) -> Path:
    return sweep / "report"


class Page(HTMLParser):
    """Tags, addresses and text of a page, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_everything_lands_below_the_sweep(report: Path) -> None:
    names = set(files(report))
    assert {"report.html", "report.md", "figures/clip_fraction.png", "figures/clip_fraction.svg"} <= names
    assert {"tables/final_scores.csv", "tables/final_scores.md", "tables/completion.csv"} <= names


def test_another_process_makes_the_same_bytes_from_the_compact_form(sweep: Path, report: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    command = [sys.executable, "-m", "harness.report", str(sweep), "--compact", str(reference)]
    subprocess.run(command, check=True, capture_output=True)
    path_aside = {
        name: content.replace(str(reference).encode(), str(sweep).encode())
        for name, content in files(reference / "report").items()
    }
    assert path_aside == files(report)


def test_text_of_the_model_is_shown_and_never_run(page: Page) -> None:
    assert "script" not in page.tags and "b" not in page.tags
    assert "<script>alert('x')</script>" in page.text
    assert "RuntimeError: <b>out of memory</b>" in page.text


def test_the_page_stands_alone(page: Page) -> None:
    outside = [address for address in page.addresses if not address.startswith(("data:", "#"))]
    assert outside == [] and "link" not in page.tags
    assert sum(address.startswith("data:image/svg+xml;base64,") for address in page.addresses) == 6


def test_cells_that_are_not_done_are_shown_with_their_reason(page: Page, report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for text in (" ".join(page.text.split()), markdown):
        assert "1 failed, 1 diverged, 1 interrupted" in text
        assert "the loss is nan at step 17" in text
        assert "tiny_dense has no routers, so nothing to replay" in text
    assert "18 done" in page.text


def test_the_page_tells_how_it_is_made_again(page: Page, sweep: Path) -> None:
    assert f"python -m harness.report {sweep}" in page.text


def test_captions_stand_in_the_page(page: Page) -> None:
    assert len(re.findall(r"95 % bootstrap interval", page.text)) >= 6


def test_failed_cells_are_said_aloud(said: str, sweep: Path) -> None:
    assert "1 failed, 1 diverged, 1 interrupted: this is not the whole comparison" in said.replace("\n", " ")
    assert f"{sweep}/report/report.html" in said
    assert "0.551" in said and "held_out" in said


def test_a_sweep_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_moe", seed, status="planned", steps=0) for seed in range(2)]
    sweep = write_sweep(tmp_path / "sweep", cells)
    assert main([str(sweep)]) == 0
    assert "2 planned" in (sweep / "report" / "report.md").read_text()


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_nothing_to_report_ends_with_2_and_the_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert "give a sweep folder" in capsys.readouterr().err


def test_a_report_needs_no_torch() -> None:
    code = "import sys, harness.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _outcomes(report: Path) -> list[str]:
    return pd.read_csv(report / "tables" / "verdicts.csv")["first is"].tolist()


def test_the_verdict_comes_first_and_three_seeds_rank_nothing(report: Path) -> None:
    page, markdown = ((report / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.index("On tiny_dense, nothing is ranked") < page.index("<figure>")
    assert markdown.index("On tiny_dense, nothing is ranked") < markdown.index("## Training reward")
    assert set(_outcomes(report)) == {"too few"}


def test_eight_seeds_tell_a_planted_difference(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", comparison(seeds=8))
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(sweep)]) == 0
    assert "better" in _outcomes(sweep / "report") or "worse" in _outcomes(sweep / "report")
