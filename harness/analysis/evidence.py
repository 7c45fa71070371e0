"""What the report says of the headline metric: each statistic worked out once, for tables, figures and sentences alike.

Results are kept for the latest sweep, and are not to be changed.
"""

from dataclasses import replace
from functools import lru_cache

import pandas as pd

from harness.analysis.aggregates import improvements
from harness.analysis.efficiency import (
    EqualBudget,
    axis_findings,
    default_targets,
    equal_budgets,
    run_times,
    time_to_target,
)
from harness.analysis.fairness import speed_checks
from harness.analysis.scaling import ScalingFit, scaling_fits
from harness.analysis.scores import Metric, headline_metric, scores
from harness.analysis.sweep import Sweep
from harness.analysis.verdicts import Verdict, verdicts

_REWARD = Metric("runs", "reward/mean")
_SECONDS = "device_seconds"


def headline_label(sweep: Sweep) -> str:
    """The metric's name in a sentence."""
    return _label(headline_metric(sweep))


def headline_end(sweep: Sweep) -> str:
    """The metric and where it is compared, in a sentence."""
    return f"{headline_label(sweep)} at the end of the budget{headline_smoothing(sweep)}"


def headline_smoothing(sweep: Sweep) -> str:
    """What is to be added to a sentence about values of the metric, where these are means over steps."""
    metric = headline_metric(sweep)
    return "" if metric is None else metric.smoothing


def level_label(sweep: Sweep) -> str:
    """The name of what reaches a target: the metric itself, also where verdicts are about the area below its curve."""
    return _label(_level(sweep))


@lru_cache(maxsize=1)
def headline_scores(sweep: Sweep) -> pd.DataFrame:
    """Of :func:`harness.analysis.scores.scores` at the end of the budget; no rows before anything was evaluated."""
    metric = headline_metric(sweep)
    if metric is None:
        return pd.DataFrame(columns=["setting", "variant", "seed", "run", "status", "score"])
    return scores(sweep, metric)


@lru_cache(maxsize=1)
def headline_verdicts(sweep: Sweep) -> list[Verdict]:
    """Of every pair in every setting, or of all with the baseline, at the end of the budget."""
    metric = headline_metric(sweep)
    return [] if metric is None else verdicts(headline_scores(sweep), metric, sweep.variants, baseline=sweep.baseline)


@lru_cache(maxsize=1)
def headline_improvements(sweep: Sweep) -> pd.DataFrame:
    """Of :func:`harness.analysis.aggregates.improvements`, for the same pairs."""
    return improvements(headline_scores(sweep), sweep.variants, sweep.baseline)


@lru_cache(maxsize=1)
def headline_equal_budgets(sweep: Sweep) -> list[EqualBudget]:
    """The comparison of all with all at an equal budget on every axis."""
    metric = headline_metric(sweep)
    return [] if metric is None else equal_budgets(sweep, metric)


def headline_times(sweep: Sweep) -> pd.DataFrame:
    """Of :func:`harness.analysis.efficiency.time_to_target`, on the axis that the sweep is compared on."""
    level = _level(sweep)
    if level is None:
        return pd.DataFrame()
    return time_to_target(run_times(sweep, level, sweep.axis, default_targets(sweep, level)))


@lru_cache(maxsize=1)
def headline_scaling_fits(sweep: Sweep) -> list[ScalingFit]:
    """Of the headline metric and of the training reward, which is measured at many more points."""
    metrics = dict.fromkeys((_level(sweep), _REWARD))
    return [fit for metric in metrics if metric is not None for fit in scaling_fits(sweep, metric)]


def axis_sentences(sweep: Sweep) -> list[str]:
    """One per setting with something to compare: whether who is in front changes with the axis of the budget.

    Seconds are left out, and that is said, where the machine was not equally fast for all.
    """
    found, doubt = headline_equal_budgets(sweep), seconds_doubt(sweep)
    if not doubt:
        return axis_findings(found)
    return [*axis_findings([one for one in found if one.axis != _SECONDS]), doubt]


def seconds_doubt(sweep: Sweep) -> str:
    """What is to be said of device seconds where they were not measured alike; nothing where they were."""
    if sweep.axis == _SECONDS or all(check.equal for check in speed_checks(sweep)):
        return ""
    return "Device seconds tell little here: the machine was not equally fast for all (see what was equal)."


def _level(sweep: Sweep) -> Metric | None:
    metric = headline_metric(sweep)
    return metric and replace(metric, summary="final")


def _label(metric: Metric | None) -> str:
    return "score" if metric is None else metric.label
