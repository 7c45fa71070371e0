"""One number per run: what variants are compared by, at the end of the budget or at an equal one on any axis."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from harness.analysis.sweep import Sweep, columns_of

COUNTED = ("done", "diverged", "failed")  # the outcomes of runs that have come to an end
_WORST = ("diverged", "failed")
_SMOOTHED = 0.1  # the share of a run's steps that the reward at one step is averaged over


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


def headline_metric(sweep: Sweep) -> Metric | None:
    """What verdicts are about: the first lm-eval task; None before anything was evaluated."""
    tasks = list(columns_of(sweep.cells, "score/").values())
    return Metric("evaluations", tasks[0]) if tasks else None


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
    frame, spent = getattr(sweep, metric.source), f"budget/{axis}"
    if metric.source == "evaluations":
        frame = frame[frame["eval_task"] == metric.name].rename(columns={"score": "y"})
    else:
        frame = frame.rename(columns={metric.name: "y"})
    columns = ["setting", "variant", "seed", "run", "status", "x", "y"]
    frame = frame.rename(columns={spent: "x"}).reindex(columns=columns).dropna(subset=["x", "y"])
    return frame.sort_values(["run", "x"], kind="stable").reset_index(drop=True)


def axes(sweep: Sweep, metric: Metric) -> list[str]:
    """The budget axes that are recorded with the metric, the one that ended the runs first."""
    found = columns_of(getattr(sweep, metric.source).dropna(axis="columns", how="all"), "budget/").values()
    return sorted(found, key=lambda axis: axis != sweep.axis)


def common_budget(rows: pd.DataFrame) -> dict[str, float]:
    """The largest budget that all finished runs of a setting reached, from the rows of :func:`histories`."""
    done = rows[rows["status"] == "done"]
    ends = done.groupby(["setting", "run"], as_index=False)["x"].max()
    return {str(setting): float(group["x"].min()) for setting, group in ends.groupby("setting")}


def scores(sweep: Sweep, metric: Metric, axis: str | None = None) -> pd.DataFrame:
    """The score of every cell of the sweep.

    A run that diverged or failed scores the lowest value that any run of its setting had at any time: it is the worst,
    and stays in. Runs that are not over (interrupted, running, planned) have no score yet.

    Args:
        axis: compare at the largest budget on it that all finished runs of a setting reached, between the points of a
            run interpolated; by default at the end of each run, which is the budget's limit.

    Returns:
        One row per cell that is not skipped: setting, variant, seed, run, status, score (NaN where there is none: of
        runs that are not over, were not measured by that budget, or went wrong where nothing was measured at all).
    """
    rows = histories(sweep, metric, axis or sweep.axis)
    limits = common_budget(rows) if axis else {}
    found = {}
    for run, curve in rows[rows["status"] == "done"].groupby("run", sort=False):
        x, y = curve["x"].to_numpy(), curve["y"].to_numpy()
        found[run] = _summarise(metric, x, y, limits.get(curve["setting"].iloc[0], x[-1]))
    cells = sweep.cells.loc[sweep.cells["status"] != "skipped", ["setting", "variant", "seed", "run", "status"]]
    lowest = cells["setting"].map(rows.groupby("setting")["y"].min())
    score = cells["run"].map(found).astype(float)
    return cells.assign(score=score.where(~cells["status"].isin(_WORST), lowest)).reset_index(drop=True)


def counts(rows: pd.DataFrame) -> dict[str, int]:
    """How many runs of some score rows have a score, have it because they count as the worst, and have none."""
    known = rows["score"].notna()
    worst = known & rows["status"].isin(_WORST)
    return {"n": int(known.sum()), "worst": int(worst.sum()), "missing": int((~known).sum())}


def paired(rows: pd.DataFrame, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of one setting: the scores of two variants on the seeds that both have, `[n]` each."""
    here = rows[rows["variant"].isin([first, second])]
    table = here.pivot(index="seed", columns="variant", values="score").reindex(columns=[first, second]).dropna()
    return table[first].to_numpy(dtype=float), table[second].to_numpy(dtype=float)


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
