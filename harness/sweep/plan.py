"""The plan of a sweep: every cell composed and checked before the first one runs, then frozen on disk."""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from harness.cell import prepare
from harness.config import CELL_KEYS, CITATION, RunConfig, equal_part, read, typed
from harness.entries import check_choices
from harness.errors import ConfigError, Declined, NothingToChoose
from harness.machine import cache_dir
from harness.refusals import REFUSED, refusal
from harness.runs.directory import RERUN, RunDirectory, RunInUse, replace_file
from harness.runs.inputs import changed_input, inputs_fingerprint
from harness.runs.provenance import code_fingerprint
from harness.runs.reading import is_compact
from harness.sweep.tuning import rehearsed, trial_seeds, tuned
from harness.validation import check

_SINGLE_RUNS = "runs"  # what conf/config.yaml calls the folder of runs that belong to no sweep


@dataclass(frozen=True)
class Job:
    """What Hydra makes of one combination of the overrides, before tuning and checks."""

    overrides: Sequence[str]
    config: RunConfig


@dataclass(frozen=True)
class Cell:
    """A cell of the plan.

    Attributes:
        declined: why its algorithm cannot apply to it, or has no settings.
        trials_failed: whether the latter is for trials that failed, so that the same command may mend it.
    """

    config: RunConfig
    declined: str | None
    trials_failed: bool = False


def compose_jobs(config: DictConfig, loader: ConfigLoader) -> list[Job]:
    """Compose all jobs of a multirun, in the order in which Hydra will number them.

    Args:
        config: the multirun's configuration with its `hydra` node.
        loader: what Hydra composes jobs with; it knows `--config-dir`.

    Raises:
        ConfigError: for the first that cannot be composed, or where there is none.
    """
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError(f"hydra/sweeper: {sweeper._target_} decides its cells as it goes; use the basic sweeper")
    try:
        presets = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        # Not resolved, as in Hydra's own sweeper: interpolations are each cell's.
        given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        assert isinstance(given, list)
        arguments = presets + given
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        for override in overrides:
            if override.is_sweep_override() and not list(override.sweep_string_iterator()):
                raise ConfigError(f"{override.input_line}: this matches nothing, so that there is no cell to run")
        jobs = chain.from_iterable(BasicSweeper.split_arguments(overrides, max_batch_size=None))
        return [_compose(config, loader, list(job)) for job in jobs]
    except REFUSED as error:
        raise refusal(error) from error


def expand(jobs: Sequence[Job], *, rehearsal: bool = False) -> list[Cell]:
    """Tune and check the cells of a multirun.

    Args:
        jobs: of :func:`compose_jobs`.
        rehearsal: take every cell as its own first trial, before there are trials to choose from.

    Raises:
        ConfigError: for the first cell that cannot run, or a plan that would compare what is not comparable.
    """
    cells = [_cell(job, rehearsal) for job in jobs]
    configs = [cell.config for cell in cells]
    _check_comparable(configs)
    if rehearsal:
        _check_names(configs)
    return cells


def check_cache(configs: Sequence[RunConfig]) -> None:
    """
    Raises:
        ConfigError: where a model is to be cold-started and the result could not be kept.
    """
    if any(config.model.cold_start for config in configs):
        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=cache_dir()).close()
        except OSError as error:
            raise ConfigError(
                f"LEVELFIELD_CACHE: cold starts cannot be kept in {cache_dir()} ({error}); set it to another folder"
            ) from error


def check_folder(folder: Path, configs: Sequence[RunConfig], *, rehearsal: bool = False) -> None:
    """Refuse to put runs beside others that they could not be compared with.

    Args:
        folder: the sweep folder, or a run directory to look at that one alone.
        configs: the runs to be put there.
        rehearsal: whether they are not tuned yet, so that the same cells may be there with the settings chosen before.

    Raises:
        ConfigError: saying what differs and what to do.
    """
    if is_compact(folder):  # readers take all runs from its tables
        raise ConfigError(
            f"{folder} is the compact form of a sweep, which takes no further runs: choose another sweep=NAME, and "
            f"join both with python -m harness.report {folder} {folder.parent}/NAME --out REPORT"
        )
    names = {config.run_name for config in configs}
    labels = {config.label: config for config in configs}
    equal = equal_part(configs[0])
    inputs = {name: digest for config in configs for name, digest in inputs_fingerprint(config).items()}
    tuning = configs[0].tuning
    used_up = trial_seeds(tuning) if tuning and rehearsal else set()
    files = [folder / "run.json"] if (folder / "run.json").exists() else sorted(folder.glob("*/run.json"))
    for directory in (RunDirectory(file.parent) for file in files):
        if not _holds_results(directory):
            continue
        run, there = _identified(directory), directory.path
        code = run["provenance"].get("code")
        if code != code_fingerprint():
            raise _mixing(there, f"was made by other code ({code}, now {code_fingerprint()})")
        changed = changed_input(run["provenance"], inputs)
        if changed:
            raise _mixing(there, f"was made with another {changed}")
        found = OmegaConf.to_container(read(there / "config.yaml"))
        assert isinstance(found, dict)
        difference = _first_difference({key: found.get(key) for key in equal}, equal)
        if difference:
            raise _mixing(there, f"was made with another {difference}")
        for section in ("model", "task"):  # one name, one meaning; a plan that sweeps over its settings knows them all
            known = [asdict(config)[section] for config in configs if getattr(config, section).name == run[section]]
            if known and found[section] not in known:
                difference = _first_difference(found[section], known[0], section)
                raise _mixing(there, f"was made with another {difference}")
        if run["seed"] in used_up:
            raise _mixing(there, f"has used seed={run['seed']}, which tuning.overrides give to the trials")
        if tuning and found["tuning"]:  # other trials could choose other settings for the seeds to come
            more = ["trials"] if found["tuning"]["trial"] is None else []  # of trials there may be more, in all alike
            chosen_by = {key: asdict(tuning)[key] for key in ("overrides", *more)}
            difference = _first_difference({key: found["tuning"][key] for key in chosen_by}, chosen_by, "tuning")
            if difference:
                raise _mixing(there, f"was made with another {difference}")
        if run["label"] in labels and there.name not in names and not rehearsal:
            planned = asdict(labels[run["label"]])
            difference = _first_difference(
                {key: found.get(key) for key in CELL_KEYS}, {key: planned[key] for key in CELL_KEYS}
            )
            raise _mixing(there, f"is a cell of this plan with another {difference}")


