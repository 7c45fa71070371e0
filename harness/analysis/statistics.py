"""Means over seeds and how far they can be trusted."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.analysis.intervals import MIN_RUNS_FOR_INTERVAL, bootstrap_interval

GRID_POINTS = 120


@dataclass(frozen=True)
class Estimate:
    """A mean over n runs; its interval is NaN where n is too small for one."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One variant's metric in one setting.

    Attributes:
        n: finished runs.
        x, mean, low, high: `[G]`, over the range that all finished runs share; empty where n is too small.
        finished, unfinished: (x, y) of single runs by the run's name, each `[steps]`.
    """

    n: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    finished: dict[str, tuple[np.ndarray, np.ndarray]]
    unfinished: dict[str, tuple[np.ndarray, np.ndarray]]


def estimate(values: pd.Series) -> Estimate:
    """The mean over runs and its interval; values that are not finite are left out."""
    kept = values.to_numpy(dtype=float)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return Estimate(0, np.nan, np.nan, np.nan)
    low, high = bootstrap_interval(kept) if len(kept) >= MIN_RUNS_FOR_INTERVAL else (np.nan, np.nan)
    return Estimate(len(kept), float(kept.mean()), float(low), float(high))


def mean_over_steps(rows: pd.DataFrame, metric: str) -> pd.Series:
    """One value per run: the metric's mean over the steps within the budget."""
    return rows.groupby("run", sort=False)[metric].mean()


def curve(rows: pd.DataFrame, x: str, y: str, end: float = np.inf) -> Curve:
    """Interpolate the finished runs linearly on a common grid, and average them over seeds.

    Args:
        rows: (run, step) rows of one variant in one setting.
        x, y: columns.
        end: of x; a run that goes past it ends there, interpolated.
    """
    done = _single_runs(rows[rows["status"] == "done"], x, y, end)
    others = _single_runs(rows[rows["status"] != "done"], x, y, end)
    if len(done) < MIN_RUNS_FOR_INTERVAL:
        empty = np.empty(0)
        return Curve(len(done), empty, empty, empty, empty, done, others)
    first, last = max(xs[0] for xs, _ in done.values()), min(xs[-1] for xs, _ in done.values())
    grid = np.linspace(first, last, GRID_POINTS)
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in done.values()])
    low, high = bootstrap_interval(values)
    return Curve(len(done), grid, values.mean(axis=0), low, high, done, others)


def curve_at_points(rows: pd.DataFrame, x: str, y: str, point: str) -> Curve:
    """As :func:`curve`, but averaged at equal values of `point` (a fraction, a step) that all finished runs have.

    Nothing is interpolated, so that a mean is 0 only where all runs are.
    """
    done = rows[rows["status"] == "done"]
    singles = _single_runs(done, x, y)
    others = _single_runs(rows[rows["status"] != "done"], x, y)
    if len(singles) < MIN_RUNS_FOR_INTERVAL:
        empty = np.empty(0)
        return Curve(len(singles), empty, empty, empty, empty, singles, others)
    values = done.pivot(index="run", columns=point, values=y).dropna(axis="columns")
    at = done.groupby(point)[x].mean()[values.columns].to_numpy(dtype=float)
    low, high = bootstrap_interval(values.to_numpy(dtype=float))
    return Curve(len(singles), at, values.mean().to_numpy(), low, high, singles, others)


def _single_runs(rows: pd.DataFrame, x: str, y: str, end: float = np.inf) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {
        str(name): (run[x].to_numpy(dtype=float), run[y].to_numpy(dtype=float))
        for name, run in rows.dropna(subset=[x, y]).groupby("run", sort=False)
    }
    return {name: _until(end, *points) for name, points in found.items() if points[0][0] <= end}


def _until(end: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x[-1] <= end:
        return x, y
    inside = x < end
    return np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
