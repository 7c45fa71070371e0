"""The figures of a comparison. Each function returns a drawing, or None where the sweep has nothing to draw in it."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.analysis.evidence_figures import equal_budget, pairwise, performance_profiles, scaling
from harness.analysis.panels import (
    draw_curve,
    drawn_points,
    legend,
    log_axis,
    panel_legend,
    panels,
    runs_note,
    title,
)
from harness.analysis.phases import budget_by_phase
from harness.analysis.statistics import Curve, curve, curve_at_points, mean_over_steps
from harness.analysis.style import Drawing, Unit, budget_text, looks, plain, unit
from harness.analysis.sweep import Sweep
from harness.analysis.tuning import sensitivity

REWARD, TRUE_REWARD, STEP_REWARD = "reward/mean", "reward/true_mean", "reward/step_mean"
CLIP_FRACTION = "clip_fraction/token"
EXPERT_CHANGE, USED_EXPERT_CHANGE = "moe/expert_change_fraction", "moe/used_expert_change_fraction"
UPDATE_EXPERT_CHANGE, UPDATE_TOKEN_CHANGE = "moe/update_expert_change_fraction", "moe/update_token_change_fraction"
_DYNAMICS = {"entropy": "Entropy (nats)", "grad_norm": "Gradient norm", "ratio/max": "Largest importance ratio"}


def all_figures(sweep: Sweep) -> list[Drawing]:
    """Every figure that the sweep has data for, in the order of the report. Call inside `figure_style()`."""
    functions: list[Callable[[Sweep], Drawing | None]] = [
        training_reward, true_reward, step_reward, downstream_accuracy, pairwise, equal_budget, performance_profiles,
        scaling, clip_fraction, expert_change, budget_by_phase, training_dynamics, sensitivity,
    ]  # fmt: skip
    return [drawing for function in functions if (drawing := function(sweep)) is not None]


def training_reward(sweep: Sweep) -> Drawing | None:
    """What the algorithms are trained on, against budget."""
    errors = ", with the reward model's errors" if has_reward_errors(sweep) else ""
    return _reward_curves(sweep, REWARD, "training_reward", "Training reward", f"reward of each rollout batch{errors}")


def true_reward(sweep: Sweep) -> Drawing | None:
    """What the verifier says of the same completions, where a reward model with errors says something else."""
    if not has_reward_errors(sweep):
        return None
    described = "reward of each rollout batch as the verifier gives it, without the reward model's errors"
    return _reward_curves(sweep, TRUE_REWARD, "true_reward", "True reward", described)


def step_reward(sweep: Sweep) -> Drawing | None:
    """Of the intermediate steps, for tasks that reward them."""
    described = "reward of the intermediate steps that the problems of each rollout batch have (0 where one is missing)"
    return _reward_curves(sweep, STEP_REWARD, "step_reward", "Reward of intermediate steps", described)


def has_reward_errors(sweep: Sweep) -> bool:
    """Whether any run was trained on another reward than the true one."""
    if TRUE_REWARD not in sweep.runs:
        return False
    return bool((sweep.runs[TRUE_REWARD] - sweep.runs[REWARD]).abs().gt(0).any())


def _reward_curves(sweep: Sweep, metric: str, name: str, what: str, described: str) -> Drawing | None:
    """One panel per setting."""
    curves = _curves(sweep, metric)
    if not curves:
        return None
    settings, budget = _settings(curves), _budget(sweep)
    figure, axes = panels(len(settings), [2.6])
    for column, setting in enumerate(settings):
        _draw(sweep, axes[0, column], curves, setting, budget)
        axes[0, column].set(title=title(setting), xlabel=budget.label)
    axes[0, 0].set_ylabel(what)
    legend(figure, looks(sweep), _variants(sweep, curves))
    caption = f"Mean {described}, at what was spent after it, {_until(sweep, budget)}, unsmoothed."
    data = drawn_points({metric: curves}, sweep.axis)
    return Drawing(name, what, f"{caption} {runs_note(sweep, curves)}", figure, data)


def downstream_accuracy(sweep: Sweep) -> Drawing | None:
    """Accuracy of the lm-eval tasks against budget, panels task x model."""
    rows, budget = sweep.evaluations, _budget(sweep)
    if rows.empty or f"budget/{sweep.axis}" not in rows:
        return None
    tasks = list(dict.fromkeys(rows["eval_task"]))
    by_task = {
        task: {
            (variant, setting): _accuracy(sweep, group, setting)
            for variant, setting, group in sweep.groups(rows[rows["eval_task"] == task])
        }
        for task in tasks
    }
    cold_start = rows[rows["fraction"] == 0].groupby(["eval_task", "setting"])["score"].agg(y="mean", n="size")
    settings = [setting for setting in sweep.settings if setting in set(rows["setting"])]
    alone = rows.groupby(["run", "eval_task"]).size().max() == 1  # points that no line joins
    marker = None if alone else "" if sweep.limits else "o"
    figure, axes = panels(len(settings), [2.2] * len(tasks))
    for row, task in enumerate(tasks):
        axes[row, 0].set_ylabel(f"{plain(task)}\naccuracy")
        for column, setting in enumerate(settings):
            level = cold_start["y"].get((task, setting), np.nan)
            axes[row, column].axhline(level, color="#888888", linewidth=0.8, linestyle=(0, (2, 2)))
            _draw(sweep, axes[row, column], by_task[task], setting, budget, marker=marker)
    for column, setting in enumerate(settings):
        axes[0, column].set_title(title(setting))
        axes[-1, column].set_xlabel(budget.label)
    first = by_task[tasks[0]]
    figure.align_ylabels()
    legend(figure, looks(sweep), _variants(sweep, first), markers=alone)
    errors = ", ".join(
        f"{error:.3f} ({task})" for task, error in rows.groupby("eval_task", sort=False)["stderr"].mean().items()
    )
    noise = (
        f"One score is over {rows['n'].median():.0f} problems, with a standard error of {errors}; they are the same "
        "for all, and their choice is not in the interval."
    )
    where = f"at fractions of the budget, the last within the limit of {budget.text(sweep.limit)}"
    if sweep.limits:
        where = f"interpolated between the evaluations of each run, {_until(sweep, budget)}"
    caption = (
        f"Accuracy of the policy in lm-eval tasks {where}. "
        f"{'Dashed grey: the cold start that all share. ' if len(cold_start) else ''}{runs_note(sweep, first)} {noise}"
    )
    levels = cold_start.rename_axis(["metric", "setting"]).reset_index().assign(axis=sweep.axis, line="cold start")
    data = pd.concat([drawn_points(by_task, sweep.axis), levels], ignore_index=True)
    return Drawing("downstream_accuracy", "Downstream accuracy", caption, figure, data)


def clip_fraction(sweep: Sweep) -> Drawing | None:
    """Clipped tokens over training on a log axis, with each variant's mean."""
    curves = {
        (variant, setting): curve_at_points(rows, f"budget/{sweep.axis}", CLIP_FRACTION, "step")
        for setting in sweep.settings
        for variant, rows in _rows(sweep, CLIP_FRACTION, setting).items()
    }
    if not curves:
        return None
    settings, budget = _settings(curves), _budget(sweep)
    look = looks(sweep)
    widest = [f"{variant}, mean 0.0012" for variant in _variants(sweep, curves) if not look[variant].faint]
    figure, axes = panels(len(settings), [2.5 + 0.18 * len(widest)], below=widest)
    zeros = []
    for column, setting in enumerate(settings):
        _draw(sweep, axes[0, column], curves, setting, budget, log=True, marker=".")
        axes[0, column].set(title=title(setting), xlabel=budget.label)
        labels = {}
        for variant, rows in _rows(sweep, CLIP_FRACTION, setting).items():
            mean = mean_over_steps(sweep.finished(rows), CLIP_FRACTION).mean()
            labels[variant] = variant if np.isnan(mean) else f"{variant}, mean {mean:.2g}"
            if (rows[CLIP_FRACTION] == 0).any() and not look[variant].faint:
                zeros.append(f"{(rows[CLIP_FRACTION] == 0).sum()} of {len(rows)} of {variant} on {setting}")
        panel_legend(axes[0, column], look, labels)
    log_axis(axes[0, 0], list(curves.values()))
    axes[0, 0].set_ylabel("Clipped tokens (fraction)")
    of = "" if len(widest) == len(_variants(sweep, curves)) else " of those in colour"
    said = (
        f"Steps{of} at exactly 0, in every mean, though a log axis cannot show them: {'; '.join(zeros)}."
        if zeros
        else f"No step{of} is at 0."
    )
    caption = (
        f"Fraction of tokens whose gradient the surrogate's clipping removes, over all optimizer steps of a rollout "
        f"batch, {_until(sweep, budget)}. In the legend: mean over steps, then over finished runs. {said} "
        f"{runs_note(sweep, curves)}"
    )
    return Drawing("clip_fraction", "Clip fraction", caption, figure, drawn_points({CLIP_FRACTION: curves}, sweep.axis))


