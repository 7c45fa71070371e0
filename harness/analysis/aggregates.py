"""What the scores of a variant's seeds amount to: means, distributions, chances against each other, and failures.

All take the rows of :func:`harness.analysis.scores.scores`, or a sweep, and return tidy frames.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.intervals import (
    MIN_RUNS_FOR_INTERVAL,
    NONE,
    interquartile_interval,
    mean_interval,
    probability_of_improvement,
    share_interval,
)
from harness.analysis.scores import Metric, counts, histories, paired, pairs, raw_histories
from harness.analysis.sweep import Sweep

OVERALL = "all settings"
COLLAPSE_MARGIN = 0.05  # of the training reward, below the cold start's
COLLAPSE_SHARE = 0.5  # of a run's own highest reward
_PROFILE_POINTS = 101


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and interquartile mean of every variant in every setting, with 95 % bootstrap intervals over seeds.

    Where there are several settings, the variants that have all their runs in each, and as many in each, get a line for
    all settings, of all runs together, resampled within settings.

    Returns:
        setting, variant, n, worst (of n: diverged or failed, and counted as the worst score), missing (left out, having
        no score), mean, mean_low, mean_high, iqm, iqm_low, iqm_high, worst_seed, worst_score. Intervals are NaN of
        fewer than three runs (for all settings: two in each), of the interquartile mean of fewer than eight and for
        all settings.
    """
    lines: list[dict[str, Any]] = []
    for setting, variant, here in _groups(rows):
        known = here.dropna(subset="score")
        worst = known.nsmallest(1, "score")  # one run, or none
        ends = {"worst_seed": worst["seed"].mean(), "worst_score": worst["score"].mean()}
        lines.append({"setting": setting, "variant": variant, **counts(here), **_means([known]), **ends})
    settings = rows["setting"].unique()
    if len(settings) > 1:
        for name, own in rows.groupby("variant", sort=False):
            strata = [part for _, part in own.groupby("setting", sort=False)]
            alike = len(strata) == len(settings) and len(set(map(len, strata))) == 1
            if alike and own["score"].notna().all():
                lines.append({"setting": OVERALL, "variant": name, **counts(own), **_means(strata)})
    return pd.DataFrame(lines)


def improvements(rows: pd.DataFrame, variants: Sequence[str], baseline: str | None = None) -> pd.DataFrame:
    """P(X > Y): the probability that a run of one variant scores higher than one of another, or of the baseline.

    Returns:
        setting, first, second, n (seeds that both have), probability (of the first), low, high; NaN of fewer than
        three seeds.
    """
    lines = []
    for setting, here in rows.groupby("setting", sort=False):
        for first, second in pairs(here, variants, baseline):
            x, y = paired(here, first, second)
            found = probability_of_improvement(x, y) if len(x) >= MIN_RUNS_FOR_INTERVAL else NONE
            names = {"setting": setting, "first": first, "second": second, "n": len(x)}
            lines.append({**names, "probability": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(lines)


def profiles(rows: pd.DataFrame) -> pd.DataFrame:
    """Performance profiles (Agarwal et al. 2021): the share of a variant's runs that score above each level.

    Returns:
        setting, variant, n, level (over the range of the setting's scores), share, low, high (Wilson's interval of
        each share by itself).
    """
    lines = []
    known = rows.dropna(subset="score")
    lowest, highest = known.groupby("setting")["score"].min(), known.groupby("setting")["score"].max()
    for setting, variant, here in _groups(known):
        n, levels = len(here), np.linspace(lowest[setting], highest[setting], _PROFILE_POINTS)
        hits = (here["score"].to_numpy()[:, None] > levels).sum(axis=0).tolist()
        of_hits = {hit: share_interval(hit, n)._asdict() for hit in set(hits)}
        names = {"setting": setting, "variant": variant, "n": n}
        lines += [{**names, "level": at, **of_hits[hit]} for at, hit in zip(levels, hits, strict=True)]
    return pd.DataFrame(lines).rename(columns={"value": "share"})


def collapses(sweep: Sweep) -> pd.DataFrame:
    """Whether the training reward of runs that are over collapsed.

    It did where the reward at the end is below the cold start's by more than 0.05, or below half of the run's own peak
    (if that is positive), both averaged over a tenth of the run's steps; the cold start's is the mean over the
    setting's first rollout batches, before anything is learned.

    Returns:
        setting, variant, seed, run, status, cold_start, peak, final, collapsed; one row per run that has steps.
    """
    reward = Metric("runs", "reward/mean")
    smooth = histories(sweep, reward, sweep.axis)
    firsts = raw_histories(sweep, reward, sweep.axis).groupby("run").head(1)
    start = firsts.groupby("setting")["y"].mean()
    names = ["setting", "variant", "seed", "run", "status"]
    found = smooth.groupby(names, sort=False)["y"].agg(peak="max", final="last").reset_index()
    found.insert(len(names), "cold_start", found["setting"].map(start).astype(float))
    below = found["final"] < found["cold_start"] - COLLAPSE_MARGIN
    lost = (found["peak"] > 0) & (found["final"] < COLLAPSE_SHARE * found["peak"])
    return found.assign(collapsed=below | lost)


def stability(sweep: Sweep) -> pd.DataFrame:
    """How many runs of every variant went wrong: diverged (a number was not finite), failed (an error) or collapsed.

    Returns:
        setting, variant, runs (over), diverged, failed, collapsed (finished, but see :func:`collapses`), missing (not
        over), share (of runs that went wrong), low, high (Wilson's interval).
    """
    found = collapses(sweep)
    collapsed = set(found.loc[found["collapsed"] & (found["status"] == "done"), "run"])
    lines: list[dict[str, Any]] = []
    for variant, setting, cells in sweep.groups(sweep.cells[sweep.cells["status"] != "skipped"]):
        kinds = cells["status"].where(~cells["run"].isin(collapsed), "collapsed").value_counts()
        wrong = {kind: int(kinds.get(kind, 0)) for kind in ("diverged", "failed", "collapsed")}
        runs = int(kinds.get("done", 0)) + sum(wrong.values())
        share = share_interval(sum(wrong.values()), runs)
        names = {"setting": setting, "variant": variant, "runs": runs}
        interval = {"share": share.value, "low": share.low, "high": share.high}
        lines.append({**names, **wrong, "missing": len(cells) - runs, **interval})
    return pd.DataFrame(lines)


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """One setting after the other."""
    for setting, here in rows.groupby("setting", sort=False):
        for variant, own in here.groupby("variant", sort=False):
            yield str(setting), str(variant), own


def _means(strata: Sequence[pd.DataFrame]) -> dict[str, float]:
    values = [part["score"].to_numpy(dtype=float) for part in strata]
    found: dict[str, float] = {}
    for name, one in {"mean": mean_interval(values), "iqm": interquartile_interval(values)}.items():
        found |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return found
