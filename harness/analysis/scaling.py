"""Where a variant is heading: the sigmoid of ScaleRL (arXiv 2510.13786, eq. 1) against budget, where it holds.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)

R0 is the cold start's level, which is measured; the asymptote A, the midpoint C_mid and the steepness B are fitted.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import OptimizeWarning, curve_fit

from harness.analysis.intervals import CONFIDENCE, MIN_RUNS_FOR_INTERVAL, NONE, Interval
from harness.analysis.scores import Metric, cold_starts, raw_histories
from harness.analysis.sweep import Sweep

REFITS = 200  # to resampled seeds: enough for a standard error (Efron and Tibshirani 1993, ch. 6.4)
MIN_POINTS = 4  # of a run, beyond the cold start, in the first half of the budget: one more than there are parameters
MAX_FAILED = 0.05  # share of the refits that may fail
MAX_WIDTH = 0.5  # of the asymptote's interval, as a share of what the fit gains, A - R0
MAX_ERROR = 0.15  # of the back-test, as a share of what was gained by the end
_FIRST, _LAST = 0.5, 0.9  # of the budget: the back-test is fitted up to the one, and judged from the other on
_GRID = 100


class Sigmoid(NamedTuple):
    """The fitted parameters, on the scale on which their errors are close to symmetric."""

    asymptote: float
    log_midpoint: float
    log_steepness: float

    def at(self, budget: np.ndarray, start: float) -> np.ndarray:
        """R(C), `[...]`; the start at budget 0."""
        with np.errstate(divide="ignore", over="ignore"):
            fall = np.exp(np.exp(self.log_steepness) * (self.log_midpoint - np.log(budget)))
        return start + (self.asymptote - start) / (1 + fall)


@dataclass(frozen=True)
class ScalingFit:
    """One variant in one setting.

    Attributes:
        n: finished runs.
        reason: why there is no fit; None where it holds.
        start: R0, the cold start's level.
        predicted, measured: the metric over the last tenth of the budget, as the fit to the first half predicts it, and
            as it was; NaN where it did not come to that.
        asymptote, midpoint, steepness: with 95 % intervals over seeds; NaN where there is no fit.
        points: budget and metric of all runs, what is fitted, `[P, 2]`.
        x, y, low, high: the fitted curve and its pointwise 95 % interval, `[G]`; empty where there is no fit.
    """

    setting: str
    variant: str
    metric: str
    axis: str
    n: int
    reason: str | None
    start: float
    predicted: float = float("nan")
    measured: float = float("nan")
    asymptote: Interval = NONE
    midpoint: Interval = NONE
    steepness: Interval = NONE
    points: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    x: np.ndarray = field(default_factory=lambda: np.empty(0))
    y: np.ndarray = field(default_factory=lambda: np.empty(0))
    low: np.ndarray = field(default_factory=lambda: np.empty(0))
    high: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def error(self) -> float:
        """Of the back-test: predicted - measured."""
        return self.predicted - self.measured


def scaling_fits(sweep: Sweep, metric: Metric) -> list[ScalingFit]:
    """Fit every variant in every setting against the budget axis that ended the runs.

    Fitted are the unsmoothed points of the finished runs, up to the limit that ended them. There is no fit, and
    `reason` says why, with fewer than three runs; where a run has fewer than four points in the first half; where least
    squares does not converge on all runs, on their first half or on more than 5 % of the resampled seeds; where the
    asymptote's interval is wider than half of what the fit gains; and where the first half predicts the end with an
    error of more than 15 % of what was gained.
    """
    rows = raw_histories(sweep, metric, sweep.axis)
    rows = rows[rows["status"] == "done"]
    # Where the axis ended the runs, all reached its limit, and evaluations lie at fractions of it.
    limits = sweep.limits or dict.fromkeys(sweep.settings, sweep.limit)
    starts = {str(setting): cold_starts(here, metric).mean() for setting, here in rows.groupby("setting")}
    found = []
    for variant, setting, here in sweep.groups(rows):
        within = here[here["x"] <= limits[setting]]
        runs = [own[["x", "y"]].to_numpy(dtype=float) for _, own in within.groupby("run", sort=False)]
        empty = ScalingFit(setting, variant, metric.label, sweep.axis, len(runs), None, float(starts[setting]))
        found.append(fit_runs(runs, limits[setting], empty))
    return found


def fit_runs(runs: Sequence[np.ndarray], limit: float, fit: ScalingFit) -> ScalingFit:
    """Complete a fit that knows its start from each run's points `[points, 2]`: budget, up to the limit, and metric."""
    fit = replace(fit, points=np.concatenate([np.empty((0, 2)), *runs]))
    if len(runs) < MIN_RUNS_FOR_INTERVAL:
        return replace(fit, reason=f"{len(runs)} finished runs, where it takes {MIN_RUNS_FOR_INTERVAL}")
    if not np.isfinite(fit.start):
        return replace(fit, reason="the cold start was not measured")
    scaled = [run / [limit, 1] for run in runs]
    points = np.concatenate(scaled)
    early, late = points[points[:, 0] <= _FIRST], points[points[:, 0] >= _LAST]
    fewest = min(int(((run[:, 0] > 0) & (run[:, 0] <= _FIRST)).sum()) for run in scaled)
    if fewest < MIN_POINTS:
        return replace(fit, reason=f"points of a run in the first half: {fewest}, where it takes {MIN_POINTS}")
    if not len(late):
        return replace(fit, reason="no run has a point in the last tenth of the budget")
    guess = Sigmoid(float(late[:, 1].mean()), float(np.log(0.3)), 0.0)
    whole = _fit(points, fit.start, guess)
    half = _fit(early, fit.start, whole or guess)
    if whole is None or half is None:
        return replace(fit, reason="least squares does not converge")
    fit = replace(fit, predicted=float(half.at(late[:, 0], fit.start).mean()), measured=float(late[:, 1].mean()))
    gained = fit.measured - fit.start
    if not abs(fit.error) <= MAX_ERROR * gained:
        return replace(fit, reason=f"the first half predicts {fit.predicted:.3f} for an end of {fit.measured:.3f}")
    refits = _refits(scaled, fit.start, whole)
    if len(refits) < (1 - MAX_FAILED) * REFITS:
        return replace(fit, reason=f"least squares fails on {REFITS - len(refits)} of {REFITS} resamples")
    return _with_intervals(fit, whole, refits, len(runs), limit)


