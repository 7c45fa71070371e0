"""The report: one HTML page that stands alone, and the same in Markdown. All text of the runs' making is escaped."""

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.analysis.fairness import Check, algorithm_differences, checks
from harness.analysis.figures import all_figures
from harness.analysis.style import figure_style, save, unit
from harness.analysis.sweep import Sweep, distinct
from harness.analysis.tables import Table, all_tables, final_scores, headline_verdicts, markdown_text, score_overview
from harness.analysis.verdicts import headlines

_EXPECTED = ("done", "skipped")  # statuses that need no attention
_SAMPLES = 2  # at each of the first and last evaluation points


@dataclass(frozen=True)
class Report:
    """Where a report was written, and what its reader should hear first: scores, and counts of cells by status."""

    folder: Path
    scores: Table
    counts: dict[str, int]

    @property
    def unfinished(self) -> dict[str, int]:
        """Counts of cells that are neither done nor skipped, by status."""
        return {status: count for status, count in self.counts.items() if status not in _EXPECTED}


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    caption: str
    source: str  # data URI


def write_report(sweep: Sweep, folder: Path) -> Report:
    """Write figures/, tables/, report.html and report.md; the same sweep gives the same bytes.

    Raises:
        OSError: where the folder cannot be written.
    """
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    figures = _figures(sweep, folder / "figures")
    overview, differences, tables = score_overview(sweep), algorithm_differences(sweep), all_tables(sweep)
    for table in (differences, *tables):
        table.save(folder / "tables")
    report = Report(folder, final_scores(sweep), _counts(sweep))
    context = {
        "title": f"Levelfield: {sweep.name}",
        "report": report,
        "overview": overview,
        "headlines": headlines(headline_verdicts(sweep)),
        "budget": f"{unit(sweep.axis, sweep.limit).text(sweep.limit)} ({sweep.axis})",
        "cells": len(sweep.cells),
        "notable": _notable(sweep),
        "figures": figures,
        "tables": tables,
        "differences": differences,
        "checks": checks(sweep),
        "grid": _grid(sweep),
        "samples": _samples(sweep),
        "provenance": _provenance(sweep),
        "command": f"python -m harness.report {shlex.quote(str(sweep.path))}",
    }
    (folder / "report.html").write_text(_render(context), encoding="utf-8")
    (folder / "report.md").write_text(_markdown(context), encoding="utf-8")
    return report


def _figures(sweep: Sweep, folder: Path) -> list[_Figure]:
    found = []
    with figure_style():
        for drawing in all_figures(sweep):
            source = f"data:image/svg+xml;base64,{base64.b64encode(save(drawing, folder)).decode()}"
            found.append(_Figure(drawing.name, drawing.title, drawing.caption, source))
    return found


def _counts(sweep: Sweep) -> dict[str, int]:
    return {str(status): int(count) for status, count in sweep.cells["status"].value_counts(sort=False).items()}


def _notable(sweep: Sweep) -> list[dict[str, str]]:
    """Cells that are not done, with their reason; cells that share status and reason are one entry."""
    cells = sweep.cells[sweep.cells["status"] != "done"]
    entries: dict[tuple[str, str], list[str]] = {}
    for cell in cells.itertuples():
        reason = cell.reason if isinstance(cell.reason, str) and cell.reason else "no reason recorded"
        entries.setdefault((str(cell.status), reason), []).append(str(cell.label))
    return [
        {"status": status, "reason": reason, "cells": ", ".join(labels)} for (status, reason), labels in entries.items()
    ]


def _grid(sweep: Sweep) -> dict[str, Any]:
    """Statuses by variant (rows) and setting and seed (columns)."""
    columns = sweep.cells[["setting", "seed"]].drop_duplicates().dropna()
    columns = columns.sort_values("seed", kind="stable")
    keys = [(name, int(seed)) for name in sweep.settings for seed in columns[columns["setting"] == name]["seed"]]
    status = {(cell.variant, cell.setting, cell.seed): cell.status for cell in sweep.cells.itertuples()}
    rows = [(variant, [status.get((variant, *key), "–") for key in keys]) for variant in sweep.variants]
    return {"columns": keys, "rows": rows}


def _samples(sweep: Sweep) -> list[dict[str, Any]]:
    """A few completions of each variant's first seed in each setting, from the first and the last evaluation point."""
    groups = []
    for variant, setting, rows in sweep.groups(sweep.samples):
        one = rows[rows["run"] == rows["run"].iloc[0]]
        ends = one[one["fraction"].isin([one["fraction"].min(), one["fraction"].max()])]
        shown = ends.groupby("fraction").head(_SAMPLES).to_dict("records")
        groups.append({"variant": variant, "setting": setting, "rows": shown})
    return groups


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


def _render(context: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)


def _markdown(context: dict[str, Any]) -> str:
    report: Report = context["report"]
    parts = [f"# {context['title']}"]
    parts.append(f"{context['cells']} cells: {_counted(report.counts)}. Budget: {context['budget']} a run.")
    if report.unfinished:
        parts.append(f"**Not finished: {_counted(report.unfinished)}.** What follows is not the whole comparison.")
    parts += [
        f"- {entry['status']}: {markdown_text(entry['cells'])} ({markdown_text(entry['reason'])})"
        for entry in context["notable"]
    ]
    parts += [f"- {markdown_text(sentence)}" for sentence in context["headlines"]]
    parts += _section(context["overview"])
    for figure in context["figures"]:
        parts += [f"## {figure.title}", f"![{figure.title}](figures/{figure.name}.png)", markdown_text(figure.caption)]
    for table in context["tables"]:
        parts += _section(table)
    parts += ["## What was equal", *_check_lines(context["checks"]), *_section(context["differences"])]
    parts += ["## Provenance", *(f"- {name}: {markdown_text(value)}" for name, value in context["provenance"])]
    parts.append(f"Made by `{context['command']}`.")
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _section(table: Table) -> list[str]:
    return [f"## {table.title}", table.markdown(), table.note]


def _check_lines(found: Sequence[Check]) -> list[str]:
    return [f"- {'equal' if c.equal else '**not equal**'}: {c.what}: {markdown_text(c.detail)}" for c in found]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())