def expert_change(sweep: Sweep) -> Drawing | None:
    """How far an update moves the experts' choices, and beside it the reward, on mixture-of-experts models."""
    native = _curves(sweep, UPDATE_EXPERT_CHANGE)
    if not native:
        return None
    settings, budget, look = _settings(native), _budget(sweep), looks(sweep)
    tokens, used = _curves(sweep, UPDATE_TOKEN_CHANGE), _curves(sweep, USED_EXPERT_CHANGE)
    reward = _curves(sweep, REWARD)
    figure, axes = panels(3, [2.6] * len(settings), sharey="none", width=3.0)
    replayed: dict[tuple[str, str], Curve] = {}
    fixed = []
    for row, setting in enumerate(settings):
        first, left, right = axes[row]
        _draw(sweep, first, tokens, setting, budget)
        _draw(sweep, left, native, setting, budget)
        for variant, rows in _rows(sweep, USED_EXPERT_CHANGE, setting).items():
            if np.allclose(rows[USED_EXPERT_CHANGE].fillna(0), rows[EXPERT_CHANGE].fillna(0)):
                continue  # what was used is what was chosen
            above = 4 + 9 * sum(where == setting for _, where in replayed)  # points; lines may lie over each other
            replayed[variant, setting] = used[variant, setting]
            draw_curve(left, used[variant, setting], look[variant], budget)
            mean = mean_over_steps(sweep.finished(rows), USED_EXPERT_CHANGE).mean()
            fixed.append(f"{variant} on {setting}, mean {mean:.2g}")
            left.annotate(
                f"{plain(variant)}: used in the update", xy=(0.98, rows[USED_EXPERT_CHANGE].mean()),
                xycoords=("axes fraction", "data"), xytext=(0, above), textcoords="offset points",
                ha="right", fontsize=7, color=look[variant].color,
            )  # fmt: skip
        _draw(sweep, right, reward, setting, budget)
        first.set(title=f"{title(setting)}: tokens", ylabel="Tokens with a changed\nexpert (fraction)")
        first.set_ylim(bottom=0)
        left.set(title=f"{title(setting)}: choices", ylabel="Changed choices (fraction)")
        left.set_ylim(bottom=-0.04 * left.get_ylim()[1])
        right.set(title=f"{title(setting)}: reward", ylabel="Training reward")
    for column in range(3):
        axes[-1, column].set_xlabel(budget.label)
    beside = {key: line for key, line in reward.items() if key[1] in settings}
    legend(figure, look, _variants(sweep, beside))
    unseen = [name for name in _variants(sweep, beside) if name not in _variants(sweep, native)]
    replay = f" What the optimizer steps used instead is drawn too, for {'; '.join(fixed)}." if fixed else ""
    alone = f", and of {', '.join(unseen)}, which makes no pass in which choices are recorded" if unseen else ""
    caption = (
        "Left: fraction of completion tokens for which the policy, after the last optimizer step on a rollout batch, "
        "chooses in any layer an expert that the rollout's policy did not choose. Middle: the fraction of all choices "
        f"that are such.{replay} Right: training "
        f"reward of the same runs{alone}. All {_until(sweep, budget)}. "
        f"{runs_note(sweep, native)}"
    )
    drawn = {UPDATE_TOKEN_CHANGE: tokens, UPDATE_EXPERT_CHANGE: native, USED_EXPERT_CHANGE: replayed, REWARD: beside}
    data = drawn_points(drawn, sweep.axis)
    return Drawing("expert_change", "Expert change per update, and reward", caption, figure, data)


