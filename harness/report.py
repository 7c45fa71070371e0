"""`python -m harness.report results/SWEEP`: figures, tables and one report page, from what the runs left on disk."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from harness.analysis.joining import join
from harness.analysis.page import Report, counted, write_report
from harness.analysis.sweep import Sweep, read_sweep
from harness.analysis.table import Table
from harness.analysis.view import viewed
from harness.errors import ConfigError
from harness.runs import compact
from harness.status import make_console

_SHOWN = ("algorithm", "model", "evaluation", "n", "mean", "low", "high", "cold start")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and say where it is.

    Returns:
        0, also where cells failed, which it says; 2 where there is nothing to report or no place for it; 130 after
        Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        paths = _paths(options)
        sweep = join([read_sweep(path) for path in paths])
        shown = viewed(sweep, options.metric, options.axis, options.baseline, options.filter, options.claims)
        report = _write(shown, options.out or paths[0] / "report")
    except (ConfigError, OSError) as error:
        print(f"levelfield: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _announce(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Report on a sweep.")
    parser.add_argument(
        "sweeps", type=Path, nargs="+", metavar="sweep",
        help="a sweep folder, e.g. results/embedded, finished or not; several are joined, if they are comparable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: SWEEP/report)")
    parser.add_argument(
        "--metric", metavar="NAME",
        help="what verdicts are about: an lm-eval task, or a column of the metrics such as reward/mean; area:NAME is "
        "the area under its curve (default: the first lm-eval task)",
    )  # fmt: skip
    parser.add_argument(
        "--axis", metavar="AXIS",
        help="the budget axis to compare on: flops, device_seconds, tokens, queries or updates; at the most that all "
        "finished runs spent on it (default: the axis that ended the runs, at its limit)",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="ALGORITHM", help="compare all with this one alone (default: all with all)"
    )
    parser.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE[,VALUE...]",
        help="only these cells, by algorithm, variant, model, task, seed, status or a key of their config.yaml; may "
        "be given several times, and all must hold",
    )  # fmt: skip
    parser.add_argument("--claims", type=Path, metavar="DIR", help="a folder of claims of your own, tested with ours")
    parser.add_argument(
        "--compact", type=Path, metavar="DIR",
        help="first write the sweep there without weights and logs, e.g. results/reference, then report on that copy",
    )  # fmt: skip
    return parser


def _paths(options: argparse.Namespace) -> list[Path]:
    """The sweeps to report on, after writing the compact form where one is asked for."""
    paths: list[Path] = options.sweeps
    if len(paths) > 1 and options.compact:
        raise ConfigError("--compact: the compact form is of one sweep; write each by itself, then join those")
    if len(paths) > 1 and not options.out:
        raise ConfigError("--out: several sweeps have no common folder; say where the report goes")
    return [compact(paths[0], options.compact)] if options.compact else paths


def _write(sweep: Sweep, folder: Path) -> Report:
    try:
        return write_report(sweep, folder)
    except OSError as error:
        raise ConfigError(f"--out {folder}: the report cannot be written there ({error})") from error


def _announce(report: Report) -> None:
    console = make_console()
    for sentences, style in ((report.headlines, "bold"), (report.findings, "")):
        for sentence in sentences:
            console.print(Text(sentence, style=style))
    if report.scores.rows:
        console.print(_rich(report.scores))
    for counts, meaning in (
        (report.unfinished, "this is not the whole comparison, see the report"),
        (report.wrong, "in comparisons of scores these count as the worst"),
    ):
        if counts:
            console.print(Text(f"{counted(counts)}: {meaning}", style="bold red"))
    console.print(Text(counted(report.counts)))
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