def scaling_frame(fits: Sequence[ScalingFit]) -> pd.DataFrame:
    """One row per fit.

    Returns:
        setting, variant, metric, axis, n, holds, reason, start, then asymptote, midpoint and steepness, each with _low
        and _high, and predicted, measured, error of the back-test.
    """
    lines = []
    for fit in fits:
        names = {"setting": fit.setting, "variant": fit.variant, "metric": fit.metric, "axis": fit.axis, "n": fit.n}
        line = {**names, "holds": fit.reason is None, "reason": fit.reason, "start": fit.start}
        for name in ("asymptote", "midpoint", "steepness"):
            one = getattr(fit, name)
            line |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        lines.append({**line, "predicted": fit.predicted, "measured": fit.measured, "error": fit.error})
    return pd.DataFrame(lines)


def _fit(points: np.ndarray, start: float, guess: Sigmoid) -> Sigmoid | None:
    """Least squares over `[points, 2]`; None where it does not converge."""

    def curve(budget: np.ndarray, *parameters: float) -> np.ndarray:
        return Sigmoid(*parameters).at(budget, start)

    try:
        with warnings.catch_warnings(action="ignore", category=OptimizeWarning):  # the covariance says it as well
            found, covariance = curve_fit(curve, points[:, 0], points[:, 1], p0=guess, maxfev=500)
    except RuntimeError:
        return None
    return Sigmoid(*map(float, found)) if np.isfinite(covariance).all() else None


def _refits(runs: Sequence[np.ndarray], start: float, whole: Sigmoid) -> list[Sigmoid]:
    """Fits to resampled runs, seeded, without those that did not converge."""
    drawn = np.random.default_rng(0).integers(len(runs), size=(REFITS, len(runs)))
    fits = (_fit(np.concatenate([runs[run] for run in runs_drawn]), start, whole) for runs_drawn in drawn)
    return [fit for fit in fits if fit is not None]


def _with_intervals(fit: ScalingFit, whole: Sigmoid, refits: Sequence[Sigmoid], n: int, limit: float) -> ScalingFit:
    """The parameters and the curve with intervals: bootstrap standard errors over seeds, times Student's t."""
    wide = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.sqrt(n / (n - 1)))
    half = wide * np.std(refits, axis=0)
    asymptote, log_midpoint, log_steepness = (
        Interval(value, value - float(by), value + float(by)) for value, by in zip(whole, half, strict=True)
    )
    gain = whole.asymptote - fit.start
    if not asymptote.high - asymptote.low <= MAX_WIDTH * gain:
        where = f"{asymptote.low:.3f} to {asymptote.high:.3f}"
        return replace(fit, reason=f"the asymptote's interval, {where}, is wider than half of what the fit gains")
    grid = np.linspace(0, 1, _GRID)
    y = whole.at(grid, fit.start)
    band = wide * np.std([one.at(grid, fit.start) for one in refits], axis=0)
    return replace(
        fit,
        asymptote=asymptote,
        midpoint=Interval(*(float(np.exp(end)) * limit for end in log_midpoint)),
        steepness=Interval(*(float(np.exp(end)) for end in log_steepness)),
        x=grid * limit,
        y=y,
        low=y - band,
        high=y + band,
    )
