"""The report: one HTML page that stands alone, and the same in Markdown. All text of the runs' making is escaped."""

import base64
import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from harness.analysis.evidence import axis_sentences, headline_verdicts
from harness.analysis.fairness import checks, unequal_sentences
from harness.analysis.figures import all_figures
from harness.analysis.scores import COUNTED, WORST
from harness.analysis.style import budget_text, figure_style, save
from harness.analysis.sweep import Sweep
from harness.analysis.table import Table, markdown_text
from harness.analysis.tables import all_tables, final_scores, score_overview, search_sentences
from harness.analysis.tuning import tuning_sentence
from harness.analysis.verdicts import headlines
from harness.analysis.view import arguments, notes
from harness.runs.settings import distinct
from harness.status import number

_SECTIONS = {
    "verdict": "Verdict",
    "claims": "Claims",
    "figures": "Figures",
    "cells": "Cells",
    "equal": "What was equal",
    "budget": "Budget",
    "tables": "Tables",
    "samples": "Samples",
    "provenance": "Provenance",
}
_PLACES = {  # of tables in these sections; the others stand in "tables", and those of a search before the verdict's
    "learning_rate_search": "search",
    "verdicts": "verdict",
    "claims": "claims",
    "completion_grid": "cells",
    "algorithm_settings": "equal",
    "budget": "budget",
    "budget_by_phase": "budget",
    "samples": "samples",
}
_OPTIONAL = ("claims", "budget", "tables", "samples")  # sections that are left out where they have no table
_FILES_ONLY = ("completion",)  # the page has the grid
_LINK = re.compile(r'href="((?:figures|tables)/\w+\.(?:csv|png|svg))"')


@dataclass(frozen=True)
class Report:
    """Where a report was written, and what its reader should hear first.

    Attributes:
        headlines, findings: the verdict in sentences, and what else bears on it.
        counts: cells by status.
    """

    folder: Path
    headlines: list[str]
    findings: list[str]
    scores: Table
    counts: dict[str, int]

    @property
    def unfinished(self) -> dict[str, int]:
        """Counts of cells that are not over, by status."""
        return {status: count for status, count in self.counts.items() if status not in (*COUNTED, "skipped")}

    @property
    def wrong(self) -> dict[str, int]:
        """Counts of cells that are over but not done, by status."""
        return {status: count for status, count in self.counts.items() if status in WORST}


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    caption: str
    source: str  # data URI


def write_report(sweep: Sweep, folder: Path) -> Report:
    """Write figures/, tables/, report.html and report.md; the same sweep gives the same bytes.

    Of an earlier report in the folder, figures and tables that this one has not are removed.

    Raises:
        OSError: where the folder cannot be written.
    """
    earlier = _files(folder / "report.html")
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tables = all_tables(sweep)
    for table in tables:
        table.save(folder / "tables")
    placed = _placed(tables)
    found = headlines(headline_verdicts(sweep), sweep.baseline)
    verdict = [*unequal_sentences(sweep), *search_sentences(sweep), *found]
    findings = [*axis_sentences(sweep), tuning_sentence(sweep)]
    report = Report(folder, verdict, findings, final_scores(sweep), _counts(sweep))
    context = {
        "title": f"Levelfield: {sweep.name}",
        "counts": counted(report.counts),
        "unfinished": counted(report.unfinished),
        "wrong": counted(report.wrong),
        "sections": {name: title for name, title in _SECTIONS.items() if name not in _OPTIONAL or placed[name]},
        "overview": score_overview(sweep),
        "notes": notes(sweep),
        "headlines": verdict,
        "findings": findings,
        "budget": f"{budget_text(sweep)} ({sweep.axis})",
        "cells": number(sweep.cells),
        "figures": _figures(sweep, folder / "figures"),
        "tables": placed,
        "checks": checks(sweep),
        "provenance": _provenance(sweep),
        "command": _command(sweep, folder),
    }
    (folder / "report.html").write_text(_html(context), encoding="utf-8")
    (folder / "report.md").write_text(_markdown(context), encoding="utf-8")
    for file in earlier - _files(folder / "report.html"):
        file.unlink(missing_ok=True)
    return report


def _files(page: Path) -> set[Path]:
    """The figures and tables beside a page that it links to; what else lies there is none of ours."""
    if not page.exists():
        return set()
    links = {page.parent / link for link in _LINK.findall(page.read_text(encoding="utf-8", errors="replace"))}
    return links | {file.with_suffix(".md") for file in links if file.parent.name == "tables"}


def _placed(tables: list[Table]) -> dict[str, list[Table]]:
    """The tables by section; a section that has none is empty."""
    shown = [table for table in tables if table.name not in _FILES_ONLY]
    return {
        section: [table for table in shown if _PLACES.get(table.name, "tables") == section]
        for section in (*_PLACES.values(), "tables")
    }


def _command(sweep: Sweep, folder: Path) -> str:
    """What makes this report again; several sweeps have no folder for it by default."""
    out = ["--out", str(folder)] if len(sweep.paths) > 1 else []
    return shlex.join(["python", "-m", "harness.report", *arguments(sweep), *out])


def _figures(sweep: Sweep, folder: Path) -> list[_Figure]:
    found = []
    with figure_style():
        for drawing in all_figures(sweep):
            source = f"data:image/svg+xml;base64,{base64.b64encode(save(drawing, folder)).decode()}"
            found.append(_Figure(drawing.name, drawing.title, drawing.caption, source))
    return found


def _counts(sweep: Sweep) -> dict[str, int]:
    return {str(status): int(count) for status, count in sweep.cells["status"].value_counts(sort=False).items()}


def counted(counts: dict[str, int]) -> str:
    """Counts by status, in words."""
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _provenance(sweep: Sweep) -> list[tuple[str, str]]:
    """What the runs were made with; where they differ, every value."""
    lines = []
    for name in ("git_commit", "git_dirty", "code", "python", "platform", "device"):
        found = distinct([value for value in sweep.cells[name] if not pd.isna(value)])
        words = ["yes" if value is True else "no" if value is False else str(value) for value in found]
        lines.append((name.replace("_", " "), ", ".join(words) or "not recorded"))
    packages: dict[str, list[str]] = {}
    for recorded in sweep.cells["packages"]:
        for package, version in (recorded if isinstance(recorded, dict) else {}).items():
            packages.setdefault(package, []).append(version)
    return [*lines, *((package, ", ".join(distinct(versions))) for package, versions in sorted(packages.items()))]


def _html(context: dict[str, Any]) -> str:
    """The page, on which this style and this script alone are in force: the browser goes by their hashes."""
    inline: dict[str, str] = {}
    for name, file in (("style", "report.css"), ("script", "report.js")):
        text = Path(__file__).with_name(file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        inline |= {name: text, f"{name}_hash": f"sha256-{digest}"}
    return _template("report.html.j2", autoescape=True).render(context, **inline)


def _markdown(context: dict[str, Any]) -> str:
    """Whatever the template does not mark as safe is escaped."""
    return _template("report.md.j2", finalize=_escaped).render(context)


def _escaped(value: Any) -> str:
    return str(value) if hasattr(value, "__html__") else markdown_text(str(value))


def _template(name: str, **options: Any) -> Template:
    options |= {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=FileSystemLoader(Path(__file__).parent), **options).get_template(name)
