"""The tables behind the verdicts: means, chances, equal budgets, times to a target, stability, and scaling fits."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from harness.analysis.aggregates import COLLAPSE_MARGIN, COLLAPSE_SHARE, stability, summary
from harness.analysis.efficiency import TARGETS, winners
from harness.analysis.evidence import (
    headline_end,
    headline_equal_budgets,
    headline_improvements,
    headline_label,
    headline_scaling_fits,
    headline_scores,
    headline_smoothing,
    headline_times,
    level_label,
    seconds_doubt,
)
from harness.analysis.scaling import scaling_frame
from harness.analysis.style import unit
from harness.analysis.sweep import Sweep
from harness.analysis.table import Table

_NAMES = {"setting": "model", "variant": "algorithm"}
_BOOTSTRAP = "95 % studentised bootstrap interval over seeds, where n is 3 or more"
_WORST = "Runs that diverged or failed count as the worst"


def score_summary(sweep: Sweep) -> Table:
    """Mean and interquartile mean of every variant, and its worst seed."""
    names = {
        **_NAMES, "n": "n", "mean": "mean", "mean_low": "low", "mean_high": "high", "iqm": "IQM", "iqm_low": "IQM low",
        "iqm_high": "IQM high", "worst_score": "worst", "worst_seed": "its seed", "worst": "went wrong",
        "missing": "missing",
    }  # fmt: skip
    note = (
        f"{headline_end(sweep)}. IQM: interquartile mean, of the runs without the highest "
        f"and the lowest quarter. low, high: {_BOOTSTRAP}; for all settings together, resampled within each. IQM low, "
        "IQM high: 95 % percentile bootstrap interval, where n is 8 or more, and of one model. "
        f"{_WORST} (went wrong); those that are not over have no score (missing)."
    )
    numbers = ("mean", "low", "high", "IQM", "IQM low", "IQM high", "worst")
    formats = {**dict.fromkeys(numbers, "{:.3f}"), "its seed": "{:.0f}"}
    found = _named(summary(headline_scores(sweep)), names)
    return Table("score_summary", "Means and worst seeds", note, found, formats)


def probabilities_of_improvement(sweep: Sweep) -> Table:
    """For every pair: how likely a run of the first scores higher than one of the second."""
    names = {
        "setting": "model", "first": "first", "second": "second", "n": "pairs", "probability": "first is higher",
        "low": "low", "high": "high",
    }  # fmt: skip
    found = _named(headline_improvements(sweep), names).dropna(subset="first is higher")
    note = (
        f"{headline_end(sweep)}: the probability that a run of the first scores higher than "
        "a run of the second, over all pairs of runs, a tie counting half, with Newcombe's 95 % interval, which is not "
        f"corrected for many comparisons. Pairs with fewer than three seeds in common are left out. {_WORST}."
    )
    formats = dict.fromkeys(("first is higher", "low", "high"), "{:.2f}")
    return Table("probability_of_improvement", "Probability of improvement", note, found, formats)


def equal_budget_winners(sweep: Sweep) -> Table:
    """Who is in front at an equal budget, axis by axis."""
    found = headline_equal_budgets(sweep)
    compared = {verdict.setting for one in found for verdict in one.verdicts}
    rows = [
        {
            "model": line["setting"], **_budget(sweep, line["axis"], line["budget"]),
            "highest mean": line["highest"], "unbeaten": ", ".join(line["unbeaten"]) or "too few runs",
        }
        for line in winners(found).to_dict("records")
        if line["setting"] in compared
    ]  # fmt: skip
    note = (
        f"{headline_label(sweep)} where all had spent equally much on an axis: the most that every finished run of the "
        f"model had spent on it, interpolated between measurements{headline_smoothing(sweep)}. Unbeaten: no other is "
        "better by verdict (paired t test, after Holm for all pairs of the model on that axis); variants with too few "
        "runs for that are not named. "
        f"{seconds_doubt(sweep)}"
    ).strip()
    return Table("equal_budget_winners", "In front at an equal budget", note, _in_order(sweep, pd.DataFrame(rows)))


def equal_budget_means(sweep: Sweep) -> Table:
    """The mean of every variant at an equal budget on every axis."""
    rows = [
        {
            "model": line["setting"], **_budget(sweep, one.axis, line["budget"]), "algorithm": line["variant"],
            "n": line["n"], "mean": line["mean"], "low": line["mean_low"], "high": line["mean_high"],
        }
        for one in headline_equal_budgets(sweep)
        for line in one.means.to_dict("records")
    ]  # fmt: skip
    note = f"{headline_label(sweep)} at the equal budgets of the table above. low, high: {_BOOTSTRAP}. {_WORST}."
    formats = dict.fromkeys(("mean", "low", "high"), "{:.3f}")
    return Table("equal_budget_means", "Means at an equal budget", note, _in_order(sweep, pd.DataFrame(rows)), formats)


def times_to_target(sweep: Sweep) -> Table:
    """The budget that it takes to reach a score; not reached stays in, as infinite."""
    budget = unit(sweep.axis, sweep.limit)
    median = f"median ({budget.symbol or sweep.axis})"
    names = {
        **_NAMES, "target": "target", "n": "n", "median": median, "low": "low", "high": "high", "reached": "reached",
        "reached_low": "reached low", "reached_high": "reached high",
    }  # fmt: skip
    found = _in_order(sweep, _named(headline_times(sweep), names), "target")
    found[[median, "low", "high"]] /= budget.scale
    note = (
        f"What a run had spent when its {level_label(sweep)} first reached the target, interpolated between "
        "measurements: median over the runs that are over, with its 95 % interval between order statistics, where n is "
        "5 or more. Not reached: not within the most that every finished run of the model had spent; it counts as "
        f"infinite. Targets: {', '.join(f'{part:.0%}' for part in TARGETS)} of the way from the cold start to the "
        "highest mean at the end. Reached: share of the runs, with Wilson's 95 % interval."
    )
    formats = {"target": "{:.3f}", **dict.fromkeys(("reached", "reached low", "reached high"), "{:.0%}")}
    return Table("time_to_target", "Budget to reach a score", note, found, formats)


def stabilities(sweep: Sweep) -> Table:
    """How many runs went wrong, and how."""
    names = {
        **_NAMES, "runs": "runs", "diverged": "diverged", "failed": "failed", "collapsed": "collapsed",
        "share": "went wrong", "low": "low", "high": "high", "missing": "not over",
    }  # fmt: skip
    note = (
        "Of the runs that are over. Diverged: a loss or gradient was not finite. Failed: ended by an error. Collapsed: "
        f"finished, but with a training reward more than {COLLAPSE_MARGIN} below the cold start's or below "
        f"{COLLAPSE_SHARE:.0%} of its own highest, both as means over a tenth of the run's steps. Went wrong: the "
        "share to which any of these happened, with Wilson's 95 % interval."
    )
    formats = dict.fromkeys(("went wrong", "low", "high"), "{:.0%}")
    return Table("stability", "Stability", note, _named(stability(sweep), names), formats)


def scaling(sweep: Sweep) -> Table:
    """Where every variant is heading, or why that cannot be said."""
    budget = unit(sweep.axis, sweep.limit)
    midpoint = f"midpoint ({budget.symbol or sweep.axis})"
    names = {
        **_NAMES, "metric": "metric", "n": "n", "asymptote": "asymptote", "asymptote_low": "A low",
        "asymptote_high": "A high", "midpoint": midpoint, "midpoint_low": "C low", "midpoint_high": "C high",
        "steepness": "steepness", "steepness_low": "B low", "steepness_high": "B high", "predicted": "predicted",
        "measured": "measured", "reason": "no fit, because",
    }  # fmt: skip
    found = _named(scaling_frame(headline_scaling_fits(sweep)), names)
    found[[midpoint, "C low", "C high"]] /= budget.scale
    holds = found["no fit, because"].isna()
    missed = found[~holds].groupby(["metric", "no fit, because"], sort=False)
    remarks = [
        f"No fit of {metric}, because {reason}: "
        + ", ".join(f"{variant} on {model}" for variant, model in zip(own["algorithm"], own["model"], strict=True))
        for (metric, reason), own in missed
    ]
    note = (
        "R(C) = R0 + (A − R0) / (1 + (C_mid / C)^B), the sigmoid of ScaleRL (arXiv 2510.13786) over the budget C, from "
        "the cold start's level R0 to the asymptote A, fitted to the finished runs by least squares; low, high: 95 % "
        "interval over seeds (bootstrap standard error, Student's t). Back-test: the mean over the last tenth of the "
        "budget as a fit to the first half predicts it, and as measured. No fit is shown where it does not hold."
    )
    three = ("asymptote", "A low", "A high", "predicted", "measured")
    formats = {**dict.fromkeys(three, "{:.3f}"), **dict.fromkeys(("steepness", "B low", "B high"), "{:.2f}")}
    shown = found[holds].drop(columns="no fit, because")
    return Table("scaling_fit", "Scaling fit", note, found, formats, shown, remarks)


def _named(rows: pd.DataFrame | list[dict[str, Any]], names: Mapping[str, str]) -> pd.DataFrame:
    """These columns in this order, under the names that a reader sees."""
    return pd.DataFrame(rows).reindex(columns=list(names)).rename(columns=names)


def _budget(sweep: Sweep, axis: str, budget: float) -> dict[str, Any]:
    """A budget in a unit that is easy to read; on the sweep's own axis in the same one everywhere."""
    scale = unit(axis, sweep.limit if axis == sweep.axis else budget)
    return {"axis": axis, "budget": budget / scale.scale, "unit": scale.symbol}


def _in_order(sweep: Sweep, frame: pd.DataFrame, *by: str) -> pd.DataFrame:
    """The lines of one model after the other's, and within it by further columns."""
    if frame.empty:
        return frame
    models = pd.Categorical(frame["model"], sweep.settings)
    return frame.assign(place=models.codes).sort_values(["place", *by], kind="stable").drop(columns="place")
