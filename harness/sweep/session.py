"""The command that started a sweep: it shows the plan, watches, and says at the end what came of it."""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.entries import check_sources
from harness.errors import ConfigError
from harness.runs.directory import FINAL, RunDirectory, RunInUse
from harness.status import labels, make_console, number, read_cell, summary, table
from harness.sweep.plan import Cell, check_cache, check_folder, compose_jobs, expand, freeze
from harness.sweep.progress import Progress
from harness.sweep.tuning import run_trials, wants_trials

_PATIENCE = 15.0  # seconds that interrupted cells get to say so

# Hydra owns the callback that starts a sweep and calls nothing when the sweep breaks off, so the sweep under way stands
# here for finish() to find.
_open: ExitStack = ExitStack()
_cells: list[Cell] = []


def start(config: DictConfig) -> None:
    """Plan, freeze and show a multirun, and watch it until :func:`finish`; where it is to be tuned, the trials first.

    Raises:
        SystemExit: with status 2 where the plan cannot run; nothing has been written then, but for trials that turn out
            not to be all over. With the status of the trials' command where that was stopped.
    """
    try:
        check_sources(config.hydra)
        jobs = compose_jobs(config, GlobalHydra.instance().config_loader())
        check_cache([job.config for job in jobs])
        if wants_trials(config):
            # All that needs no trials is checked before they cost anything.
            rehearsal = [cell.config for cell in expand(jobs, rehearsal=True)]
            check_folder(rehearsal[0].run_dir.parent, rehearsal, rehearsal=True)
            run_trials(config)
        cells = expand(jobs)
        configs = [cell.config for cell in cells]
        folder = configs[0].run_dir.parent
        check_folder(folder, configs)
        for run in configs:  # a damaged one stops the plan before it is frozen
            read_cell(run.run_dir, run.label)
        _open.enter_context(RunDirectory(folder).lock())  # two commands at once would freeze two plans
        freeze(folder, cells)
        console = make_console()
        _print_plan(console, folder, cells)
        _open.enter_context(Progress([config.run_dir for config in configs], console))
        _cells.extend(cells)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        print(f"results={config.results}: {error}: nothing can be kept there", file=sys.stderr)
        raise SystemExit(2) from error
    except Exception as error:  # of which Hydra would only warn, and launch what an earlier plan there says
        traceback.print_exc()
        raise SystemExit(1) from error


def finish(code: int) -> int:
    """End the watch and sum up, whether the sweep came to its end or was broken off.

    Args:
        code: the exit status so far.

    Returns:
        The exit status of the command: 1 instead of 0 where a cell failed or did not run, or all its trials did.
    """
    if not _cells:
        return code
    directories = [RunDirectory(cell.config.run_dir) for cell in _cells]
    _record_interrupted(directories, patience=_PATIENCE if code else 0.0)
    _open.close()
    folder = directories[0].path.parent
    (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's; the plan is in sweep.json and the config.yaml files
    called = labels(directory.path for directory in directories)
    cells = [read_cell(path, label) for path, label in called.items()]
    console = make_console()
    console.print(table(cells))
    console.print(Text(f"Runs: {folder}\nFigures: python -m harness.report {folder}"), soft_wrap=True)
    if all(cell.status in FINAL for cell in cells) and not any(cell.trials_failed for cell in _cells):
        return code
    console.print(Text(f"Not complete ({summary(cells)}): the same command runs what is missing"), soft_wrap=True)
    return code or 1


def _print_plan(console: Console, folder: Path, cells: Sequence[Cell]) -> None:
    rows = Table("cell", "plan", box=None, pad_edge=False, header_style="bold")
    counts: Counter[str] = Counter()
    called = labels(cell.config.run_dir for cell in cells)
    for cell in cells:
        directory = RunDirectory(cell.config.run_dir)
        status = directory.read_status()["status"]
        if status in FINAL:
            what = status
        else:
            what = "to resume" if directory.state_path.exists() else "to do"
        counts[what] += 1
        rows.add_row(Text(called[directory.path]), Text(f"{what}: {cell.declined}" if cell.declined else what))
    console.print(rows)
    listing = ", ".join(f"{count} {what}" for what, count in counts.items())
    console.print(Text(f"{number(cells)} in {folder}: {listing}"), soft_wrap=True)


def _record_interrupted(directories: Sequence[RunDirectory], patience: float) -> None:
    """Write `interrupted` for cells whose process was killed before it could."""
    deadline = time.monotonic() + patience
    for directory in directories:
        while directory.read_status()["status"] == "running":
            try:
                with directory.lock():
                    directory.update_status(status="interrupted", reason="stopped from outside")
            except OSError:  # a full disk: status says "interrupted" of a run whose process is gone
                break
            except RunInUse:  # still ending, or another command's
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
