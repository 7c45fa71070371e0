"""Means over seeds and how far they can be trusted."""

from collections.abc import Iterator
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
        finished, unfinished: (x, y) of single runs, each `[steps]`.
    """

    n: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    finished: list[tuple[np.ndarray, np.ndarray]]
    unfinished: list[tuple[np.ndarray, np.ndarray]]


def estimate(values: pd.Series) -> Estimate:
    """The mean over runs and its interval; values that are not finite are left out."""
    kept = values.dropna().to_numpy(dtype=float)
    if not len(kept):
        return Estimate(0, np.nan, np.nan, np.nan)
    low, high = bootstrap_interval(kept) if len(kept) >= MIN_RUNS_FOR_INTERVAL else (np.nan, np.nan)
    return Estimate(len(kept), float(kept.mean()), float(low), float(high))


def mean_over_steps(rows: pd.DataFrame, metric: str) -> pd.Series:
    """One value per run: the metric's mean over the steps within the budget."""
    return rows.groupby("run", sort=False)[metric].mean()


def curve(rows: pd.DataFrame, x: str, y: str) -> Curve:
    """Interpolate the finished runs linearly on a common grid, and average them over seeds.

    Args:
        rows: (run, step) rows of one variant in one setting.
        x, y: columns.
    """
    done = list(_single_runs(rows[rows["status"] == "done"], x, y))
    others = list(_single_runs(rows[rows["status"] != "done"], x, y))
    if len(done) < MIN_RUNS_FOR_INTERVAL:
        empty = np.empty(0)
        return Curve(len(done), empty, empty, empty, empty, done, others)
    first, last = max(xs[0] for xs, _ in done), min(xs[-1] for xs, _ in done)
    grid = np.linspace(first, last, GRID_POINTS)
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in done])
    low, high = bootstrap_interval(values)
    return Curve(len(done), grid, values.mean(axis=0), low, high, done, others)


def curve_at_points(rows: pd.DataFrame, x: str, y: str, point: str) -> Curve:
    """As :func:`curve`, but averaged at equal values of `point` (a fraction, a step) that all finished runs have.

    Nothing is interpolated, so that a mean is 0 only where all runs are.
    """
    done = rows[rows["status"] == "done"]
    singles = list(_single_runs(done, x, y))
    others = list(_single_runs(rows[rows["status"] != "done"], x, y))
    if len(singles) < MIN_RUNS_FOR_INTERVAL:
        empty = np.empty(0)
        return Curve(len(singles), empty, empty, empty, empty, singles, others)
    values = done.pivot(index="run", columns=point, values=y).dropna(axis="columns")
    at = done.groupby(point)[x].mean()[values.columns].to_numpy(dtype=float)
    low, high = bootstrap_interval(values.to_numpy(dtype=float))
    return Curve(len(singles), at, values.mean().to_numpy(), low, high, singles, others)


def _single_runs(rows: pd.DataFrame, x: str, y: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for _, run in rows.dropna(subset=[x, y]).groupby("run", sort=False):
        yield run[x].to_numpy(dtype=float), run[y].to_numpy(dtype=float)