def freeze(folder: Path, cells: Sequence[Cell]) -> None:
    """Write sweep.json and every cell's config.yaml and run.json: what will run, whatever is edited meanwhile."""
    for cell in cells:
        try:
            prepare(cell.config, cell.declined)
        except RunInUse:
            continue  # another command is already at it; it wrote the same configuration, but for a citation perhaps
    content = {
        "equal": equal_part(cells[0].config),
        "code": code_fingerprint(),
        "cells": [cell.config.run_name for cell in cells],
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    text = json.dumps(content, indent=2) + "\n"
    replace_file(folder / "sweep.json", lambda file: file.write(text.encode()))


def _compose(config: DictConfig, loader: ConfigLoader, overrides: list[str]) -> Job:
    with _naming(overrides):
        composed = loader.load_sweep_config(config, overrides)
        check_choices(composed.hydra)
        return Job(overrides, typed(composed))


def _cell(job: Job, rehearsal: bool) -> Cell:
    with _naming(job.overrides):
        run = rehearsed(job.config) if rehearsal else job.config
        declined = _declined(run)
        if run.tuning is not None:
            try:
                run = tuned(run)
            except Declined as error:
                return Cell(run, declined or str(error), isinstance(error, NothingToChoose))
            declined = _declined(run)
        return Cell(run, declined)


@contextmanager
def _naming(overrides: Sequence[str]) -> Iterator[None]:
    """Have errors say of which cell they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}\n(in the cell {' '.join(overrides)})") from error


def _declined(run: RunConfig) -> str | None:
    """Check a run, which resolves its device and budget, and say why its algorithm declines it, if it does."""
    try:
        check(run)
    except Declined as error:
        return str(error)
    return None


def _check_comparable(configs: Sequence[RunConfig]) -> None:
    first, seen = configs[0], set()
    if first.sweep == _SINGLE_RUNS:
        raise ConfigError(f"sweep={_SINGLE_RUNS} is for single runs, which may differ in anything: give sweep=NAME")
    for config in configs:
        if config.run_dir.parent != first.run_dir.parent:
            raise ConfigError(f"sweep: the cells would go to {first.run_dir.parent} and {config.run_dir.parent}")
        difference = _first_difference(equal_part(first), equal_part(config))
        if difference:
            raise ConfigError(f"the cells of one sweep must share their {difference}: sweep it under several names")
        if config.run_name in seen:
            raise ConfigError(f"the plan has the cell {config.label} twice: remove one of the two")
        seen.add(config.run_name)


def _check_names(configs: Sequence[RunConfig]) -> None:
    """Refuse variants of one name in a comparison that is to be tuned: trials are told apart by names alone."""
    first: dict[str, RunConfig] = {}
    for config in configs:
        other = first.setdefault(config.label, config)
        mine, its = (
            {section: asdict(run)[section] for section in ("algorithm", "model", "task")} for run in (config, other)
        )
        difference = _first_difference(its, mine)
        if difference:
            key = difference.partition(" ")[0]
            section = key.partition(".")[0]
            name = f"{section}.name={getattr(config, section).name}"
            raise ConfigError(
                f"tuning: the plan has variants of {config.label}, which differ in {difference} and would share their "
                f"trials: give each a name of its own, e.g. '{name}_${{{key}}}'"
            )


def _holds_results(directory: RunDirectory) -> bool:
    status = directory.read_status().get("status")
    return status in ("done", "diverged") or directory.state_path.exists()


def _identified(directory: RunDirectory) -> dict[str, Any]:
    """run.json, with all that says which run it is of."""
    run = directory.read_status()
    for key in ("provenance", "model", "task", "seed", "label"):
        if run.get(key) is None:
            raise ConfigError(f"{directory.path / 'run.json'} is damaged (it has no {key}): {RERUN}")
    return run


def _mixing(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} {what}: the results would be mixed. Choose another sweep=NAME, or move the old folder away"
    )


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """`key (old value, here new value)` of the first leaf that differs, but for a citation; None where nothing does."""
    if key == CITATION:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
            if difference:
                return difference
        return None
    return None if old == new else f"{key} ({old}, here {new})"
