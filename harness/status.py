"""`python -m harness.status results/SWEEP`: what is done, running, failed and to do; what is spent and left."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.errors import ConfigError
from harness.runs.directory import METRICS, RunDirectory, effective_status
from harness.runs.reading import (
    NoRuns,
    is_compact,
    last_row,
    load_runs,
    lost,
    read_config,
    read_sweep,
    run_directories,
)
from harness.runs.settings import differences

# Most telling first: a terminal that is too small cuts the end.
STATUSES = ("running", "failed", "diverged", "interrupted", "planned", "done", "skipped")
_SHOWN = {"planned": "to do"}
_STYLES = {"running": "cyan", "failed": "bold red", "diverged": "magenta", "interrupted": "yellow", "done": "green"}
_WIDTH = 120


@dataclass(frozen=True)
class CellState:
    """A cell as its run directory shows it. Fractions are of 1, seconds are charged ones; None where not known.

    `label` is of :func:`labels`; `reason` says why it did not train to its end, or why that is worth nothing.
    """

    name: str
    label: str
    status: str
    reason: str | None
    traceback: str | None
    step: int | None
    reward: float | None
    clip_fraction: float | None
    spent: float | None
    seconds: float | None

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far."""
        if self.spent is None or self.seconds is None or self.spent <= 0:
            return None
        return self.seconds * max(0.0, 1 - self.spent) / self.spent


def labels(paths: Iterable[Path]) -> dict[Path, str]:
    """What to call cells: algorithm, model, task and seed, and of variants the settings in which they differ."""
    found = {path: str(RunDirectory(path).read_status().get("label", path.name)) for path in paths}
    counts = Counter(found.values())
    for label in (label for label, count in counts.items() if count > 1):
        told = differences({path: read_config(path / "config.yaml") for path in found if found[path] == label})
        found |= {path: f"{label} {settings}".strip() for path, settings in told.items()}
    return found


def read_cell(path: Path, label: str) -> CellState:
    """What run.json and the last line of metrics.jsonl say.

    Args:
        path: a run directory.
        label: of :func:`labels`.
    """
    cell = _cell_state(path, label, last_row(path / METRICS))
    return replace(cell, reason=lost(path, RunDirectory(path).read_status()) or cell.reason)


def _cell_state(path: Path, label: str, row: Mapping[str, Any]) -> CellState:
    run = RunDirectory(path).read_status()
    budget = run.get("budget", {})
    axis, limit = budget.get("axis"), budget.get("limit")
    totals = {key.removeprefix("budget/"): value for key, value in row.items()} or budget.get("spent", {})
    spent = totals[axis] / limit if axis in totals and limit else None
    reason = run.get("reason")
    if reason is None and row.get("step") == 1 and spent is not None and spent > 1:
        reason = (
            f"its first step passed budget.limits.{axis}={limit:g}: a step costs {totals[axis]:.3g}, and what is "
            "scored is the policy before it; raise the limit of all runs"
        )
    return CellState(
        name=path.name,
        label=label,
        status=effective_status(run),
        reason=reason,
        traceback=run.get("traceback"),
        step=row.get("step"),
        reward=row.get("reward/mean"),
        clip_fraction=row.get("clip_fraction/token"),
        spent=spent,
        seconds=totals.get("device_seconds"),
    )


def read_cells(path: Path) -> list[CellState]:
    """All cells of a sweep folder, or the one of a run directory, in the order of the plan.

    Raises:
        NoRuns: where there are none.
    """
    found = {directory.name: directory for directory in run_directories(path)}
    if not found:
        raise NoRuns(f"{path} holds no runs: give a sweep folder, e.g. results/NAME, or start one with harness.run -m")
    planned = [name for name in read_sweep(path).get("cells", []) if name in found]
    names = [*planned, *sorted(found.keys() - set(planned))]
    called = labels(found[name] for name in names)
    if not is_compact(path):
        return [read_cell(found[name], called[found[name]]) for name in names]
    rows = load_runs(path).dropna(subset="step").groupby("run").tail(1).to_dict("records")
    last = {row["run"]: {str(key): value for key, value in row.items()} for row in rows}
    return [_cell_state(found[name], called[found[name]], last.get(name, {})) for name in names]


def summary(cells: Sequence[CellState]) -> str:
    """One line: how many cells there are of each status, and the time left for those that are under way or to do."""
    counts = Counter(cell.status for cell in cells)
    parts = [f"{counts[status]} {_SHOWN.get(status, status)}" for status in STATUSES if counts[status]]
    left = _left(cells)
    return f"{number(cells)}: " + ", ".join(parts) + (f"; about {_duration(left)} left" if left else "")


def number(cells: Sized) -> str:
    """How many they are, in words."""
    return "1 cell" if len(cells) == 1 else f"{len(cells)} cells"


def table(cells: Sequence[CellState]) -> Group:
    """The summary, a row for every cell, and why some did not train to their end."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("cell", overflow="fold")
    rows.add_column("status", no_wrap=True)
    for heading in ("step", "reward", "clip fraction", "spent", "left"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for cell in sorted(cells, key=lambda cell: STATUSES.index(cell.status)):
        rows.add_row(
            Text(cell.label),
            Text(_SHOWN.get(cell.status, cell.status), style=_STYLES.get(cell.status, "")),
            _number(cell.step, ".0f"),
            _number(cell.reward, ".3f"),
            _number(cell.clip_fraction, ".2e"),
            _number(cell.spent, ".0%"),
            _duration(cell.seconds_left) if cell.status == "running" else "",
        )
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reason:
            reasons.setdefault(f"{cell.status}: {cell.reason}", []).append(cell.label)
    told = (f"{', '.join(dict.fromkeys(labels))} {reason}" for reason, labels in reasons.items())
    return Group(Text(summary(cells)), rows, *map(Text, told))


def make_console() -> Console:
    """Standard output; as wide as the table where no terminal limits it."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def _left(cells: Sequence[CellState]) -> float | None:
    """Seconds until all cells end, if as many go on running at once and those to do take as long as the others."""
    running = [cell for cell in cells if cell.status == "running"]
    known = [(cell.seconds, cell.seconds_left) for cell in cells if cell.status in ("running", "done")]
    totals = [seconds + left for seconds, left in known if seconds is not None and left is not None]
    if not running or not totals:
        return None
    mean = sum(totals) / len(totals)
    to_do = sum(cell.status in ("planned", "interrupted") for cell in cells)
    begun = sum(mean if cell.seconds_left is None else cell.seconds_left for cell in running)
    return (begun + to_do * mean) / len(running)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.status", description=__doc__)
    parser.add_argument("path", type=Path, help="a sweep folder, e.g. results/NAME, or one run directory")
    parser.add_argument("--watch", action="store_true", help="go on showing it until Ctrl-C")
    arguments = parser.parse_args()
    console = make_console()
    try:
        if not arguments.watch:
            console.print(table(read_cells(arguments.path)))
            return 0
        with Live(table(read_cells(arguments.path)), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(table(read_cells(arguments.path)), refresh=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
