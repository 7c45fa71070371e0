"""The tables of a comparison: numbers as CSV, words as Markdown."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.claims import claims_table
from harness.analysis.decisions import MARGIN
from harness.analysis.evidence import headline_verdicts
from harness.analysis.evidence_tables import (
    equal_budget_means,
    equal_budget_winners,
    probabilities_of_improvement,
    scaling,
    score_summary,
    stabilities,
    times_to_target,
)
from harness.analysis.fairness import algorithm_differences
from harness.analysis.figures import (
    CLIP_FRACTION,
    EXPERT_CHANGE,
    REWARD,
    STEP_REWARD,
    TRUE_REWARD,
    UPDATE_EXPERT_CHANGE,
    UPDATE_TOKEN_CHANGE,
    USED_EXPERT_CHANGE,
    has_reward_errors,
)
from harness.analysis.phases import phase_costs
from harness.analysis.statistics import Estimate, estimate, mean_over_steps
from harness.analysis.style import budget_text, highlighted, unit
from harness.analysis.sweep import Sweep, columns_of, stopped_at
from harness.analysis.table import Table
from harness.analysis.tuning import tuning_sensitivity, tuning_trials
from harness.analysis.verdicts import Verdict

_SAMPLES = 2  # at each evaluation point that is shown
_STEPS = {"steps a run": "{:.0f}"}
_INTERVAL = "low and high: 95 % bootstrap interval of the mean over seeds, where n is 3 or more"


def all_tables(sweep: Sweep) -> list[Table]:
    """Every table that the sweep has data for, in the order of the report."""
    functions: list[Callable[[Sweep], Table]] = [
        verdict_table, claims_table, score_summary, probabilities_of_improvement, equal_budget_winners,
        equal_budget_means, times_to_target, stabilities, scaling,
        final_scores, rewards, budgets, phases, clip_fractions, expert_changes,
        tuning_trials, tuning_sensitivity, learning_rate_search,
        completion_grid, completion, algorithm_differences, samples,
    ]  # fmt: skip
    return [table for function in functions if len((table := function(sweep)).frame)]


def score_overview(sweep: Sweep) -> Table:
    """Final scores as one line per model and variant, below that of the cold start, one column per evaluation.

    Of more algorithms than figures have colours for, in the order of the first evaluation's means.
    """
    scores = final_scores(sweep).frame
    rows = []
    for setting, group in scores.groupby("model", sort=False) if len(scores) else ():
        start = group.groupby("evaluation")["cold start"].mean().dropna()
        rows.append({"model": setting, "algorithm": "cold start", **start.map("{:.3f}".format)})
        variants = sweep.variants
        if len(highlighted(sweep)) < len(variants):
            first = group[group["evaluation"] == group["evaluation"].iloc[0]].set_index("algorithm")["mean"].dropna()
            variants = sorted(variants, key=lambda name: -first.get(name, -np.inf))
        for variant in variants:
            own = group[group["algorithm"] == variant].to_dict("records")
            rows.append({"model": setting, "algorithm": variant} | {row["evaluation"]: _score(row) for row in own})
    note = (
        "Mean score at the end of the budget over n finished runs, with its 95 % bootstrap interval over seeds where "
        "n is 3 or more. Whether two algorithms differ is for the verdicts to say, which compare the runs of each seed."
    )
    return Table("overview", "Final scores", note, pd.DataFrame(rows))


def verdict_table(sweep: Sweep) -> Table:
    """Who is better, pair by pair, and what would settle what is open."""
    found = headline_verdicts(sweep)
    if sweep.baseline:  # all against one: a ranking
        found = sorted(found, key=lambda one: (sweep.settings.index(one.setting), -np.nan_to_num(one.difference)))
    rows = [
        {
            "model": one.setting, "first": one.first, "first is": one.outcome, "second": one.second,
            "difference": one.difference, "low": one.low, "high": one.high, "pairs": one.n,
            **({"went wrong": one.worst} if any(other.worst for other in found) else {}),
            "p (Holm)": one.p_holm,
            "further seeds": "over 1,000" if one.further_seeds is None else one.further_seeds,
        }
        for one in found
    ]  # fmt: skip
    note = (
        f"{found[0].metric if found else 'Score'}: first minus second on equal seeds, with the 95 % t interval of "
        "the mean difference, which is not corrected for many comparisons; p of the paired t test, after Holm for the "
        f"pairs of a model that stand here. {_decided(found)} Too few: so few pairs decide nothing. Further seeds: "
        "those that would decide it with a probability of 80 %, were difference and spread as measured. Runs of "
        "the two that diverged or failed (went wrong, where there are any) count as the worst; where these meet each "
        "other alone, it is undecided."
    )
    if sweep.limits:
        note += f" At an equal budget of {sweep.axis}: {budget_text(sweep)}."
    formats = dict.fromkeys(("difference", "low", "high"), "{:+.3f}")
    frame = pd.DataFrame(rows)
    undecidable = _undecidable(found)
    part = frame[~frame["model"].isin(undecidable)] if undecidable else None
    return Table("verdicts", "Verdicts", note, frame, formats, part, list(undecidable.values()))


def _undecidable(found: list[Verdict]) -> dict[str, str]:
    """The models on which all pairs have too few runs, and what stands in the place of their lines."""
    by_model = {one.setting: [other for other in found if other.setting == one.setting] for one in found}
    return {
        model: f"{model}: all pairs of algorithms ({len(here)}) are left out here, for a verdict takes {here[0].least} "
        f"pairs of runs, and none has more than {max(one.n for one in here)}; the CSV has their differences."
        for model, here in by_model.items()
        if all(one.outcome == "too few" for one in here)
    }


def _decided(found: list[Verdict]) -> str:
    margin = found[0].margin if found else MARGIN
    if not margin:
        return "Better or worse: more or less of it, with p at most 0.05; it is no score for which a margin is known."
    return (
        f"Better or worse: p at most 0.05 and not within ±{margin:g}. Equivalent: the interval lies within ±{margin:g}."
    )


def final_scores(sweep: Sweep) -> Table:
    """Per (variant, setting, lm-eval task): the score at the end of the budget, beside the cold start's."""
    start = sweep.evaluations[sweep.evaluations["fraction"] == 0]
    cold = start.groupby(["setting", "eval_task"])["score"].mean()
    rows: list[dict[str, Any]] = []
    for variant, setting, cells in sweep.groups(sweep.cells):
        done = sweep.finished(cells)
        for column, task in columns_of(cells, "score/").items():
            if not done[column].notna().any():
                continue
            cold_start, found = cold.get((setting, task), np.nan), estimate(done[column])
            rows.append(
                {"algorithm": variant, "model": setting, "evaluation": task, **_columns(found)}
                | {"cold start": cold_start, "change": found.mean - cold_start}
                | {"problems": done[f"n/{task}"].max(), "standard error of one": done[f"stderr/{task}"].mean()}
            )
    tasks = list(dict.fromkeys(row["evaluation"] for row in rows))
    rows.sort(key=lambda row: (sweep.settings.index(row["model"]), tasks.index(row["evaluation"])))
    three = dict.fromkeys(("mean", "low", "high", "cold start", "standard error of one"), "{:.3f}")
    note = f"Finished runs only; {_INTERVAL}. All answer the same problems, whose choice the interval leaves out."
    return Table(
        "final_scores",
        "Final scores in full",
        note,
        pd.DataFrame(rows),
        {**three, "change": "{:+.3f}", "problems": "{:.0f}"},
    )


