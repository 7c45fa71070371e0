"""A sweep in the form that is kept in a repository: tables and run records, no weights, no checkpoints, no logs."""

import json
import shutil
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.runs.directory import METRICS, SAMPLES, replace_file
from harness.runs.reading import (
    EVALUATIONS_TABLE,
    IDENTITY,
    METRICS_TABLE,
    SWEEP,
    PathLike,
    is_compact,
    load_evaluations,
    load_runs,
    load_samples,
    read_sweep,
    run_directories,
)
from harness.runs.trials import TRIALS


def compact(path: PathLike, target: PathLike) -> Path:
    """Write the compact form of the sweep at `path`; the loaders of :mod:`harness.runs` read it as they read the sweep.

    Args:
        path: a sweep folder; the trials below it, if it was tuned, go along.
        target: a new folder, or an earlier compact form of the same sweep, which is brought up to date.

    Returns:
        The target.

    Raises:
        NoRuns: where `path` holds no runs.
        ConfigError: where the target holds anything else than an earlier form of this sweep, or where `path` is a
            compact form to which runs were added.
    """
    source, target = Path(path), Path(target)
    _check_source(source)
    runs, evaluations, samples = load_runs(source), load_evaluations(source), load_samples(source)
    _check_target(source, target)
    target.mkdir(parents=True, exist_ok=True)
    # sweep.json first: whatever interrupts the rest, the target says which sweep it belongs to.
    sweep = _impersonal({**read_sweep(source), "cells": list(dict.fromkeys(runs["run"]))})
    _replace_text(target / SWEEP, json.dumps(sweep, indent=2) + "\n")
    for directory in run_directories(source):
        (target / directory.name).mkdir(exist_ok=True)
        if (directory / "config.yaml").exists():
            shutil.copyfile(directory / "config.yaml", target / directory.name / "config.yaml")
        run = _impersonal(json.loads((directory / "run.json").read_text(encoding="utf-8")))
        _replace_text(target / directory.name / "run.json", json.dumps(run, indent=2) + "\n")
    metrics = runs[runs["step"].notna()].drop(columns=[*_identity_but_run()])
    replace_file(target / METRICS_TABLE, lambda file: metrics.to_parquet(file, index=False))
    rows = evaluations.drop(columns=[*_identity_but_run()])
    replace_file(target / EVALUATIONS_TABLE, lambda file: rows.to_parquet(file, index=False))
    kept = samples.astype(object).where(samples.notna(), None).to_dict("records")
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    _replace_text(target / SAMPLES, text)
    if (source / TRIALS).is_dir():
        compact(source / TRIALS, target / TRIALS)
    return target


def _impersonal(record: dict[str, Any]) -> dict[str, Any]:
    """Without the process and the machine's name: they tell whether a run is alive, which a copy is not."""
    return {key: value for key, value in record.items() if key not in ("pid", "host")}


def _identity_but_run() -> list[str]:
    return [column for column in IDENTITY if column != "run"]


def _replace_text(file: Path, text: str) -> None:
    replace_file(file, lambda open_file: open_file.write(text.encode()))


def _check_source(source: Path) -> None:
    """Refuse a compact form with runs beside its tables, which alone would be copied."""
    added = sorted(source.glob(f"*/{METRICS}")) if is_compact(source) else []
    if added:
        raise ConfigError(
            f"{source} is a compact sweep, of whose tables {added[0].parent.name} is no part: move that run directory "
            "to another sweep's folder"
        )


def _check_target(source: Path, target: Path) -> None:
    """Refuse a target whose content would be lost or mixed."""
    if not target.exists() or not any(target.iterdir()):
        return
    mend = "give another folder, or remove it first"
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the sweep itself: give another folder to write its compact form to")
    if not (target / SWEEP).exists() or any(target.glob(f"*/{METRICS}")):
        raise ConfigError(f"{target} exists and is no compact sweep: {mend}")
    old, new = read_sweep(target), read_sweep(source)
    for key in ("equal", "code"):
        if old.get(key) != new.get(key):
            raise ConfigError(f"{target} holds another sweep (its {key} differs in {SWEEP}): {mend}")
    here = {directory.name for directory in run_directories(source)}
    strange = sorted(directory.name for directory in run_directories(target) if directory.name not in here)
    if strange:
        raise ConfigError(f"{target} holds another sweep ({strange[0]} is not in {source}): {mend}")
