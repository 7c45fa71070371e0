"""The tables of a comparison: numbers as CSV, words as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.decisions import MARGIN
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
from harness.analysis.scores import headline_metric, scores
from harness.analysis.statistics import Estimate, estimate, mean_over_steps
from harness.analysis.style import unit
from harness.analysis.sweep import Sweep, columns_of
from harness.analysis.verdicts import Verdict, verdicts

_STEPS = {"steps a run": "{:.0f}"}
_INTERVAL = "low and high: 95 % bootstrap interval of the mean over seeds, where n is 3 or more"


@dataclass(frozen=True)
class Table:
    """A frame of numbers with what a reader must know about it.

    `formats` maps columns to format strings for display; the CSV keeps every digit.
    """

    name: str
    title: str
    note: str
    frame: pd.DataFrame
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def header(self) -> list[str]:
        """Column names."""
        return [str(column) for column in self.frame]

    @property
    def rows(self) -> list[list[str]]:
        """Cells as they are displayed; a value that is absent is a dash."""
        records = self.frame.to_dict("records")
        return [[_text(record[name], self.formats.get(str(name), "{:.3g}")) for name in record] for record in records]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [pd.api.types.is_numeric_dtype(self.frame[column]) for column in self.frame]

    def markdown(self) -> str:
        """A pipe table in which no cell's text acts as markup."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in lines)

    def save(self, folder: Path) -> None:
        """Write NAME.csv and NAME.md."""
        self.frame.to_csv(folder / f"{self.name}.csv", index=False, lineterminator="\n")
        (folder / f"{self.name}.md").write_text(f"{self.markdown()}\n{self.note}\n", encoding="utf-8")


def all_tables(sweep: Sweep) -> list[Table]:
    """Every table that the sweep has data for, in the order of the report."""
    functions: list[Callable[[Sweep], Table]] = [
        verdict_table, final_scores, rewards, budgets, phases, clip_fractions, expert_changes, learning_rate_search,
        completion,
    ]  # fmt: skip
    return [table for function in functions if len((table := function(sweep)).frame)]


def score_overview(sweep: Sweep) -> Table:
    """Final scores as one line per model and evaluation, one column per variant."""
    scores = final_scores(sweep).frame
    rows = []
    for (setting, task), group in scores.groupby(["model", "evaluation"], sort=False) if len(scores) else ():
        row = {"model": setting, "evaluation": task, "cold start": group["cold start"].mean()}
        by_variant = group.set_index("algorithm")
        for variant in sweep.variants:
            row[variant] = _score(by_variant.loc[variant]) if variant in by_variant.index else "–"
        rows.append(row)
    note = (
        "Mean score at the end of the budget over n finished runs, with its 95 % bootstrap interval over seeds where "
        "n is 3 or more. Where intervals overlap, these runs do not tell the algorithms apart."
    )  # fmt: skip
    return Table("overview", "Final scores", note, pd.DataFrame(rows), {"cold start": "{:.3f}"})


def headline_verdicts(sweep: Sweep) -> list[Verdict]:
    """Of every pair in every setting, on the headline metric at the end of the budget."""
    metric = headline_metric(sweep)
    if metric is None:
        return []
    return verdicts(scores(sweep, metric), metric, sweep.variants)


def verdict_table(sweep: Sweep) -> Table:
    """Who is better, pair by pair, and what would settle what is open."""
    found = headline_verdicts(sweep)
    rows = [
        {
            "model": one.setting, "first": one.first, "second": one.second, "first is": one.outcome,
            "difference": one.difference, "low": one.low, "high": one.high, "pairs": one.n, "p (Holm)": one.p_holm,
            "further seeds": "over 1,000" if one.further_seeds is None else str(one.further_seeds),
        }
        for one in found
    ]  # fmt: skip
    note = (
        f"{found[0].metric if found else 'Score'}: first minus second on equal seeds, with the 95 % t interval of "
        "the mean difference, which is not corrected for many comparisons; p of the paired t test, after Holm for all "
        f"pairs of a model. Better or worse: p at most 0.05 and not within ±{MARGIN}. Equivalent: the interval lies "
        f"within ±{MARGIN}. Too few: so few pairs decide nothing. Further seeds: those that would decide it with a "
        "probability of 80 %, were difference and spread as measured. Runs that diverged or failed count as the worst."
    )
    formats = dict.fromkeys(("difference", "low", "high"), "{:+.3f}")
    return Table("verdicts", "Verdicts", note, pd.DataFrame(rows), formats)


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
    limit = unit(sweep.axis, sweep.limit).text(sweep.limit)
    note = (
        f"Equal axis: {sweep.axis}, limit {limit}. Means over finished runs, to the last step; overshoot is a fraction "
        "of the limit, and what lies past the limit is not compared."
    )  # fmt: skip
    formats = {"overshoot": "{:.2%}", "largest overshoot": "{:.2%}", "device_seconds": "{:.1f}"}
    formats |= dict.fromkeys(("tokens", "queries", "updates"), "{:,.0f}")
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
    note = "Share of what a run spent, mean over finished runs; a dash is a phase that cost nothing."
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


def completion(sweep: Sweep) -> Table:
    """Status and reason of every cell."""
    columns = {"variant": "algorithm", "setting": "model", "seed": "seed", "status": "status", "reason": "reason"}
    frame = sweep.cells[[*columns, "run"]].rename(columns=columns)
    return Table("completion", "Cells", "Every cell of the sweep, none left out.", frame, {"seed": "{:.0f}"})


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


def _text(value: Any, template: str) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(value)
    if isinstance(value, Real):
        number = float(value)
        if np.isneginf(number):
            return "diverged"
        return "–" if np.isnan(number) else template.format(value)
    return "–" if value is None or value == "" else str(value)


def markdown_text(text: str) -> str:
    """Text of a run's making (a reason, a name) as text in Markdown, and in the HTML that Markdown may hold."""
    for mark, harmless in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(mark, harmless)
    return " ".join(text.split())
