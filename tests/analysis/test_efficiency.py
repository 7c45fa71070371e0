import numpy as np
import pytest

from harness.analysis.efficiency import (
    axis_findings,
    default_targets,
    equal_budgets,
    run_times,
    time_to_target,
    winners,
)
from harness.analysis.scores import Metric
from harness.analysis.sweep import Sweep
from tests.analysis.toy import Run, toy_sweep

HELD_OUT = Metric("evaluations", "held_out")
JITTER = [0.0, 0.002, -0.002, 0.003, -0.003, 0.001]


def crossing(slow_tokens: float) -> Sweep:
    """At equal FLOPs `dear` is better; each of its FLOPs costs tokens, so that it may not be at equal tokens."""
    runs = []
    for seed, by in enumerate(JITTER):
        runs.append(Run("dear", seed, [0.2, 0.5 + by, 0.8 - by], tokens=slow_tokens))
        runs.append(Run("cheap", seed, [0.2, 0.65 - by, 0.7 + by]))
    return toy_sweep(runs)


def test_the_winner_may_change_with_the_axis() -> None:
    found = equal_budgets(crossing(slow_tokens=2), HELD_OUT)
    assert [one.axis for one in found] == ["flops", "tokens"]
    flops, tokens = found
    assert (flops.budgets, tokens.budgets) == ({"tiny": 10.0}, {"tiny": 10.0})
    assert [one.verdicts[0].outcome for one in found] == ["better", "worse"]
    assert tokens.verdicts[0].difference == pytest.approx(0.5 - 0.7, abs=2e-3)  # of 10 tokens, 5 FLOPs for `dear`
    table = winners(found)
    assert table["highest"].tolist() == ["dear", "cheap"]
    assert table["unbeaten"].tolist() == [["dear"], ["cheap"]]
    assert tokens.means[["axis", "budget"]].to_numpy().tolist() == [["tokens", 10.0]] * 2
    (said,) = axis_findings(found)
    assert said == (
        "On tiny, the highest mean changes with the axis: it is dear's at equal flops; cheap's at equal tokens. "
        "By verdict: dear is better than cheap at equal flops, and worse at equal tokens."
    )


def test_or_stay_the_same() -> None:
    (said,) = axis_findings(equal_budgets(crossing(slow_tokens=1), HELD_OUT))
    assert said == (
        "On tiny, dear has the highest mean at equal flops, tokens; by verdict it alone is unbeaten at equal flops, "
        "tokens."
    )


def test_too_few_seeds_have_no_winner_on_any_axis() -> None:
    few = toy_sweep([Run(name, seed, [0.2, 0.5, end]) for name, end in (("a", 0.8), ("b", 0.6)) for seed in range(3)])
    (said,) = axis_findings(equal_budgets(few, HELD_OUT))
    assert said == (
        "On tiny, whether who is in front changes with the axis of the budget is open: there are too few runs to "
        "compare all with all at equal flops, tokens."
    )
    assert axis_findings(equal_budgets(toy_sweep([Run("a", 0, [0.2, 0.5, 0.6])]), HELD_OUT)) == []


def test_the_time_to_a_target_is_interpolated_and_infinite_where_it_is_missed() -> None:
    sweep = toy_sweep([
        Run("a", 0, [0.2, 0.6, 0.9]), Run("a", 1, [0.2, 0.4, 0.4]), Run("a", 2, [0.5, 0.2, 0.9]),
        Run("a", 3, [0.2, 0.8], status="diverged"), Run("a", 4, status="failed"),
        Run("a", 5, [0.2, 0.9], status="interrupted"), Run("b", 0, [0.2, 0.3, 0.6], spent=[0, 10, 12]),
    ])  # fmt: skip
    times = run_times(sweep, HELD_OUT, "flops", {"tiny": [0.5]})
    by_run = dict(zip(times["variant"] + times["seed"].astype(str), times["time"], strict=True))
    # 3/4 of the way to 5 FLOPs; never; from the start; before it diverged; never; past the 10 FLOPs of the others.
    assert by_run == pytest.approx({"a0": 3.75, "a1": np.inf, "a2": 0.0, "a3": 2.5, "a4": np.inf, "b0": np.inf})