def training_dynamics(sweep: Sweep) -> Drawing | None:
    """Entropy, gradient norm and largest importance ratio."""
    by_metric = {metric: found for metric in _DYNAMICS if (found := _curves(sweep, metric))}
    if not by_metric:
        return None
    first = next(iter(by_metric.values()))
    settings, budget = _settings(first), _budget(sweep)
    figure, axes = panels(len(settings), [2.1] * len(by_metric))
    for row, (metric, curves) in enumerate(by_metric.items()):
        log = metric != "entropy"
        axes[row, 0].set_ylabel(_DYNAMICS[metric])
        for column, setting in enumerate(settings):
            _draw(sweep, axes[row, column], curves, setting, budget, log=log)
        if log:
            log_axis(axes[row, 0], list(curves.values()))
            _plain_ticks(axes[row, 0].yaxis)
    for column, setting in enumerate(settings):
        axes[0, column].set_title(title(setting))
        axes[-1, column].set_xlabel(budget.label)
    figure.align_ylabels()
    legend(figure, looks(sweep), _variants(sweep, first))
    caption = (
        "Mean token entropy, norm of the policy's gradient before it is scaled down, and largest importance ratio at "
        f"the level at which each algorithm takes it, {_until(sweep, budget)}; norm and ratio on a log axis where they "
        "span more than a factor of two. "
        f"{runs_note(sweep, first)}"
    )
    return Drawing("training_dynamics", "Training dynamics", caption, figure, drawn_points(by_metric, sweep.axis))


