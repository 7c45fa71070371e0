"""Runs as tidy frames, from a sweep that is finished, half done, being written, or kept in compact form."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from harness.errors import ConfigError
from harness.runs.directory import (
    EVALUATIONS,
    METRICS,
    RERUN,
    SAMPLES,
    RunDirectory,
    effective_status,
    parse_object,
    read_object,
)

# In C where PyYAML was built with it: configurations are most of what reading a large sweep takes.
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

SWEEP, METRICS_TABLE, EVALUATIONS_TABLE = "sweep.json", "metrics.parquet", "evaluations.parquet"
IDENTITY = (
    ["sweep", "run", "label", "algorithm", "model", "task", "seed", "status", "reason"]
    + ["budget_axis", "budget_limit"]
)  # fmt: skip
_PROVENANCE = (
    "git_commit",
    "git_dirty",
    "code",
    "python",
    "platform",
    "device",
    "initial_weights",
    "packages",
    "inputs",
)
_TAIL = 16_384  # bytes, more than one line of metrics.jsonl

PathLike = str | os.PathLike[str]


class NoRuns(ConfigError):
    """There is nothing to read at a path: the message says what to give instead."""


def load_runs(path: PathLike) -> pd.DataFrame:
    """One row per (run, step): who it is, the step, and every metric of metrics.jsonl.

    Args:
        path: a sweep folder, one run directory, or a compact sweep.

    Returns:
        Columns sweep, run, label, algorithm, model, task, seed, status, reason, budget_axis, budget_limit, step and the
        metrics (in seconds, FLOPs and nats; NaN where not finite). A cell without metrics has one
        row, its step NaN.

    Raises:
        NoRuns: where there are none.
    """
    return _identity(path).merge(_lines(Path(path), METRICS, METRICS_TABLE, ["step"]), on="run", how="left", sort=False)


def load_evaluations(path: PathLike) -> pd.DataFrame:
    """One row per (run, evaluation point, lm-eval task); the latter is the column eval_task.

    Columns besides the identity of :func:`load_runs`: fraction, step, eval_task, score, stderr, n and what was spent by
    that state (budget/AXIS). Cells that evaluated nothing have no row. Raises as :func:`load_runs`.
    """
    columns = ["fraction", "step", "eval_task", "score", "stderr", "n"]
    rows = _lines(Path(path), EVALUATIONS, EVALUATIONS_TABLE, columns)
    return _identity(path).merge(rows, on="run", how="inner", sort=False)


def load_samples(path: PathLike) -> pd.DataFrame:
    """One row per kept completion: run, fraction, step, prompt, completion, answer, reward.

    Prompts and completions are untrusted text. Raises as :func:`load_runs`.
    """
    columns = ["fraction", "step", "prompt", "completion", "answer", "reward"]
    root = Path(path)
    if is_compact(root):
        rows = read_lines(root / SAMPLES)
    else:
        rows = [{"run": run.name, **row} for run in run_directories(root) for row in read_lines(run / SAMPLES)]
    frame = pd.DataFrame(rows, columns=["run", *columns])
    return _identity(path).merge(frame, on="run", how="inner", sort=False)[["run", *columns]]


def load_cells(path: PathLike) -> pd.DataFrame:
    """One row per cell of the sweep, planned and skipped ones too, in the order of its plan.

    Columns: the identity of :func:`load_runs`, hash, started, finished, traceback, learning_rate, config (dict),
    spent/AXIS, overshoot (fraction of the limit), seconds/PHASE, flops/PHASE (whole run), score/TASK, stderr/TASK,
    n/TASK (final), parameters/KIND, and provenance: git_commit, git_dirty, code, python, platform, device,
    initial_weights, packages (dict). Raises as :func:`load_runs`.
    """
    root = Path(path)
    directories = {directory.name: directory for directory in run_directories(root)}
    planned = read_sweep(root).get("cells", [])
    names = [*planned, *sorted(directories.keys() - set(planned))]
    if not names:
        raise NoRuns(f"{root} holds no runs: give a sweep folder, e.g. results/NAME, or start one with harness.run -m")
    return pd.DataFrame([_cell(root, name, directories.get(name)) for name in names])


def run_directories(root: Path) -> list[Path]:
    """The run directories of a sweep, or the one that `root` itself is.

    Raises:
        NoRuns: where the folder does not exist.
    """
    if not root.is_dir():
        raise NoRuns(f"{root} is no folder: give a sweep folder, e.g. results/NAME")
    if (root / "run.json").exists():
        return [root]
    return sorted(file.parent for file in root.glob("*/run.json"))


def is_compact(root: Path) -> bool:
    """Whether the sweep was written by :func:`harness.runs.compact`."""
    return (root / METRICS_TABLE).exists()


def read_sweep(root: Path) -> dict[str, Any]:
    """The content of sweep.json; empty where there is none. Raises as :func:`harness.runs.directory.read_object`."""
    return read_object(root / SWEEP, "remove it, and give the sweep's command again")


def read_config(file: Path) -> dict[str, Any]:
    """The resolved configuration as plain containers, without validation: a report needs none of the run's plugins.

    Empty where there is none yet, or none that can be read.
    """
    try:
        return _parse_config(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):  # a cell that is only now being set up
        return {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that is still being written is left out.

    Raises:
        ConfigError: naming the file and the line that is no JSON object.
    """
    if not file.exists():
        return []
    *complete, _torn = file.read_bytes().split(b"\n")
    return [parse_object(line, f"{file}, line {number}", RERUN) for number, line in enumerate(complete, 1)]


