import base64
import contextlib
import hashlib
import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from harness.entries import conf_dir
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
    """Tags, addresses, headings and text of a page, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]

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
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert "<script>alert('x')</script>" in page.text
    assert "RuntimeError: <b>out of memory</b>" in page.text


def test_the_page_stands_alone(page: Page, report: Path) -> None:
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert len(page.sources) == len(list((report / "figures").glob("*.svg"))) and "link" not in page.tags
    beside = [link for link in page.links if not link.startswith("#")]
    assert [link for link in beside if not (report / link).is_file()] == []


def test_only_the_script_and_the_style_of_the_page_are_allowed(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    policy = html.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        text = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        assert rules.pop(kind) == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_the_page_and_its_markdown_have_the_same_order(report: Path) -> None:
    html, markdown = ((report / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    sections = re.findall(r"<h2[^>]*>([^<]+)</h2>", html)
    assert sections == [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")]
    assert sections == [
        "Verdict", "Claims", "Figures", "Cells", "What was equal", "Budget", "Tables", "Samples", "Provenance",
    ]  # fmt: skip
    assert re.findall(r"<nav.*</nav>", html, re.DOTALL)[0].count("<a ") == len(sections)


def test_every_figure_has_its_data_beside_it(page: Page, report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    figures = sorted(file.stem for file in (report / "figures").glob("*.svg"))
    assert figures == sorted(file.stem for file in (report / "figures").glob("*.csv"))
    for name in figures:
        assert f"figures/{name}.csv" in page.links and f"(figures/{name}.csv)" in markdown
        data = pd.read_csv(report / "figures" / f"{name}.csv")
        assert len(data) and "setting" in data and {"variant", "first"} & set(data), name


def test_markup_of_the_model_is_text_in_markdown_too(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown and "<img" not in markdown and "<b>" not in markdown
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" in markdown


def test_cells_that_are_not_done_are_shown_with_their_reason(page: Page, report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for text in (" ".join(page.text.split()), markdown):
        assert "Not the whole comparison: 1 interrupted." in text
        assert "Went wrong: 1 failed, 1 diverged. In comparisons of scores these count as the worst" in text.replace(
            "**", ""
        )
        assert "the loss is nan at step 17" in text
        assert "tiny_dense has no routers, so nothing to replay" in text
    assert "18 done" in page.text


def test_the_page_tells_how_it_is_made_again(page: Page, sweep: Path) -> None:
    assert f"python -m harness.report {sweep}" in page.text


def test_captions_stand_in_the_page(page: Page) -> None:
    assert len(re.findall(r"95 % bootstrap interval", page.text)) >= 6


def test_failed_cells_are_said_aloud(said: str, sweep: Path) -> None:
    assert "1 interrupted: this is not the whole comparison" in said.replace("\n", " ")
    assert "1 failed, 1 diverged: in comparisons of scores these count as the worst" in said.replace("\n", " ")
    assert f"{sweep}/report/report.html" in said
    assert "0.551" in said and "held_out" in said


def test_the_verdict_is_said_before_the_scores(said: str) -> None:
    words = " ".join(said.split())
    verdict = words.index("On tiny_dense, nothing is ranked on held_out: ")
    assert verdict < words.index("Not tuned in this sweep") < words.index("Final scores in full")


def test_a_search_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gains = {1e-4: 0.1, 2e-4: 0.3, 8e-4: 0.2}
    cells = [
        Cell(name, "tiny_dense", 0, learning_rate=rate, gain=gain)
        for name in ("ppo", "gspo")
        for rate, gain in gains.items()
    ]
    sweep = write_sweep(tmp_path / "sweep", cells)
    assert main([str(sweep)]) == 0
    found = "The best learning rates by mean training reward: 0.0002 for ppo, 0.0002 for gspo."
    assert capsys.readouterr().out.startswith(found)
    markdown = (sweep / "report" / "report.md").read_text(encoding="utf-8")
    assert f"- **{found}**" in markdown
    verdict = markdown.partition("## Verdict\n")[2].partition("\n## ")[0]
    assert verdict.index("### Learning-rate search") < verdict.index("### Final scores")


def test_of_speeds_that_were_alike_none_is_said_to_be_a_setting(tmp_path: Path) -> None:
    cells = [Cell(f"algorithm_{number}", "tiny_dense", seed, steps=3) for number in range(12) for seed in (0, 1)]
    sweep = write_sweep(tmp_path / "sweep", cells)
    assert main([str(sweep)]) == 0
    page = (sweep / "report" / "report.html").read_text(encoding="utf-8")
    folded = (
        page.partition("speed of the machine on tiny_dense")[2].partition("<summary>")[2].partition("</summary>")[0]
    )
    assert folded.startswith("algorithm_0 ") and folded.endswith("...")


def test_a_sweep_of_one_cell_has_no_table_of_differences(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_moe", 0)])
    assert main([str(sweep)]) == 0
    page, markdown = ((sweep / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "1 cell: 1 done" in page and "1 cell: 1 done" in markdown
    assert "What differs between the algorithms" not in page + markdown


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


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.report.read_sweep", interrupted)
    assert main([str(tmp_path)]) == 130


def test_a_report_needs_no_torch() -> None:
    code = "import sys, harness.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _outcomes(report: Path) -> list[str]:
    return pd.read_csv(report / "tables" / "verdicts.csv")["first is"].tolist()


def test_the_verdict_comes_first_and_three_seeds_rank_nothing(report: Path) -> None:
    page, markdown = ((report / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.index("On tiny_dense, nothing is ranked") < page.index("<figure")
    assert markdown.index("On tiny_dense, nothing is ranked") < markdown.index("### Training reward")
    assert set(_outcomes(report)) == {"too few"}


def test_eight_seeds_tell_a_planted_difference(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", comparison(seeds=8))
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(sweep)]) == 0
    assert "better" in _outcomes(sweep / "report") or "worse" in _outcomes(sweep / "report")


def _made_by(report: Path) -> list[str]:
    """The arguments of the command with which a report says it was made."""
    made = re.search(r"^Made by `python -m harness\.report (.*)`\.$", (report / "report.md").read_text(), re.MULTILINE)
    assert made is not None
    return shlex.split(made[1])


def _run(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(argument) for argument in arguments]) == 0


def test_what_is_asked_for_is_said_and_made_again_by_the_command_in_the_page(tmp_path: Path) -> None:
    cells = [Cell(name, "tiny_dense", seed) for name in ("ppo", "grpo", "gspo") for seed in range(4)]
    sweep = write_sweep(tmp_path / "my sweep", cells)
    _run(
        sweep, "--metric", "area:reward/mean", "--axis", "queries", "--baseline", "grpo",
        "--filter", "algorithm=grpo,ppo", "--filter", "seed=0,1,2",
    )  # fmt: skip
    report = sweep / "report"
    first = files(report)
    found = pd.read_csv(report / "tables" / "verdicts.csv")
    assert found[["first", "second", "pairs"]].values.tolist() == [["ppo", "grpo", 3]]
    drawn = pd.read_csv(report / "figures" / "training_reward.csv")
    assert drawn["axis"].unique().tolist() == ["queries"] and drawn["x"].max() <= 1280
    for text in (Page((report / "report.html").read_text()).text, (report / "report.md").read_text()):
        assert "Filtered by algorithm=grpo,ppo and seed=0,1,2: 6 of 12 cells" in text
        assert "largest that all finished runs reached: 1.28 thousand on tiny_dense" in text
        assert "area under the curve of training reward: better means more of it" in text
        assert "against the baseline grpo alone" in text
        assert "On tiny_dense, compared with grpo on area under the curve of training reward. Not ranked, for" in text
    _run(*_made_by(report))
    assert files(report) == first


def test_of_an_earlier_report_nothing_is_left_that_this_one_has_not(tmp_path: Path) -> None:
    cells = [Cell(name, model, 0) for name in ("grpo", "gspo") for model in ("tiny_dense", "tiny_moe")]
    sweep = write_sweep(tmp_path / "sweep", cells)
    _run(sweep)
    mine = sweep / "report" / "figures" / "mine.png"
    mine.write_text("drawn by hand")
    assert (sweep / "report" / "figures" / "expert_change.svg").exists()
    _run(sweep, "--filter", "model=tiny_dense")
    _run(sweep, "--filter", "model=tiny_dense", "--out", tmp_path / "fresh")
    assert {*files(tmp_path / "fresh"), "figures/mine.png"} == set(files(sweep / "report"))


def test_several_sweeps_are_reported_on_as_one(tmp_path: Path) -> None:
    parts = [
        write_sweep(tmp_path / name, [Cell(name, "tiny_dense", seed) for seed in range(3)]) for name in ("grpo", "gspo")
    ]
    report = tmp_path / "joined"
    _run(*parts, "--out", report)
    first = files(report)
    assert "Levelfield: synthetic + synthetic" in (report / "report.md").read_text()
    assert pd.read_csv(report / "tables" / "verdicts.csv")["pairs"].tolist() == [3]
    assert _made_by(report) == [*map(str, parts), "--out", str(report)]
    _run(*_made_by(report))
    assert files(report) == first


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--metric", "rewards"], "metric rewards: the sweep has no such metric; it has held_out, longer, signed"),
        (["--axis", "joules"], "axis joules: what was spent on it is not recorded with held_out"),
        (["--axis", "joules", "--metric", "reward/mean"], "recorded are flops, device_seconds, tokens"),
        (["--baseline", "dapo"], "baseline dapo: there is no such variant here; there are gspo"),
        (["--filter", "seed=7"], "filter seed=7: no cell has seed=7; seed is one of 0"),
        (["--filter", "sead=0"], "filter sead: give KEY=VALUE"),
        (["--claims", "{sweep}/nowhere"], "nowhere"),
        (["--out", "/dev/null/report"], "--out /dev/null/report: the report cannot be written there"),
        (["{other}"], "--out: several sweeps have no common folder"),
        (["{other}", "--compact", "kept"], "--compact: the compact form is of one sweep"),
        (["{other}", "--out", "{sweep}/report"], "cannot be joined, since they differ in rollout settings"),
        (["{sweep}", "--out", "{sweep}/report"], "cannot be joined: both have the cell gspo-tiny_dense-chain_sum-s0"),
    ],
)
def test_what_cannot_be_reported_is_refused_with_the_reason_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    warm = {"rollout": {"temperature": 0.7}}
    sweep = write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_dense", 0)])
    other = write_sweep(tmp_path / "other", [Cell("grpo", "tiny_dense", 0, config=warm)])
    assert main([str(sweep), *(option.format(sweep=sweep, other=other) for option in options)]) == 2
    assert reason in capsys.readouterr().err
    assert not (sweep / "report").exists()


def test_claims_of_ones_own_are_tested_beside_ours(tmp_path: Path) -> None:
    ours = conf_dir() / "claims" / "clip_fraction.yaml"
    own = tmp_path / "claims" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(ours.read_text(encoding="utf-8").replace("statement: GSPO", "statement: My own GSPO"))
    cells = [Cell(name, "tiny_dense", seed) for name in ("grpo", "gspo") for seed in range(5)]
    sweep = write_sweep(tmp_path / "sweep", cells)
    _run(sweep, "--claims", own.parent)
    claims = pd.read_csv(sweep / "report" / "tables" / "claims.csv")["claim"].tolist()
    assert [claim.startswith("My own GSPO") for claim in claims].count(True) == 1 and len(claims) > 2
    assert _made_by(sweep / "report") == [str(sweep), "--claims", str(own.parent)]