def _accuracy(sweep: Sweep, rows: pd.DataFrame, setting: str) -> Curve:
    """Averaged at the points of evaluation, or at an equal budget where these lie at unequal ones."""
    spent = f"budget/{sweep.axis}"
    if setting in sweep.limits:
        return curve(rows, spent, "score", sweep.limits[setting])
    return curve_at_points(rows, spent, "score", "fraction")


def _rows(sweep: Sweep, metric: str, setting: str) -> dict[str, pd.DataFrame]:
    """The steps at which a metric was measured, by variant."""
    if metric not in sweep.runs:
        return {}
    measured = sweep.runs[sweep.runs[metric].notna() & (sweep.runs["setting"] == setting)]
    return {variant: rows for variant, _, rows in sweep.groups(measured)}


def _curves(sweep: Sweep, metric: str) -> dict[tuple[str, str], Curve]:
    return {
        (variant, setting): curve(rows, f"budget/{sweep.axis}", metric)
        for setting in sweep.settings
        for variant, rows in _rows(sweep, metric, setting).items()
    }


def _draw(
    sweep: Sweep,
    axes,
    curves: Mapping[tuple[str, str], Curve],
    setting: str,
    budget: Unit,
    *,
    log=False,
    marker: str | None = "",
) -> None:
    """The curves of one setting in one panel; marker None is each variant's own."""
    look = looks(sweep)
    for (variant, where), line in curves.items():
        if where == setting:
            own = look[variant].marker if marker is None else marker
            draw_curve(axes, line, look[variant], budget, log=log, marker=own)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.03 * axes.dataLim.x1))  # points close together have hardly a margin


def _settings(curves: Mapping[tuple[str, str], Curve]) -> list[str]:
    return list(dict.fromkeys(setting for _, setting in curves))


def _variants(sweep: Sweep, curves: Mapping[tuple[str, str], Curve]) -> list[str]:
    drawn = {variant for variant, _ in curves}
    return [variant for variant in sweep.variants if variant in drawn]


def _budget(sweep: Sweep) -> Unit:
    return unit(sweep.axis, sweep.limit)


def _until(sweep: Sweep, budget: Unit) -> str:
    if sweep.limits:
        return f"up to the largest budget that all finished runs of a model reached ({budget_text(sweep)})"
    return f"up to the limit of {budget.text(sweep.limit)} a run"


def _plain_ticks(axis) -> None:
    """1, 2, 5, 10 rather than powers on a log axis: these values stay within a decade or two."""
    if axis.get_scale() != "log":
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
