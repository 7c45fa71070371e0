"""`python -m harness.report results/SWEEP`: figures, tables and one report page, from what the runs left on disk."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from harness.analysis.page import Report, write_report
from harness.analysis.sweep import read_sweep
from harness.analysis.tables import Table
from harness.errors import ConfigError
from harness.runs import compact
from harness.status import make_console

_SHOWN = ("algorithm", "model", "evaluation", "n", "mean", "low", "high", "cold start")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and say where it is.

    Returns:
        0, also where cells failed, which it says; 2 where there is nothing to report or no place for it.
    """
    options = _parser().parse_args(arguments)
    try:
        path = compact(options.sweep, options.compact) if options.compact else options.sweep
        report = write_report(read_sweep(path), options.out or path / "report")
    except (ConfigError, OSError) as error:
        print(f"levelfield: {error}", file=sys.stderr)
        return 2
    _announce(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Report on a sweep.")
    parser.add_argument("sweep", type=Path, help="a sweep folder, e.g. results/embedded, finished or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: SWEEP/report)")
    parser.add_argument(
        "--compact", type=Path, metavar="DIR",
        help="first write the sweep there without weights and logs, e.g. results/reference, then report on that copy",
    )  # fmt: skip
    return parser


def _announce(report: Report) -> None:
    console = make_console()
    if report.scores.rows:
        console.print(_rich(report.scores))
    if report.unfinished:
        counts = ", ".join(f"{count} {status}" for status, count in report.unfinished.items())
        console.print(Text(f"{counts}: this is not the whole comparison, see the report", style="bold red"))
    console.print(Text(", ".join(f"{count} {status}" for status, count in report.counts.items())))
    for name in ("report.html", "report.md", "figures", "tables"):
        console.print(Text(str(report.folder / name)), soft_wrap=True)


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left")
    columns = [table.header.index(name) for name in _SHOWN]
    for column in columns:
        justify: JustifyMethod = "right" if table.numeric[column] else "left"
        shown.add_column(table.header[column], justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(row[column]) for column in columns))
    return shown


if __name__ == "__main__":
    sys.exit(main())
