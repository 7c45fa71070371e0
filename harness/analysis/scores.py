"""One number per run: what variants are compared by, at the end of the budget or at an equal one on any axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd

from harness.analysis.decisions import MARGIN
from harness.analysis.sweep import Sweep, columns_of, common_budget
from harness.errors import ConfigError
from harness.runs.reading import IDENTITY

COUNTED = ("done", "diverged", "failed")  # the outcomes of runs that have come to an end
WORST = ("diverged", "failed")  # those of them that score as the worst
_SMOOTHED = 0.1  # the share of a run's steps that the reward at one step is averaged over
_AREA = "area:"  # before the name of a metric: the area under its curve
NOT_METRICS = (*IDENTITY, "step", "variant", "setting")  # columns of the metrics that measure nothing


@dataclass(frozen=True)
class Metric:
    """What is measured, higher being better.

    Attributes:
        source: `evaluations`, where `name` is an lm-eval task, or `runs`, where it is a column of the metrics such as
            `reward/mean`.
        summary: `final`, the value at the budget, of `runs` the mean over the tenth of the run's steps that end there;
            or `area`, the mean height of the curve up to the budget.
    """

    source: Literal["evaluations", "runs"]
    name: str
    summary: Literal["final", "area"] = "final"

    @property
    def label(self) -> str:
        """As it stands in a sentence."""
        words = {"reward/mean": "training reward"}.get(self.name, self.name)
        return f"area under the curve of {words}" if self.summary == "area" else words

    @property
    def smoothing(self) -> str:
        """What is to be added to a sentence about its values, where these are means."""
        smoothed = self.source == "runs" and self.summary == "final"
        return " (mean over the tenth of a run's steps that ends there)" if smoothed else ""

    @property
    def margin(self) -> float:
        """Differences inside of it do not matter: of scores and rewards, which lie between 0 and 1; 0 of all else."""
        return MARGIN if self.source == "evaluations" or self.name.startswith("reward/") else 0.0


def headline_metric(sweep: Sweep) -> Metric | None:
    """What verdicts are about: the metric that was chosen, or the first lm-eval task; None before there is one.

    Raises:
        ConfigError: as :func:`find_metric` does.
    """
    if sweep.metric is not None:
        return find_metric(sweep, sweep.metric)
    tasks = list(columns_of(sweep.cells, "score/").values())
    return Metric("evaluations", tasks[0]) if tasks else None


def find_metric(sweep: Sweep, name: str) -> Metric:
    """The metric of a name: an lm-eval task, or a column of the metrics such as `reward/mean`.

    Args:
        name: with `area:` before it, the area under the curve of the metric instead of its last value.

    Raises:
        ConfigError: where the sweep has no such metric, listing what it has.
    """
    plain = name.removeprefix(_AREA)
    summary: Literal["final", "area"] = "final" if plain == name else "area"
    tasks = list(dict.fromkeys(sweep.evaluations["eval_task"]))
    if plain in tasks:
        return Metric("evaluations", plain, summary)
    measured = [str(column) for column in sweep.all_runs.dropna(axis="columns", how="all").select_dtypes("number")]
    columns = [column for column in measured if column not in NOT_METRICS and not column.startswith("budget/")]
    if plain in columns:
        return Metric("runs", plain, summary)
    raise ConfigError(
        f"metric {name}: the sweep has no such metric; it has {', '.join([*tasks, *columns]) or 'none yet'}; "
        f"{_AREA}NAME is the area under the curve of one"
    )


def histories(sweep: Sweep, metric: Metric, axis: str) -> pd.DataFrame:
    """The metric of every run against what it had spent on an axis, smoothed where the metric says so.

    Returns:
        One row per (run, evaluation point or step) where both are known, in the order of time: setting, variant, seed,
        run, status, x (the axis's unit), y.
    """
    rows = raw_histories(sweep, metric, axis)
    if metric.source == "runs" and metric.summary == "final":
        rows["y"] = rows.groupby("run")["y"].transform(_trailing_mean)
    return rows


def raw_histories(sweep: Sweep, metric: Metric, axis: str) -> pd.DataFrame:
    """As :func:`histories`, but never smoothed."""
    frame, spent = _measured(sweep, metric), f"budget/{axis}"
    if metric.source == "evaluations":
        frame = frame[frame["eval_task"] == metric.name].rename(columns={"score": "y"})
    else:
        frame = frame.rename(columns={metric.name: "y"})
    columns = ["setting", "variant", "seed", "run", "status", "x", "y"]
    frame = frame.rename(columns={spent: "x"}).reindex(columns=columns).dropna(subset=["x", "y"])
    return frame.sort_values(["run", "x"], kind="stable").reset_index(drop=True)


def cold_starts(rows: pd.DataFrame, metric: Metric) -> pd.Series:
    """By run: the metric before anything was learned, which no evaluation tells that was not free.

    The first rollout batch is the cold start's too, though it is paid for.

    Args:
        rows: of :func:`histories` or :func:`raw_histories`.
    """
    first = rows.groupby("run").head(1)
    return first[(first["x"] == 0) | (metric.source == "runs")].set_index("run")["y"]


def axes(sweep: Sweep, metric: Metric) -> list[str]:
    """The budget axes that are recorded with the metric, the one that the sweep is compared on first."""
    found = columns_of(_measured(sweep, metric).dropna(axis="columns", how="all"), "budget/").values()
    return sorted(found, key=lambda axis: axis != sweep.axis)


def scores(sweep: Sweep, metric: Metric, axis: str | None = None) -> pd.DataFrame:
    """The score of every cell of the sweep.

    A run that diverged or failed scores the lowest value that any run of its setting had at any time: it is the worst,
    and stays in. Runs that are not over (interrupted, running, planned) have no score yet.

    Args:
        axis: compare at the largest budget on it that all finished runs of a setting reached, between the points of a
            run interpolated; by default as the sweep is compared, which is at the end of each run, the budget's limit,
            unless another axis was chosen for it.

    Returns:
        One row per cell that is compared: setting, variant, seed, run, status, score (NaN where there is none: of
        runs that are not over, were not measured by that budget, or went wrong where nothing was measured at all).
    """
    rows = histories(sweep, metric, axis or sweep.axis)
    limits = common_budget(rows) if axis else sweep.limits
    found = {}
    for run, curve in rows[rows["status"] == "done"].groupby("run", sort=False):
        x, y = curve["x"].to_numpy(), curve["y"].to_numpy()
        found[run] = _summarise(metric, x, y, limits.get(curve["setting"].iloc[0], x[-1]))
    cells = sweep.compared[["setting", "variant", "seed", "run", "status"]]
    lowest = cells["setting"].map(rows.groupby("setting")["y"].min())
    score = cells["run"].map(found).astype(float)
    return cells.assign(score=score.where(~cells["status"].isin(WORST), lowest)).reset_index(drop=True)


def counts(rows: pd.DataFrame) -> dict[str, int]:
    """How many runs of some score rows have a score, have it because they count as the worst, and have none."""
    known = rows["score"].notna()
    worst = known & rows["status"].isin(WORST)
    return {"n": int(known.sum()), "worst": int(worst.sum()), "missing": int((~known).sum())}


def pairs(rows: pd.DataFrame, variants: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
    """Of the rows of one setting: the variants to compare, all with all, or all with a baseline, in this order."""
    present = [name for name in variants if name in set(rows["variant"])]
    if baseline is None:
        return list(combinations(present, 2))
    return [(name, baseline) for name in present if name != baseline and baseline in present]


def paired(rows: pd.DataFrame, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of one setting: the scores of two variants on the seeds that both have, `[n]` each."""
    here = rows[rows["variant"].isin([first, second])]
    table = here.pivot(index="seed", columns="variant", values="score").reindex(columns=[first, second]).dropna()
    return table[first].to_numpy(dtype=float), table[second].to_numpy(dtype=float)


def none_ended_well(rows: pd.DataFrame, first: str, second: str) -> bool:
    """Whether the pairs of :func:`paired` are all of two runs that count as the worst, and so tell nothing."""
    wrong = rows["status"].isin(WORST).astype(float).where(rows["score"].notna())
    return bool(np.all(paired(rows.assign(score=wrong), first, second)))


def _measured(sweep: Sweep, metric: Metric) -> pd.DataFrame:
    return sweep.evaluations if metric.source == "evaluations" else sweep.all_runs


def _trailing_mean(values: pd.Series) -> pd.Series:
    return values.rolling(max(1, round(_SMOOTHED * len(values))), min_periods=1).mean()


def _summarise(metric: Metric, x: np.ndarray, y: np.ndarray, budget: float) -> float:
    """The value at the budget, or the mean height up to it of the curve, which begins at its first value.

    NaN where the budget comes before the first point: what was not measured is not made up.
    """
    end = float(np.interp(budget, x, y, left=np.nan))
    if metric.summary == "final" or not budget > 0:
        return end
    before = x < budget
    xs, ys = np.r_[0, x[before], budget], np.r_[y[0], y[before], end]
    return float(np.trapezoid(ys, xs) / budget)
