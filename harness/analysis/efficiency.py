"""What a budget buys on every axis, and what a score costs: equal budgets, and budgets to a target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.analysis.aggregates import summary
from harness.analysis.intervals import median_interval, share_interval
from harness.analysis.scores import COUNTED, Metric, axes, cold_starts, common_budget, histories, scores
from harness.analysis.sweep import Sweep
from harness.analysis.verdicts import Verdict, leaders, verdicts

TARGETS = (0.5, 0.75, 0.9)  # of the way from the cold start to the best variant's mean at the end


@dataclass(frozen=True)
class EqualBudget:
    """The comparison at one budget axis.

    Attributes:
        budgets: by setting, the largest that all finished runs reached, in the axis's unit; a setting in which none
            has finished has none, and nothing is compared in it.
        means: :func:`harness.analysis.aggregates.summary` of the scores there, each setting by itself, with the columns
            axis and budget.
        verdicts: on all pairs of a setting.
    """

    axis: str
    budgets: dict[str, float]
    means: pd.DataFrame
    verdicts: list[Verdict]


def equal_budgets(sweep: Sweep, metric: Metric) -> list[EqualBudget]:
    """Compare at an equal budget on every axis that is recorded with the metric, the one that ended the runs first.

    Holm's correction is for the pairs of a setting on one axis, not for the axes. All pairs are compared, also where
    the sweep has a baseline: who is in front is a question about all.
    """
    found = []
    for axis in axes(sweep, metric):
        rows, budgets = scores(sweep, metric, axis), common_budget(histories(sweep, metric, axis))
        rows = rows[rows["setting"].isin(budgets)]
        if rows.empty:
            continue
        means = pd.concat([summary(here) for _, here in rows.groupby("setting", sort=False)], ignore_index=True)
        means.insert(2, "axis", axis)
        means.insert(3, "budget", means["setting"].map(budgets))
        found.append(EqualBudget(axis, budgets, means, verdicts(rows, metric, sweep.variants)))
    return found


def winners(found: Sequence[EqualBudget]) -> pd.DataFrame:
    """Who is in front at an equal budget, axis by axis.

    Returns:
        setting, axis, budget, highest (the variant with the highest mean), unbeaten (list of the ranked variants that
        none is better than by verdict; empty where there are too few runs).
    """
    lines = []
    for one in found:
        unbeaten = leaders(one.verdicts)
        for setting, means in one.means.dropna(subset="mean").groupby("setting", sort=False):
            highest = str(means["variant"].iloc[means["mean"].argmax()])
            line = {"setting": setting, "axis": one.axis, "budget": one.budgets[str(setting)], "highest": highest}
            lines.append({**line, "unbeaten": unbeaten.get(str(setting), [])})
    return pd.DataFrame(lines, columns=["setting", "axis", "budget", "highest", "unbeaten"])


def axis_findings(found: Sequence[EqualBudget]) -> list[str]:
    """One sentence per setting with something to compare: whether who is in front changes with the axis."""
    compared = {verdict.setting for one in found for verdict in one.verdicts}
    return [
        _axis_finding(str(setting), here, _reversals(found, str(setting)))
        for setting, here in winners(found).groupby("setting", sort=False)
        if setting in compared
    ]


def default_targets(sweep: Sweep, metric: Metric, parts: Sequence[float] = TARGETS) -> dict[str, list[float]]:
    """By setting: parts of the way from the cold start to the best variant's end, on the axis of the sweep.

    There is no target without finished runs, where the cold start was not measured, or where no more than the metric's
    margin was gained, which is no way.
    """
    targets, rows = {}, histories(sweep, metric, sweep.axis)
    for setting, here in rows[rows["status"] == "done"].groupby("setting", sort=False):
        start = cold_starts(here, metric).mean()
        best = here.groupby(["variant", "run"])["y"].last().groupby("variant").mean().max()
        if best - start > metric.margin:
            targets[str(setting)] = [float(start + part * (best - start)) for part in parts]
    return targets


def run_times(sweep: Sweep, metric: Metric, axis: str, targets: dict[str, list[float]]) -> pd.DataFrame:
    """What each run spent until its metric first reached each target of its setting, interpolated between its points.

    A run has as much time as the finished run of its setting that has the least; one that does not reach the target in
    it, whether it finished, diverged or failed, takes infinitely long.

    Returns:
        setting, variant, seed, run, status, target, time (in the axis's unit); rows of runs that are over.
    """
    rows = histories(sweep, metric, axis)
    limits, curves = common_budget(rows), dict(list(rows.groupby("run")))
    names = ["setting", "variant", "seed", "run", "status"]
    lines = []
    for cell in sweep.cells.loc[sweep.cells["status"].isin(COUNTED), names].to_dict("records"):
        curve, limit = curves.get(cell["run"], rows.iloc[:0]), limits.get(cell["setting"], np.inf)
        for target in targets.get(cell["setting"], []):
            time = _first_reached(curve["x"].to_numpy(dtype=float), curve["y"].to_numpy(dtype=float), target)
            lines.append({**cell, "target": target, "time": time if time <= limit else np.inf})
    return pd.DataFrame(lines, columns=[*names, "target", "time"])


def time_to_target(times: pd.DataFrame) -> pd.DataFrame:
    """The median over seeds of the budget that reaches a target; not reached stays in, as infinite.

    Args:
        times: of :func:`run_times`.

    Returns:
        setting, variant, target, n, median, low, high (distribution-free 95 % interval of the median, NaN of fewer than
        five runs), reached (share of the runs), reached_low, reached_high (Wilson's interval).
    """
    lines = []
    for (setting, variant, target), here in times.groupby(["setting", "variant", "target"], sort=False):
        n, hits = len(here), int(np.isfinite(here["time"]).sum())
        median, share = median_interval(here["time"].to_numpy(dtype=float)), share_interval(hits, n)
        names = {"setting": setting, "variant": variant, "target": target, "n": n}
        interval = {"median": median.value, "low": median.low, "high": median.high}
        reached = {"reached": share.value, "reached_low": share.low, "reached_high": share.high}
        lines.append({**names, **interval, **reached})
    return pd.DataFrame(lines)


def _first_reached(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """Where the line through the points first reaches the target; infinite where it never does."""
    at = np.flatnonzero(y >= target)
    if not len(at):
        return np.inf
    k = int(at[0])
    if k == 0:
        return float(x[0])
    return float(x[k - 1] + (x[k] - x[k - 1]) * (target - y[k - 1]) / (y[k] - y[k - 1]))


def _reversals(found: Sequence[EqualBudget], setting: str) -> list[str]:
    """Pairs of which one is better on some axes and worse on others."""
    said = []
    by_pair: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in found:
        for verdict in one.verdicts:
            if verdict.setting == setting:
                outcomes = by_pair.setdefault((verdict.first, verdict.second), {})
                outcomes.setdefault(verdict.outcome, []).append(one.axis)
    for (first, second), outcomes in by_pair.items():
        if "better" in outcomes and "worse" in outcomes:
            said.append(
                f"{first} is better than {second} at equal {_words(outcomes['better'])}, and worse at equal "
                f"{_words(outcomes['worse'])}"
            )
    return said


def _axis_finding(setting: str, here: pd.DataFrame, reversed_pairs: Sequence[str]) -> str:
    unranked = [str(line.axis) for line in here.itertuples() if not line.unbeaten]
    if unranked:
        return (
            f"On {setting}, whether who is in front changes with the axis of the budget is open: there are too few "
            f"runs to compare all with all at equal {_words(unranked)}."
        )
    by_leader: dict[str, list[str]] = {}
    for line in here.itertuples():
        by_leader.setdefault(str(line.highest), []).append(str(line.axis))
    if len(by_leader) == 1:
        (name, axes), *_ = by_leader.items()
        return f"On {setting}, {name} has the highest mean at equal {_words(axes)}; by verdict {_alone(here, name)}."
    parts = [f"{name}'s at equal {_words(axes)}" for name, axes in by_leader.items()]
    certain = f"By verdict: {'; '.join(reversed_pairs)}" if reversed_pairs else "No verdict turns round with the axis"
    return f"On {setting}, the highest mean changes with the axis: it is {'; '.join(parts)}. {certain}."


def _alone(here: pd.DataFrame, highest: str) -> str:
    """Who alone is unbeaten, and where: not always the one with the highest mean, which is also of unpaired runs."""
    alone: dict[str, list[str]] = {}
    for axis, unbeaten in zip(here["axis"], here["unbeaten"], strict=True):
        if len(unbeaten) == 1:
            alone.setdefault(unbeaten[0], []).append(axis)
    parts = [
        f"{'it' if name == highest else name} alone is unbeaten at equal {_words(axes)}" for name, axes in alone.items()
    ]
    return ", ".join(parts) or "none alone is unbeaten"


def _words(axes: Sequence[str]) -> str:
    return ", ".join(axis.replace("_", " ") for axis in axes)
