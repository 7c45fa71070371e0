import numpy as np
import pandas as pd
import pytest

from harness.analysis.aggregates import OVERALL, collapses, improvements, profiles, stability, summary
from harness.analysis.intervals import interquartile_interval, mean_interval, share_interval
from harness.analysis.scores import Metric, scores
from harness.analysis.sweep import Sweep
from tests.analysis.toy import Run, toy_sweep

HELD_OUT = Metric("evaluations", "held_out")
A, B = [0.83, 0.87, 0.91, 0.79, 0.85], [0.80, 0.88, 0.84, 0.77, 0.82]
C, D = [0.62, 0.55, 0.71, 0.66, 0.58], [0.60, 0.50, 0.64, 0.68, 0.57]


def ended(variant: str, values: list[float], setting: str = "tiny", **others: str) -> list[Run]:
    return [Run(variant, seed, [value], [10], setting=setting, **others) for seed, value in enumerate(values)]


def one(frame: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_every_variant_has_its_means_by_setting_and_over_all() -> None:
    runs = [*ended("a", A), *ended("b", B), *ended("a", C, "large"), *ended("b", D, "large"), *ended("c", C, "large")]
    runs += [*ended("d", A), *ended("d", D[:-1], "large")]
    found = summary(scores(toy_sweep(runs), HELD_OUT))
    a = one(found, setting="tiny", variant="a")
    assert (a["n"], a["worst"], a["missing"], a["worst_seed"], a["worst_score"]) == (5, 0, 0, 3, 0.79)
    mean = mean_interval([np.array(A)])
    assert (a["mean"], a["mean_low"], a["mean_high"]) == pytest.approx(mean)
    both = one(found, setting=OVERALL, variant="a")
    assert (both["n"], both["iqm"]) == (10, pytest.approx(interquartile_interval([np.array(A + C)]).value))
    assert np.isnan([both["iqm_low"], both["iqm_high"]]).all()
    assert OVERALL not in set(found.loc[found["variant"] == "c", "setting"])  # `c` was not run in both
    assert OVERALL not in set(found.loc[found["variant"] == "d", "setting"])  # nor `d` as often in both


def test_a_run_that_diverged_counts_and_one_that_is_not_over_is_missing() -> None:
    runs = [*ended("a", A), Run("b", 0, [0.1, 0.9, 0.8]), Run("b", 1, status="diverged"), Run("b", 2, status="running")]
    found = one(summary(scores(toy_sweep(runs), HELD_OUT)), variant="b")
    assert (found["n"], found["worst"], found["missing"], found["worst_seed"]) == (2, 1, 1, 1)
    assert found["mean"] == pytest.approx((0.8 + 0.1) / 2) and np.isnan(found["mean_low"])


def test_the_chance_of_a_better_run_is_said_of_every_pair() -> None:
    rows = scores(toy_sweep([*ended("a", A), *ended("b", B), *ended("c", [0.1, 0.2])]), HELD_OUT)
    found = improvements(rows, ["a", "b", "c"])
    assert found[["first", "second", "n"]].to_numpy().tolist() == [["a", "b", 5], ["a", "c", 2], ["b", "c", 2]]
    assert found.loc[0, "probability"] == pytest.approx(0.68)  # as rliable's probability_of_improvement
    assert found.loc[0, "low"] < 0.5 < found.loc[0, "high"]
    assert found.loc[1:, "probability"].isna().all()  # two seeds


def test_profiles_are_the_share_of_runs_above_each_level() -> None:
    rows = scores(toy_sweep([*ended("a", A), *ended("b", [0.0, 1.0])]), HELD_OUT)
    found = profiles(rows)
    a = found[found["variant"] == "a"].set_index(found.loc[found["variant"] == "a", "level"].round(4))
    assert a.loc[[0.8, 0.85, 0.9], "share"].tolist() == [0.8, 0.4, 0.2]  # as rliable's create_performance_profile
    assert (a.loc[0.8, "low"], a.loc[0.8, "high"]) == pytest.approx(share_interval(4, 5)[1:])
    b = found.loc[found["variant"] == "b", ["level", "share"]]
    assert (b["share"].iloc[0], b["share"].iloc[-1], len(b)) == (0.5, 0.0, 101)


def test_a_run_collapses_below_its_cold_start_or_half_of_its_peak() -> None:
    found = collapses(toy_sweep([
        Run("rises", 0, rewards=[0.4, 0.6, 0.8]), Run("dips", 0, rewards=[0.4, 0.6, 0.36]),
        Run("falls", 0, rewards=[0.4, 0.6, 0.34]), Run("halved", 0, rewards=[0.4, 0.9, 0.44]),
        Run("negative", 0, rewards=[-0.8, -0.5, -0.5], setting="other"),
    ])).set_index("variant")  # fmt: skip
    assert found["cold_start"].loc[["rises", "negative"]].tolist() == pytest.approx([0.4, -0.8])
    assert found[["peak", "final"]].loc["halved"].tolist() == [0.9, 0.44]
    assert found["collapsed"].to_dict() == {
        "rises": False, "dips": False, "falls": True, "halved": True, "negative": False,
    }  # fmt: skip


def test_stability_counts_what_went_wrong_once_and_leaves_out_what_is_not_over() -> None:
    falling = [0.4, 0.6, 0.1]
    found = one(stability(toy_sweep([
        Run("a", 0, rewards=[0.4, 0.6]), Run("a", 1, rewards=falling), Run("a", 2, rewards=falling, status="diverged"),
        Run("a", 3, status="failed"), Run("a", 4, rewards=falling, status="running"), Run("a", 5, status="planned"),
        Run("a", 6, status="skipped"),
    ])))  # fmt: skip
    counted = found[["runs", "diverged", "failed", "collapsed", "missing"]].tolist()
    assert counted == [4, 1, 1, 1, 2]
    assert (found["share"], found["low"], found["high"]) == pytest.approx(share_interval(3, 4))


def test_a_sweep_on_disk_has_every_frame(sweep: Sweep) -> None:
    rows = scores(sweep, HELD_OUT)
    ppo = one(summary(rows), setting="tiny_dense", variant="ppo")
    assert (ppo["n"], ppo["worst"]) == (3, 1)
    assert one(stability(sweep), setting="tiny_moe", variant="ppo")["diverged"] == 1
    assert one(stability(sweep), setting="tiny_moe", variant="gspo")["missing"] == 1
    assert len(profiles(rows)) == 101 * 7 and len(improvements(rows, sweep.variants)) == 3 + 6