def last_row(file: Path) -> dict[str, Any]:
    """The last whole line of a JSON lines file, without reading those before it; empty where there is none.

    Raises:
        ConfigError: where it is no JSON object.
    """
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _TAIL))
            complete = opened.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    return parse_object(complete[-1], f"{file}, its last line", RERUN) if complete else {}


def lost(directory: Path, run: dict[str, Any]) -> str | None:
    """What a run that is done must have had and has no longer, and what to do about it.

    Args:
        directory: its run directory.
        run: the content of its run.json. Raises as :func:`last_row`.
    """
    if run.get("status") != "done" or is_compact(directory.absolute().parent):  # of that the tables have all lines
        return None
    scores, budget = run.get("scores"), run.get("budget") or {}
    written = ["config.yaml", METRICS, *([EVALUATIONS] if scores else [])]
    gone = [name for name in written if not (directory / name).exists()]
    if gone:
        return f"{', '.join(gone)} lost: {RERUN}"
    if not read_config(directory / "config.yaml"):
        return f"config.yaml cannot be read: {RERUN}"
    axis, last = budget.get("axis"), last_row(directory / METRICS)
    if last.get(f"budget/{axis}") != budget.get("spent", {}).get(axis):
        return f"{METRICS} is not whole: {RERUN}"
    last = last_row(directory / EVALUATIONS) if scores else {}
    if scores and (last.get("fraction"), last.get("task")) != (1.0, list(scores)[-1]):
        return f"{EVALUATIONS} is not whole: {RERUN}"
    return None


def _identity(path: PathLike) -> pd.DataFrame:
    return load_cells(path)[IDENTITY]


def _lines(root: Path, name: str, table: str, first: list[str]) -> pd.DataFrame:
    """A JSON lines file of all runs as one frame: run, the columns `first`, then the others as they were met."""
    if is_compact(root):
        return pd.read_parquet(root / table)
    rows = [{"run": run.name, **row} for run in run_directories(root) for row in read_lines(run / name)]
    frame = pd.DataFrame(rows).rename(columns={"task": "eval_task"})
    columns = ["run", *first, *(column for column in frame if column not in ("run", *first))]
    frame = frame.reindex(columns=columns)
    for column in frame.columns.drop(["run", "eval_task"], errors="ignore"):
        frame[column] = pd.to_numeric(frame[column])
    return frame.astype({"run": "str"})


def _cell(root: Path, name: str, directory: Path | None) -> dict[str, Any]:
    run = RunDirectory(directory).read_status() if directory else {}
    config = read_config(directory / "config.yaml") if directory else {}
    who = {**_from_name(name), **run}
    budget, limits = run.get("budget") or {}, config.get("budget") or {}
    axis = budget.get("axis") or limits.get("axis")
    cell = {
        "sweep": config.get("sweep") or root.resolve().name,
        "run": name,
        **{key: who.get(key) for key in ("label", "algorithm", "model", "task", "seed")},
        "status": effective_status(run),
        "reason": run.get("reason") or (lost(directory, run) if directory else None),
        "budget_axis": axis,
        "budget_limit": budget.get("limit") or limits.get("limits", {}).get(axis),
        **{key: who.get(key) for key in ("hash", "started", "finished", "traceback")},
        "learning_rate": config.get("algorithm", {}).get("optimizer", {}).get("learning_rate"),
        "config": config,
        "overshoot": budget.get("overshoot"),
    }
    cell |= {f"spent/{key}": value for key, value in (budget.get("spent") or {}).items()}
    for phase, costs in (budget.get("phases") or {}).items():
        cell |= {f"{cost}/{phase}": value for cost, value in costs.items()}
    for task, score in (run.get("scores") or {}).items():
        cell |= {f"{key}/{task}": value for key, value in score.items()}
    cell |= {f"parameters/{kind}": value for kind, value in (run.get("parameters") or {}).items()}
    return cell | {key: (run.get("provenance") or {}).get(key) for key in _PROVENANCE}


def _from_name(name: str) -> dict[str, Any]:
    """What `algorithm-model-task-sSEED-HASH8` says of a cell that has no run.json yet."""
    parts = name.split("-")
    if len(parts) < 5 or not parts[-2][1:].isdigit():
        return {"label": name}
    label = name.rpartition("-")[0]
    task, seed = "-".join(parts[2:-2]), int(parts[-2][1:])
    return {"label": label, "algorithm": parts[0], "model": parts[1], "task": task, "seed": seed, "hash": parts[-1]}


@lru_cache(maxsize=1024)  # every frame of a sweep reads its cells
def _parse_config(text: str) -> dict[str, Any]:
    config = yaml.load(text, _YamlLoader)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
