"""Equal tuning: as many trials for every algorithm, drawn from the search space it declares, then the best of them.

A trial is an ordinary run in `SWEEP/trials` with `tuning.trial` set; the runs of `SWEEP` itself take, for their
algorithm, model and task, the settings of the trial with the highest training reward, as mean over its rollout batches.
"""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import AlgorithmConfig, RunConfig, TuningConfig
from harness.errors import ConfigError, Declined, NothingToChoose
from harness.runs.reading import NoRuns, read_sweep
from harness.runs.trials import TRIALS, best_trials, trial_scores

_ORDER = 0  # seed of the draw from a search space
_PATIENCE = 60.0  # seconds that interrupted trials get to say so


def tuned(run: RunConfig) -> RunConfig:
    """The run with the settings of its trial, or of the best trial; unchanged where the configuration tunes nothing.

    Raises:
        ConfigError: for a search space that cannot give the trials, or trials that are not all there.
        Declined: where no trial came to its end; NothingToChoose where one of them failed.
    """
    if run.tuning is None:
        return run
    if run.tuning.trial is not None:
        if not 0 <= run.tuning.trial < run.tuning.trials:
            raise ConfigError(
                f"tuning.trial={run.tuning.trial}: must be from 0 to tuning.trials={run.tuning.trials} less 1"
            )
        return _with_settings(run, draw(run.algorithm, run.tuning.trials)[run.tuning.trial])
    return _with_settings(run, _best(run))


def wants_trials(config: DictConfig) -> bool:
    """Whether a multirun is a comparison that is to be tuned, and not the trials of one."""
    return config.tuning is not None and Path(config.sweep).name != TRIALS


def rehearsed(run: RunConfig) -> RunConfig:
    """A run of a comparison as its own first trial: what can be checked of it before there are any.

    Raises:
        ConfigError: for a number of trials, a trial, or a seed that cannot be.
    """
    if run.tuning is None:
        return run
    if run.tuning.trials < 1:
        raise ConfigError(f"tuning.trials={run.tuning.trials}: must be at least 1; leave out tuning for none")
    if run.tuning.trial is not None:
        raise ConfigError("tuning.trial is for the trials, which this command starts by itself: leave it null")
    if run.seed in trial_seeds(run.tuning):
        raise ConfigError(
            f"seed={run.seed}: tuning.overrides give it to the trials; compare on seeds that they have not seen"
        )
    return replace(run, tuning=replace(run.tuning, trial=0))


def draw(algorithm: AlgorithmConfig, trials: int) -> list[dict[str, Any]]:
    """The settings of each trial, by dotted key, none twice; those of more trials begin with those of fewer.

    Raises:
        ConfigError: where the search space holds too few.
    """
    from sklearn.model_selection import ParameterGrid, ParameterSampler  # it takes a second to import

    space = {f"algorithm.{key}": values for key, values in algorithm.search_space.items()}
    for key, values in algorithm.search_space.items():
        if not values:
            raise ConfigError(
                f"algorithm.search_space.{key} of {algorithm.name} lists no value: give some, or leave it out"
            )
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(
                    f"algorithm.search_space.{key} of {algorithm.name} lists {value} more than once: list each once"
                )
    size = len(ParameterGrid(space))
    if size < trials:
        raise ConfigError(
            f"algorithm.search_space of {algorithm.name} has {size} combinations where tuning.trials={trials}: declare "
            "more values, or ask for fewer trials of every algorithm"
        )
    return list(islice(ParameterSampler(space, size, random_state=_ORDER), trials))


