from dataclasses import replace

import pytest

from harness.analysis.evidence import (
    axis_sentences,
    headline_equal_budgets,
    headline_improvements,
    headline_label,
    headline_scaling_fits,
    headline_scores,
    headline_times,
    headline_verdicts,
    level_label,
)
from harness.analysis.sweep import Sweep
from tests.analysis.toy import Run, headlined, toy_sweep


def crossing() -> Sweep:
    """At equal FLOPs `dear` is better; each of its FLOPs costs two tokens, and at equal tokens it is worse."""
    jitter = [0.0, 0.002, -0.002, 0.003, -0.003, 0.001]
    runs = [Run("dear", seed, [0.2, 0.5 + by, 0.8 - by], tokens=2) for seed, by in enumerate(jitter)]
    runs += [Run("cheap", seed, [0.2, 0.65 - by, 0.7 + by]) for seed, by in enumerate(jitter)]
    return headlined(runs)


def test_the_report_says_when_the_winner_changes_with_the_axis() -> None:
    (said,) = axis_sentences(crossing())
    assert "the highest mean changes with the axis: it is dear's at equal flops; cheap's at equal tokens" in said


def test_what_is_dear_is_worked_out_once_for_each_sweep() -> None:
    sweep = crossing()
    first = headline_equal_budgets(sweep)
    assert headline_equal_budgets(sweep) is first
    alone = headlined([Run("dear", 0, [0.2, 0.5, 0.8])])
    assert [len(one.means) for one in headline_equal_budgets(alone)] == [1, 1]


def test_verdicts_are_against_the_baseline_where_there_is_one_and_equal_budgets_of_all() -> None:
    runs = [Run(name, seed, [0.2, 0.5, 0.5 + 0.01 * seed]) for name in "abc" for seed in range(3)]
    sweep = replace(headlined(runs), baseline="b")
    pairs = [("a", "b"), ("c", "b")]
    assert [(one.first, one.second) for one in headline_verdicts(sweep)] == pairs
    assert list(headline_improvements(sweep)[["first", "second"]].itertuples(index=False, name=None)) == pairs
    flops, _ = headline_equal_budgets(sweep)
    assert [(one.first, one.second) for one in flops.verdicts] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_target_is_one_of_the_curve_where_the_headline_is_the_area_below_it() -> None:
    runs = [Run("a", seed, [0.2, 0.4, 0.6]) for seed in range(5)]
    sweep = replace(headlined(runs), metric="area:held_out")
    assert (headline_label(sweep), level_label(sweep)) == ("area under the curve of held_out", "held_out")
    times = headline_times(sweep)
    assert times["target"].tolist() == pytest.approx([0.4, 0.5, 0.56])
    assert times["median"].tolist() == pytest.approx([5, 7.5, 9])


def test_scaling_is_fitted_to_the_headline_metric_and_to_the_reward() -> None:
    rewards = [0.1, 0.2, 0.3]
    sweep = headlined([Run("a", seed, [0.2, 0.5, 0.8], rewards=rewards) for seed in range(3)])
    assert [(fit.variant, fit.metric, fit.n) for fit in headline_scaling_fits(sweep)] == [
        ("a", "held_out", 3), ("a", "training reward", 3),
    ]  # fmt: skip


def test_before_anything_was_evaluated_there_is_nothing_to_say() -> None:
    sweep = toy_sweep([Run("a", 0, rewards=[0.1, 0.2])])
    assert headline_scores(sweep).empty and headline_times(sweep).empty and headline_improvements(sweep).empty
    assert headline_verdicts(sweep) == [] and headline_equal_budgets(sweep) == [] and axis_sentences(sweep) == []
    assert [fit.metric for fit in headline_scaling_fits(sweep)] == ["training reward"]