def rewards(sweep: Sweep) -> Table:
    """The true reward beside what differs from it: the reward that was trained on, and that of intermediate steps."""
    names = {TRUE_REWARD: "true reward", REWARD: "training reward", STEP_REWARD: "intermediate steps"}
    told = has_reward_errors(sweep) or STEP_REWARD in sweep.runs
    note = (
        "True reward: the verifier's, of the final answer. Training reward: the same with the reward model's errors. "
        "Intermediate steps: the mean reward of those that the problems have. Means over steps of a run, then over "
        f"finished runs; {_INTERVAL}, here of the true reward."
    )  # fmt: skip
    return Table("reward", "Rewards", note, _means_of_metrics(sweep, names) if told else pd.DataFrame(), _STEPS)


def budgets(sweep: Sweep) -> Table:
    """What was spent on every axis, mean over the finished runs."""
    axes = columns_of(sweep.cells, "spent/")
    rows = []
    for variant, setting, cells in sweep.groups(sweep.finished(sweep.cells)):
        spent = {axis: cells[name].mean() for name, axis in axes.items()}
        overshoot = {"overshoot": cells["overshoot"].mean(), "largest overshoot": cells["overshoot"].max()}
        rows.append({"algorithm": variant, "model": setting, "n": len(cells), **spent, **overshoot})
    axis, size = stopped_at(sweep.cells)
    limit = unit(axis, size).text(size)
    note = (
        f"Equal axis: {axis}, limit {limit}. Means over finished runs, to the last step; overshoot is a fraction "
        "of the limit, and what lies past the limit is not compared."
    )  # fmt: skip
    formats = {"overshoot": "{:.2%}", "largest overshoot": "{:.2%}", "device_seconds": "{:.1f}"}
    formats |= dict.fromkeys(("tokens", "queries", "updates"), "{:,.0f}") | {"flops": "{:.2e}"}
    return Table("budget", "Budget spent", note, pd.DataFrame(rows), formats)


