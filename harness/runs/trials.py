"""The trials that a sweep was tuned by: runs in a folder of their own below it, what they came to, and the best."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.runs.reading import load_cells, load_runs

TRIALS = "trials"  # the folder of a sweep that holds them


def trial_scores(folder: Path) -> pd.DataFrame:
    """What each trial came to.

    Args:
        folder: that of the trials, compact or not.

    Returns:
        One row per run: algorithm, model, task, seed, status, run, trial, score (mean of reward/mean over the
        steps within the budget; of a run that diverged or failed -inf, of one that is not over, or has no such step,
        NaN), settings (dict by dotted key) and spent/AXIS.

    Raises:
        NoRuns: where there are none.
    """
    cells, runs = load_cells(folder), load_runs(folder).dropna(subset="step")
    axis = cells["budget_axis"].dropna().unique()
    if len(axis) and len(runs):
        runs = runs[runs[f"budget/{axis[0]}"] <= runs["budget_limit"]]
    reward = runs.groupby("run")["reward/mean"].mean() if "reward/mean" in runs else pd.Series(dtype=float)
    score = cells["run"].map(reward).where(cells["status"] == "done").astype(float)
    spent = [column for column in map(str, cells) if column.startswith("spent/")]
    return cells[["algorithm", "model", "task", "seed", "status", "run", *spent]].assign(
        trial=cells["config"].map(lambda config: (config.get("tuning") or {}).get("trial")),
        score=score.mask(cells["status"].isin(["diverged", "failed"]), -np.inf),
        settings=cells["config"].map(searched),
    )


def best_trials(scores: pd.DataFrame) -> pd.DataFrame:
    """The trial with the highest mean score over its seeds, the first of equals.

    Args:
        scores: of :func:`trial_scores`.

    Returns:
        algorithm, model, task, trial, score; only where every run of every trial has a score, -inf included.
    """
    ran = scores[scores["status"] != "skipped"]
    keys = ["algorithm", "model", "task"]
    means = ran.groupby([*keys, "trial"])["score"].apply(lambda values: values.mean(skipna=False)).reset_index()
    complete = means.groupby(keys)["score"].transform(lambda values: values.notna().all())
    means = means[complete.astype(bool)].sort_values("trial")
    return means.loc[means.groupby(keys, sort=False)["score"].idxmax()].reset_index(drop=True)


def searched(config: dict[str, Any]) -> dict[str, Any]:
    """The values that a run has for the keys of its search space."""
    algorithm = config.get("algorithm") or {}
    return {f"algorithm.{key}": _at(algorithm, key) for key in algorithm.get("search_space") or {}}


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