def test_the_median_time_keeps_what_was_not_reached() -> None:
    curves = [[0.0, 0.5, 1.0], [0.0, 0.4, 0.8], [0.0, 0.3, 0.6], [0.0, 0.2, 0.4], [0.0, 0.1, 0.2]]
    sweep = toy_sweep([Run("a", seed, curve) for seed, curve in enumerate(curves)])
    found = time_to_target(run_times(sweep, HELD_OUT, "flops", {"tiny": [0.6, 0.5]}))
    first, second = found.to_dict("records")
    assert (first["n"], first["target"], first["reached"]) == (5, 0.6, pytest.approx(0.6))
    assert (first["median"], first["low"], first["high"]) == pytest.approx((10.0, 6.0, np.inf))
    assert second["median"] == pytest.approx(10 * 0.5 / 0.6)
    none = time_to_target(run_times(sweep, HELD_OUT, "flops", {"tiny": [2.0]})).iloc[0]
    assert (none["median"], none["low"], none["high"], none["reached"]) == (np.inf, np.inf, np.inf, 0)


def test_targets_lie_between_the_cold_start_and_the_best_variants_mean() -> None:
    sweep = toy_sweep([
        Run("a", 0, [0.2, 0.5, 0.9]), Run("a", 1, [0.2, 0.5, 0.7]), Run("b", 0, [0.2, 0.5, 0.6]),
        Run("b", 1, [0.2, 1.0], status="diverged"), Run("b", 0, [0.2, 1.0], status="failed", setting="other"),
    ])  # fmt: skip
    assert default_targets(sweep, HELD_OUT) == {"tiny": pytest.approx([0.5, 0.65, 0.74])}


@pytest.mark.parametrize(("end", "gained"), [(0.1, False), (0.21, False), (0.23, True)])
def test_where_nothing_is_gained_there_is_no_target(end: float, gained: bool) -> None:
    sweep = toy_sweep([Run(name, seed, [0.2, 0.15, end]) for name in "ab" for seed in range(3)])
    assert bool(default_targets(sweep, HELD_OUT)) == gained
    assert run_times(sweep, HELD_OUT, "flops", {}).empty


def test_without_an_evaluation_of_the_cold_start_there_is_no_way_from_it() -> None:
    sweep = toy_sweep([Run("a", seed, [0.2, 0.5, 0.8], [1, 5, 10], rewards=[0.2, 0.8]) for seed in range(3)])
    assert default_targets(sweep, HELD_OUT) == {}
    assert default_targets(sweep, Metric("runs", "reward/mean"), [0.5]) == {"tiny": pytest.approx([0.5])}


def test_a_setting_without_a_finished_run_has_no_equal_budget() -> None:
    finished = [Run(name, seed, [0.2, 0.5, 0.8]) for name in "ab" for seed in range(4)]
    lost = [Run(name, seed, [0.2], status="diverged", setting="large") for name in "ab" for seed in range(4)]
    assert set(winners(equal_budgets(toy_sweep([*finished, *lost]), HELD_OUT))["setting"]) == {"tiny"}
    assert equal_budgets(toy_sweep(lost), HELD_OUT) == []


def test_it_is_not_always_the_highest_mean_that_alone_is_unbeaten() -> None:
    better = [Run("a", seed, [0.2, 0.5, 0.6 + by]) for seed, by in enumerate(JITTER)]
    worse = [Run("b", seed, [0.2, 0.5, 0.5 + by]) for seed, by in enumerate(reversed(JITTER))]
    unpaired = [Run("b", seed, [0.2, 0.5, 0.9]) for seed in range(6, 12)]
    (said,) = axis_findings(equal_budgets(toy_sweep([*better, *worse, *unpaired]), HELD_OUT))
    assert said == (
        "On tiny, b has the highest mean at equal flops, tokens; by verdict a alone is unbeaten at equal flops, tokens."
    )


def test_a_sweep_on_disk_is_compared_on_every_axis_of_its_steps(sweep: Sweep) -> None:
    reward = Metric("runs", "reward/mean")
    found = equal_budgets(sweep, reward)
    assert {one.axis for one in found} == {"flops", "device_seconds", "tokens", "queries", "updates"}
    assert all(verdict.outcome == "too few" for one in found for verdict in one.verdicts)  # three seeds
    assert len(axis_findings(found)) == 2