def phases(sweep: Sweep) -> Table:
    """Each phase's share of the FLOPs and the device-seconds."""
    costs = phase_costs(sweep)
    wide: dict[tuple[str, str], dict[str, Any]] = {}
    for row in costs.to_dict("records"):
        line = wide.setdefault((row["variant"], row["setting"]), {"algorithm": row["variant"], "model": row["setting"]})
        line[f"{row['cost']} {row['phase']}"] = row["share"]
    frame = pd.DataFrame(list(wide.values()))
    frame = frame[sorted(frame, key=lambda name: (name not in ("algorithm", "model"), str(name).split()[0]))]
    formats = {str(column): "{:.1%}" for column in frame}
    note = "Share of what the finished runs spent together; a dash is a phase that cost nothing."
    return Table("budget_by_phase", "Budget by phase", note, frame, formats)


def clip_fractions(sweep: Sweep) -> Table:
    """Mean clip fractions, and how many times the smallest of the same setting they are."""
    names = {CLIP_FRACTION: "token", "clip_fraction/low": "below the band", "clip_fraction/high": "above the band"}
    names |= {"clip_fraction/sequence": "sequence"}
    frame = _means_of_metrics(sweep, names)
    if len(frame):
        smallest = frame.groupby("model")["token"].transform("min")
        frame["times the smallest"] = (frame["token"] / smallest).where(smallest > 0)
        zero = sweep.finished(sweep.runs).groupby(["variant", "setting"])[CLIP_FRACTION].apply(lambda x: x.eq(0).mean())
        frame["steps at 0"] = [zero[key] for key in zip(frame["algorithm"], frame["model"], strict=True)]
    note = (
        "Clipped tokens over valid tokens (sequence: sequences with one), as mean over steps, then over finished runs; "
        f"{_INTERVAL}. The last columns: the mean over the smallest mean on that model, and the share of steps without "
        "any clipped token."
    )  # fmt: skip
    formats = {**_STEPS, "times the smallest": "{:.1f}", "steps at 0": "{:.0%}"}
    return Table("clip_fraction", "Clip fraction", note, frame, formats)


def expert_changes(sweep: Sweep) -> Table:
    """Expert choices that an update changes, on mixture-of-experts models."""
    names = {UPDATE_EXPERT_CHANGE: "choices changed", UPDATE_TOKEN_CHANGE: "tokens with a change"}
    names |= {EXPERT_CHANGE: "choices, mean of its steps", USED_EXPERT_CHANGE: "used in its steps"}
    note = (
        "Fractions of what the rollout's policy did not choose, after the last optimizer step on each rollout batch; "
        "then as mean over its optimizer steps, of all choices and of those that the update used, which replay holds "
        f"fixed. Means over rollout batches, then over finished runs; {_INTERVAL}."
    )
    return Table("expert_change", "Expert change per update", note, _means_of_metrics(sweep, names), _STEPS)


def learning_rate_search(sweep: Sweep) -> Table:
    """Mean reward within the budget by learning rate, where the sweep searched one."""
    cells = sweep.cells.dropna(subset=["learning_rate"])
    cells = cells[cells["status"] != "skipped"]
    tried = cells.groupby(["algorithm", "setting"])["learning_rate"].nunique()
    note = (
        "Mean of reward/mean over the steps within the budget, then over seeds, by model (and task); average is over "
        "these. A failed or diverged run counts as the worst, so that its rate cannot win; a dash: not all runs are "
        "finished."
    )  # fmt: skip
    if not (tried > 1).any():
        return Table("learning_rate_search", "Learning-rate search", note, pd.DataFrame())
    reward = mean_over_steps(sweep.runs, REWARD) if REWARD in sweep.runs else pd.Series(dtype=float)
    value = cells["run"].map(reward).where(cells["status"] == "done")
    value = value.mask(cells["status"].isin(["failed", "diverged"]), -np.inf)
    # skipna=False: a rate whose runs are not all there has no mean yet. A model that was skipped is not waited for.
    means = value.groupby([cells["algorithm"], cells["learning_rate"], cells["setting"]], sort=False).mean(skipna=False)
    table = means.unstack("setting")
    table["average"] = means.groupby(level=["algorithm", "learning_rate"]).mean(skipna=False)
    best = table["average"].groupby(level="algorithm").transform("max")
    table["best"] = np.where(np.isfinite(best) & (table["average"] == best), "best", "")
    table.insert(0, "runs", cells.groupby(["algorithm", "learning_rate"]).size())
    order = {name: place for place, name in enumerate(dict.fromkeys(sweep.cells["algorithm"]))}
    frame = table.reset_index()
    frame = frame.assign(order=frame["algorithm"].map(order)).sort_values(["order", "learning_rate"])
    frame = frame.drop(columns="order").rename_axis(columns=None)
    return Table("learning_rate_search", "Learning-rate search", note, frame)


