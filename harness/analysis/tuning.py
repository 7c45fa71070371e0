"""How the algorithms of a sweep were tuned: every trial, what was chosen, and how much the choice decides."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator

from harness.analysis.decisions import MARGIN
from harness.analysis.panels import legend, panels, title
from harness.analysis.style import Drawing, highlights_note, looks, unit
from harness.analysis.sweep import Sweep, columns_of
from harness.analysis.table import Table
from harness.runs.trials import TRIALS, best_trials, searched, trial_scores

_KEYS = ["algorithm", "setting", "trial"]
_OF_RUN = [*_KEYS, "seed", "score", "chosen", "status"]


@lru_cache(maxsize=1)
def trial_runs(sweep: Sweep) -> pd.DataFrame:
    """The runs of the sweep's trials, without those that were skipped; no rows where nothing was tuned.

    Returns:
        The columns of :func:`harness.runs.trials.trial_scores`, and setting, and chosen (whether the comparison took
        this trial's settings).
    """
    folders = _folders(sweep)
    if not folders:
        return pd.DataFrame(columns=[*_KEYS, "seed", "status", "run", "score", "settings", "chosen"])
    runs = pd.concat([_with_choice(trial_scores(folder)) for folder in folders], ignore_index=True)
    settings = sweep.cells[["model", "task", "setting"]].drop_duplicates()
    runs = runs.merge(settings, on=["model", "task"])
    spent = f"spent/{sweep.axis}"
    if spent not in runs:  # none of them came to a step
        runs[spent] = 0.0
    here = runs["algorithm"].isin(sweep.cells["algorithm"])
    return runs[here & (runs["status"] != "skipped")].reset_index(drop=True)


def tuning_trials(sweep: Sweep) -> Table:
    """Every trial of every algorithm: its settings, what it came to and what it cost."""
    rows = []
    costs = columns_of(trial_runs(sweep), "spent/")
    for (algorithm, setting, _), runs in _trials(sweep):
        settings = {key.rpartition(".")[2]: value for key, value in runs["settings"].iloc[0].items()}
        rows.append(
            {"algorithm": algorithm, "model": setting, **settings, "runs": len(runs)}
            | {"score": runs["score"].mean(skipna=False), "chosen": "chosen" if runs["chosen"].all() else ""}
            | {"lowest": runs["score"].min(), "highest": runs["score"].max()}
            | {axis: runs[column].sum() for column, axis in costs.items()}
        )
    note = (
        "Score: mean of reward/mean over the steps within a trial's budget, then over its seeds, none of which the "
        "comparison uses; a run that diverged or failed counts as the worst. Chosen: the highest score, whose settings "
        "the comparison took. Spent: by all runs of the trial together."
    )
    formats = {"device_seconds": "{:.0f}", **dict.fromkeys(("tokens", "queries", "updates"), "{:,.0f}")}
    return Table("tuning_trials", "Tuning: the trials", note, pd.DataFrame(rows), formats)


def tuning_sensitivity(sweep: Sweep) -> Table:
    """How robust each algorithm is to its settings: a result of its own."""
    rows = []
    for (algorithm, setting), runs in trial_runs(sweep).groupby(["algorithm", "setting"], sort=False):
        scores = runs.groupby("trial")["score"].apply(lambda values: values.mean(skipna=False)).dropna()
        if scores.empty:
            continue
        best, finite = scores.max(), scores[np.isfinite(scores)]
        rows.append(
            {"algorithm": algorithm, "model": setting, "trials": len(scores), "best": best}
            | {"median": scores.median(), "worst": scores.min(), "within margin": int((scores >= best - MARGIN).sum())}
            | {"went wrong": len(scores) - len(finite)}
        )
    note = (
        f"Over the trials' scores. Within margin: trials that score within {MARGIN} of the best one; the more, the "
        "less depends on tuning. Went wrong: trials with a run that diverged or failed. The search spaces are the "
        "algorithms' own; where they differ in width, so does this."
    )
    return Table("tuning_sensitivity", "Tuning: sensitivity", note, pd.DataFrame(_in_order(sweep, rows)))


def sensitivity(sweep: Sweep) -> Drawing | None:
    """Score against each setting that was searched, by algorithm."""
    points = _points(sweep)
    if points.empty:
        return None
    keys, settings = list(points["key"].unique()), [name for name in sweep.settings if name in set(points["setting"])]
    figure, axes = panels(len(settings), [2.9] * len(keys))
    look = looks(sweep)
    algorithms = [name for name in dict.fromkeys(sweep.cells["algorithm"]) if name in set(points["algorithm"])]
    styles = {name: next(look[v] for v in sweep.variants if _is(sweep, v, name)) for name in algorithms}
    for row, key in enumerate(keys):
        for column, setting in enumerate(settings):
            panel = axes[row, column]
            for name, own in points[(points["key"] == key) & (points["setting"] == setting)].groupby("algorithm"):
                style = styles[str(name)]
                dashes = {"dashes": style.dashes} if style.dashes else {}
                means = own.groupby("value")["score"].mean()
                if style.faint:
                    panel.plot(means.index, means, color=style.color, linewidth=0.8, zorder=1)
                    continue
                panel.plot(means.index, means, color=style.color, **dashes)
                panel.plot(own["value"], own["score"], ".", color=style.color, alpha=0.45, markersize=5)
                chosen = means[means.index.isin(own.loc[own["chosen"], "value"])]
                panel.plot(
                    chosen.index, chosen, "o", markersize=7 + 3 * (algorithms.index(str(name)) % 4),
                    markerfacecolor="none", markeredgecolor=style.color, markeredgewidth=1.4,
                )  # fmt: skip
                lost = own.loc[np.isneginf(own["score"]), "value"]
                panel.plot(lost, [0.03] * len(lost), "x", color=style.color, transform=panel.get_xaxis_transform())
            values = sorted(set(points.loc[points["key"] == key, "value"]))
            panel.set_xscale("log" if values[0] > 0 else "linear")
            panel.set_xticks(values, [f"{value:g}" for value in values])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set(title=title(setting), xlabel=key.replace("_", " ").capitalize())
        axes[row, 0].set_ylabel("Mean training reward")
    legend(figure, styles, algorithms)
    seeds = sorted(set(points["seed"].astype(int)))
    spent = trial_runs(sweep)[f"spent/{sweep.axis}"].max()
    lost = np.isneginf(points["score"])
    caption = (
        f"Mean training reward over each trial's budget ({unit(sweep.axis, spent).text(spent)} at most) against the "
        f"setting that was searched.{highlights_note(sweep)} Dots: single runs, seeds {', '.join(map(str, seeds))}, "
        "which no comparison uses; lines: their mean, without interval; rings, of several sizes to be told apart: the "
        f"trial that the comparison took{'; ×: a run that diverged or failed' if lost.any() else ''}."
    )
    return Drawing("sensitivity", "Sensitivity to tuning", caption, figure, points)


def tuning_summary(sweep: Sweep) -> tuple[bool, str]:
    """Whether all algorithms were tuned alike, and in words: how, or that they were not."""
    runs = trial_runs(sweep)
    if runs.empty and _folders(sweep):
        return False, "the trials of this sweep are all of cells that are not shown or were skipped"
    if runs.empty:
        return False, "not tuned in this sweep: settings are those of the entries, or of the command that started it"
    ran = sweep.cells[sweep.cells["status"] != "skipped"]
    expected = set(zip(ran["algorithm"], ran["setting"], strict=True))
    trials = runs.groupby(["algorithm", "setting"])["trial"].nunique()
    seeds = [sorted(set(own.astype(int))) for _, own in runs.groupby(["algorithm", "setting"])["seed"]]
    missing = sorted(" on ".join(pair) for pair in expected - set(trials.index))
    counts = ", ".join(f"{' on '.join(pair)} {count}" for pair, count in zip(trials.index, trials, strict=True))
    if missing:
        return False, f"not tuned alike: trials of {counts}; none of {', '.join(missing)}"
    if trials.nunique() > 1:
        return False, f"not tuned alike: trials of {counts}"
    if any(own != seeds[0] for own in seeds):
        return False, f"not tuned alike: trials of {counts}, not on the same seeds"
    strangers = _with_other_settings(ran, runs)
    if strangers:
        return False, f"not tuned alike: {', '.join(strangers)} ran with other settings than those of the best trials"
    axis = f"spent/{sweep.axis}"
    spent = unit(sweep.axis, runs[axis].max()).text(runs[axis].mean())
    return True, (
        f"{trials.iloc[0]} trials of each algorithm on each model, seeds {', '.join(map(str, seeds[0]))}, "
        f"{spent} ({sweep.axis}) a run on average; the best by mean training reward{_at_edges(sweep)}"
    )


def tuning_sentence(sweep: Sweep) -> str:
    """For the reader of a verdict: how the settings came about that it compares."""
    alike, how = tuning_summary(sweep)
    return f"Tuned alike: {how}." if alike else f"{how[0].upper()}{how[1:]}."


def _at_edges(sweep: Sweep) -> str:
    """Whose choice is the smallest or largest of at least three values, so that a better one may lie beyond it."""
    found: dict[str, list[str]] = {}
    where: Any
    for where, own in _points(sweep).groupby(["key", "setting", "algorithm"], sort=False):
        key, setting, algorithm = where
        chosen = set(own.loc[own["chosen"], "value"])
        for end, value in (("smallest", own["value"].min()), ("largest", own["value"].max())):
            if own["value"].nunique() > 2 and value in chosen:
                found.setdefault(f"the {end} {key.replace('_', ' ')}", []).append(f"{algorithm} on {setting}")
    said = "; ".join(f"{end} that was tried is the best of {', '.join(names)}" for end, names in found.items())
    return f"; a better setting may lie beyond what was tried: {said}" if said else ""


def _with_other_settings(cells: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Labels of the cells that have not what was chosen for them; an untuned sweep may have been there before."""
    chosen = runs[runs["chosen"]].drop_duplicates(["algorithm", "setting"]).set_index(["algorithm", "setting"])
    return [
        cell["label"]
        for cell in cells.to_dict("records")
        if (where := (cell["algorithm"], cell["setting"])) in chosen.index
        and searched(cell["config"]) != chosen.at[where, "settings"]
    ]


def _folders(sweep: Sweep) -> list[Path]:
    return [path / TRIALS for path in sweep.paths if (path / TRIALS).is_dir()]


def _with_choice(runs: pd.DataFrame) -> pd.DataFrame:
    keys = ["algorithm", "model", "task", "trial"]
    best = best_trials(runs).query("score > -inf")  # of trials that all went wrong the comparison took none
    chosen = runs.merge(best[keys].assign(chosen=True), how="left", on=keys)["chosen"]
    return runs.assign(chosen=chosen.eq(True).to_numpy())


def _trials(sweep: Sweep) -> list[tuple[tuple[str, str, int], pd.DataFrame]]:
    groups: list[Any] = list(trial_runs(sweep).groupby(_KEYS))
    return sorted(groups, key=lambda group: (*_place(sweep, group[0][0], group[0][1]), group[0][2]))


def _in_order(sweep: Sweep, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return sorted(rows, key=lambda row: _place(sweep, str(row["algorithm"]), str(row["model"])))


def _place(sweep: Sweep, algorithm: str, setting: str) -> tuple[int, int]:
    algorithms = list(dict.fromkeys(sweep.cells["algorithm"]))
    return sweep.settings.index(setting), algorithms.index(algorithm)


def _is(sweep: Sweep, variant: str, algorithm: str) -> bool:
    return bool((sweep.cells.loc[sweep.cells["variant"] == variant, "algorithm"] == algorithm).any())


def _points(sweep: Sweep) -> pd.DataFrame:
    """One row per run of a trial and numeric setting that has several values: key, algorithm, setting, value, score."""
    rows = [
        {"key": key.rpartition(".")[2], "value": value} | {name: run[name] for name in _OF_RUN}
        for run in trial_runs(sweep).to_dict("records")
        for key, value in run["settings"].items()
        if isinstance(value, int | float)
    ]
    points = pd.DataFrame(rows, columns=["key", "value", *_OF_RUN])
    several = points.groupby("key")["value"].transform("nunique") > 1
    return points[several & points["score"].notna()].reset_index(drop=True)