def run_trials(config: DictConfig) -> None:
    """Before a sweep that is to be tuned: run its trials, with the command line that asked for it.

    Trials that failed stop nothing: they count as the worst.

    Raises:
        SystemExit: with the status of the trials' command where their plan could not run or they were interrupted.
    """
    trials = ",".join(map(str, range(config.tuning.trials)))
    overrides = [f"sweep={config.sweep}/{TRIALS}", f"tuning.trial={trials}", *config.tuning.overrides]
    process = subprocess.Popen([sys.executable, "-m", "harness.run", *sys.argv[1:], *overrides])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE / 10)  # Ctrl-C has reached it too
        process.terminate()
        process.wait(_PATIENCE)
        raise
    # Status 1 is of a trial that failed, but without a plan of that command's own, of an error before there was one.
    failed = code == 1 and read_sweep(Path(config.results) / config.sweep / TRIALS).get("pid") == process.pid
    if code and not failed:
        raise SystemExit(code if code > 0 else 128 - code)


def trial_seeds(tuning: TuningConfig) -> set[int]:
    """The seeds that `tuning.overrides` give the trials.

    Raises:
        ConfigError: where they give none, or cannot be read.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(tuning.overrides))
        seeds = [override for override in overrides if override.key_or_group == "seed"]
        values = [
            int(str(getattr(value, "text", value)))  # of quoted ones their text
            for seed in seeds
            for value in (seed.sweep_iterator() if seed.is_sweep_override() else [seed.value()])
        ]
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"tuning.overrides={list(tuning.overrides)}: {error}; give the trials whole numbers, e.g. seed=1000,1001"
        ) from error
    if not values:
        raise ConfigError(
            "tuning.overrides give the trials no seed, so that they would use up those of the comparison: add some, "
            "e.g. seed=1000"
        )
    return set(values)


def _best(run: RunConfig) -> dict[str, Any]:
    assert run.tuning is not None
    folder = Path(run.results) / run.sweep / TRIALS
    mend = "run them first, with -m on the command line"
    who = f"{run.algorithm.name} on {run.model.name} and {run.task.name}"
    changed = max((file.stat().st_mtime_ns for file in folder.glob("*/run.json")), default=0)
    try:
        scores = _scores(folder, changed)
    except NoRuns as error:
        raise ConfigError(f"tuning: there are no trials in {folder}: {mend}") from error
    mine = scores.query("algorithm == @run.algorithm.name and model == @run.model.name and task == @run.task.name")
    if len(mine) and (mine["status"] == "skipped").all():
        return {}  # declined there for what it will be declined for here
    if run.seed in set(mine["seed"]):
        raise ConfigError(f"seed={run.seed}: trials in {folder} have used it; compare on seeds that they have not seen")
    nothing = mine.loc[(mine["status"] == "done") & mine["score"].isna(), "run"]
    if len(nothing):
        raise ConfigError(
            f"tuning: the first rollout batch of {nothing.iloc[0]} in {folder} passed the budget, so that it has "
            "no score: raise budget.limits of all runs, and take another sweep=NAME"
        )
    best = best_trials(mine)
    if best.empty or mine["trial"].nunique() < run.tuning.trials:
        over = mine["status"].isin(["done", "diverged", "failed", "skipped"])
        waiting = f" ({', '.join(mine.loc[~over, 'run'])} not over)" if not over.all() else ""
        raise ConfigError(f"tuning: the trials of {who} in {folder} are not all there{waiting}: {mend}")
    if np.isneginf(best["score"].item()):
        kind = NothingToChoose if (mine["status"] == "failed").any() else Declined
        raise kind(f"tuning: every trial of {who} in {folder} diverged or failed: there is nothing to choose from")
    settings: Sequence[dict[str, Any]] = mine.loc[mine["trial"] == best["trial"].item(), "settings"].tolist()
    return settings[0]


@lru_cache(maxsize=1)
def _scores(folder: Path, changed: int) -> pd.DataFrame:
    """Read once for all cells of a plan; `changed` tells a folder from what it was."""
    return trial_scores(folder)


def _with_settings(run: RunConfig, settings: dict[str, Any]) -> RunConfig:
    config = OmegaConf.structured(run)
    try:
        for key, value in settings.items():
            OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"algorithm.search_space: {str(error).splitlines()[0]}") from error
    found = OmegaConf.to_object(config)
    assert isinstance(found, RunConfig)
    return found
