import numpy as np
import pandas as pd
import pytest

from harness.analysis.scores import Metric, axes, common_budget, counts, histories, paired, raw_histories, scores
from harness.analysis.sweep import Sweep
from tests.analysis.toy import Run, toy_sweep

HELD_OUT, REWARD = Metric("evaluations", "held_out"), Metric("runs", "reward/mean")


def score_of(rows: pd.DataFrame) -> dict[str, float]:
    return dict(zip(rows["variant"] + rows["seed"].astype(str), rows["score"], strict=True))


def test_the_score_is_the_last_one_and_the_worst_stands_for_what_went_wrong() -> None:
    sweep = toy_sweep([
        Run("a", 0, [0.5, 0.6, 0.8]),
        Run("a", 1, [0.5, 0.3, 0.7]),
        Run("b", 0, [0.5, 0.9], status="diverged"),
        Run("b", 1, status="failed"),
        Run("b", 2, [0.5, 0.1], status="interrupted"),
        Run("b", 3, status="planned"),
        Run("c", 0, status="skipped"),
        Run("b", 0, status="failed", setting="other"),
    ])  # fmt: skip
    rows = scores(sweep, HELD_OUT)
    here = rows[rows["setting"] == "tiny"]
    assert score_of(here) == pytest.approx(
        {"a0": 0.8, "a1": 0.7, "b0": 0.1, "b1": 0.1, "b2": np.nan, "b3": np.nan}, nan_ok=True
    )
    assert counts(here) == {"n": 4, "worst": 2, "missing": 2}
    assert rows.loc[rows["setting"] == "other", "score"].isna().all()  # nothing there was ever measured


def test_at_an_equal_budget_scores_are_interpolated_where_every_run_has_been() -> None:
    sweep = toy_sweep([
        Run("a", 0, [0.2, 0.6, 1.0], tokens=2), Run("b", 0, [0.2, 0.4, 0.8], tokens=1),
        Run("b", 1, [0.2, 0.9], tokens=1, status="interrupted"),
    ])  # fmt: skip
    assert axes(sweep, HELD_OUT) == ["flops", "tokens"]
    assert common_budget(histories(sweep, HELD_OUT, "tokens")) == {"tiny": 10.0}
    found = score_of(scores(sweep, HELD_OUT, "tokens"))  # `a` has spent its 10 tokens after 5 FLOPs
    assert (found["a0"], found["b0"]) == pytest.approx((0.6, 0.8))
    assert score_of(scores(sweep, HELD_OUT, "flops"))["a0"] == pytest.approx(1.0)


def test_what_was_not_measured_by_that_budget_has_no_score() -> None:
    only_at_the_end = [Run("a", 0, [0.8], [10], tokens=4), Run("b", 0, [0.7], [10], tokens=1)]
    found = score_of(scores(toy_sweep(only_at_the_end), HELD_OUT, "tokens"))
    assert np.isnan(found["a0"]) and found["b0"] == 0.7


def test_the_axis_that_ended_the_runs_comes_first_and_empty_ones_not_at_all(sweep: Sweep) -> None:
    assert axes(sweep, REWARD)[0] == "flops" and "tokens" in axes(sweep, REWARD)
    assert axes(sweep, HELD_OUT) == ["flops", "device_seconds"]  # all that the evaluations record


def test_the_area_is_the_mean_height_of_the_curve() -> None:
    area = Metric("evaluations", "held_out", "area")
    sweep = toy_sweep([Run("a", 0, [0.0, 0.8, 0.8]), Run("a", 1, [0.4, 0.4], spent=[5, 10])])
    found = score_of(scores(sweep, area))
    assert found == pytest.approx({"a0": (0.4 * 5 + 0.8 * 5) / 10, "a1": 0.4})
    assert area.label == "area under the curve of held_out" and REWARD.label == "training reward"


def test_the_final_reward_is_the_mean_over_the_last_tenth_of_the_steps() -> None:
    rewards = [0.1] * 18 + [0.4, 0.6]
    sweep = toy_sweep([Run("a", 0, rewards=rewards)])
    assert score_of(scores(sweep, REWARD)) == pytest.approx({"a0": 0.5})
    assert raw_histories(sweep, REWARD, "flops")["y"].tolist() == rewards
    assert histories(sweep, REWARD, "flops")["y"].tolist()[:2] == pytest.approx([0.1, 0.1])


def test_pairs_are_runs_of_one_seed() -> None:
    rows = scores(toy_sweep([
        Run("a", 2, [0.2], spent=[10]), Run("a", 0, [0.0], spent=[10]), Run("a", 1, [0.1], spent=[10]),
        Run("b", 0, [0.5], spent=[10]), Run("b", 2, [0.7], spent=[10]), Run("b", 3, [0.8], spent=[10]),
    ]), HELD_OUT)  # fmt: skip
    x, y = paired(rows, "b", "a")
    assert (x.tolist(), y.tolist()) == ([0.5, 0.7], [0.0, 0.2])
    assert [len(one) for one in paired(rows, "a", "absent")] == [0, 0]


def test_final_scores_are_those_that_runs_record(sweep: Sweep) -> None:
    rows = scores(sweep, Metric("evaluations", "held_out")).set_index("run")
    done = sweep.finished(sweep.cells).set_index("run")
    assert rows.loc[done.index, "score"].tolist() == pytest.approx(done["score/held_out"].tolist())
    assert "skipped" not in set(rows["status"])