def search_sentences(sweep: Sweep) -> list[str]:
    """What a learning-rate search was for; nothing where there was none, or no rate has all its runs."""
    found = learning_rate_search(sweep).frame
    if found.empty:
        return []
    best = found[found["best"] != ""]
    rates = best["learning_rate"].map("{:g}".format).groupby(best["algorithm"], sort=False).apply(" and ".join)
    listed = ", ".join(f"{rate} for {algorithm}" for algorithm, rate in rates.items())
    return [f"The best learning rates by mean training reward: {listed}."] if listed else []


def completion(sweep: Sweep) -> Table:
    """Status and reason of every cell."""
    columns = {"variant": "algorithm", "setting": "model", "seed": "seed", "status": "status", "reason": "reason"}
    frame = sweep.cells[[*columns, "run"]].rename(columns=columns)
    return Table("completion", "Cells", "Every cell of the sweep, none left out.", frame, {"seed": "{:.0f}"})


def completion_grid(sweep: Sweep) -> Table:
    """Status of every cell, one line per algorithm and model, one column per seed; below it the reasons in words."""
    seeds = sorted({int(seed) for seed in sweep.cells["seed"].dropna()})
    rows = []
    for variant, setting, cells in sweep.groups(sweep.cells):
        status = dict(zip(cells["seed"], cells["status"], strict=True))
        by_seed = {f"seed {seed}": status.get(seed) for seed in seeds}
        rows.append({"algorithm": variant, "model": setting, **by_seed})
    note = "Every cell of the sweep, none left out. Done: it reached the budget's limit. A dash: it is not in the plan."
    return Table("completion_grid", "Completion", note, pd.DataFrame(rows), remarks=_reasons(sweep))


def samples(sweep: Sweep) -> Table:
    """A few completions of each variant's first run in each setting: at the first, middle and last evaluation point."""
    columns = {"variant": "algorithm", "setting": "model", "fraction": "budget"}
    columns |= {name: name for name in ("prompt", "completion", "answer", "reward")}
    shown = []
    for _, _, rows in sweep.groups(sweep.samples):
        one = rows[rows["run"] == rows["run"].iloc[0]]
        points = sorted(one["fraction"].unique())
        over_training = {points[0], points[(len(points) - 1) // 2], points[-1]}
        shown.append(one[one["fraction"].isin(over_training)].groupby("fraction").head(_SAMPLES))
    frame = pd.concat(shown)[[*columns]].rename(columns=columns) if shown else pd.DataFrame()
    note = (
        f"The first {_SAMPLES} completions kept at the first, the middle and the last evaluation point of one run "
        "each, as the model wrote them; neither chosen nor typical. Budget: the share that was spent by then."
    )
    return Table("samples", "Completions over training", note, frame, {"budget": "{:.0%}"})


def _reasons(sweep: Sweep) -> list[str]:
    """Why cells ended as they did; those that share status and reason are named together."""
    told = sweep.cells[sweep.cells["reason"].map(lambda reason: isinstance(reason, str) and bool(reason))]
    found = []
    for (status, reason), alike in told.groupby(["status", "reason"], sort=False):
        where = []
        for variant, setting, cells in sweep.groups(alike):
            seeds = ", ".join(f"{seed:.0f}" for seed in cells["seed"])
            where.append(f"{variant} on {setting} (seed{'s' if len(cells) > 1 else ''} {seeds})")
        found.append(f"{str(status).capitalize()}: {', '.join(where)}: {reason}")
    return found


def _means_of_metrics(sweep: Sweep, names: dict[str, str]) -> pd.DataFrame:
    """Per (variant, setting): n, steps a run, and the mean of each metric; the first one with its interval."""
    first, *others = [name for name in names if name in sweep.runs] or [""]
    if first not in names or first != next(iter(names)):
        return pd.DataFrame()
    rows = []
    done = sweep.finished(sweep.runs)
    for variant, setting, group in sweep.groups(done[done[first].notna()]):
        found = estimate(mean_over_steps(group, first))
        row = {"algorithm": variant, "model": setting, "n": found.n, "steps a run": len(group) / found.n}
        row |= {names[first]: found.mean, "low": found.low, "high": found.high}
        rows.append(row | {names[name]: mean_over_steps(group, name).mean() for name in others})
    return pd.DataFrame(rows)


def _columns(found: Estimate) -> dict[str, float]:
    return {"n": found.n, "mean": found.mean, "low": found.low, "high": found.high}


def _score(row: Any) -> str:
    interval = f" [{row['low']:.3f},\N{NO-BREAK SPACE}{row['high']:.3f}]" if np.isfinite(row["low"]) else ""
    return f"{row['mean']:.3f}{interval} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{row['n']})"
