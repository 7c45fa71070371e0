from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from harness.analysis.evidence import headline_scores, headline_verdicts
from harness.analysis.figures import downstream_accuracy, training_reward
from harness.analysis.scores import Metric, find_metric, headline_metric
from harness.analysis.style import budget_text, figure_style
from harness.analysis.sweep import Sweep, read_sweep
from harness.analysis.tables import budgets, final_scores, verdict_table
from harness.analysis.view import arguments, filtered, notes, on_axis, viewed
from harness.errors import ConfigError
from tests.analysis.synthetic import Cell, write_sweep
from tests.analysis.toy import Run, toy_sweep


@pytest.fixture
def two() -> Sweep:
    """A FLOP buys `a` two tokens and `b` one, so that an equal budget of 10 tokens is half of what `a` spent."""
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    cheap, dear = (
        Run("a", 0, [0.2, 0.5, 1.0], rewards=rewards, tokens=2),
        Run("b", 0, [0.2, 0.4, 0.8], rewards=rewards),
    )
    sweep = toy_sweep([cheap, dear, Run("b", 1, [0.2, 0.9], rewards=rewards[:2], status="interrupted")])
    steps = sweep.runs.assign(**{"budget/tokens": sweep.runs["budget/flops"] * (1 + (sweep.runs["variant"] == "a"))})
    cells = sweep.cells.assign(
        budget_axis="flops", budget_limit=10.0, algorithm=sweep.cells["variant"],
        **{"score/held_out": [1.0, 0.8, None]},
    )  # fmt: skip
    points = sweep.evaluations.assign(fraction=sweep.evaluations["budget/flops"] / 10, stderr=0.03, n=256)
    return replace(sweep, runs=steps, all_runs=steps, cells=cells, evaluations=points)


def test_on_another_axis_everything_is_at_what_all_finished_runs_reached(two: Sweep) -> None:
    turned = on_axis(two, "tokens")
    assert (turned.axis, turned.limits, turned.limit) == ("tokens", {"tiny": 10.0}, 10.0)
    assert turned.runs.groupby("run")["step"].max().to_dict() == {"a-tiny-s0": 5, "b-tiny-s0": 10, "b-tiny-s1": 2}
    assert turned.cells["score/held_out"].tolist()[:2] == [0.5, 0.8]
    assert turned.cells["score/held_out"].isna().tolist() == [False, False, True]
    assert headline_scores(turned)["score"].tolist()[:2] == [0.5, 0.8]
    reward = headline_scores(replace(turned, metric="reward/mean"))  # the mean of the last tenth is of one step here
    assert reward["score"].tolist()[:2] == pytest.approx([0.5, 1.0])


def test_on_another_axis_curves_end_there_and_say_so(two: Sweep) -> None:
    turned = on_axis(two, "tokens")
    with figure_style():
        reward, accuracy = training_reward(turned), downstream_accuracy(turned)
    assert reward is not None and accuracy is not None
    ends = reward.data.groupby("line")["x"].max()
    assert (ends["a-tiny-s0"], ends["b-tiny-s0"]) == (10.0, 10.0)
    last = accuracy.data[accuracy.data["line"] == "a-tiny-s0"].iloc[-1]
    assert (last["x"], last["y"]) == (10.0, 0.5)
    for caption in (reward.caption, accuracy.caption, verdict_table(turned).note):
        assert "10 on tiny" in caption
    assert "limit of" not in reward.caption + accuracy.caption


def test_a_curve_that_goes_on_is_cut_between_its_points(two: Sweep) -> None:
    turned = replace(on_axis(two, "tokens"), limits={"tiny": 5.0}, limit=5.0)
    with figure_style():
        drawing = downstream_accuracy(turned)
    assert drawing is not None
    points = drawing.data[drawing.data["line"] == "a-tiny-s0"]
    assert (points["x"].tolist(), points["y"].tolist()) == ([0, 5], pytest.approx([0.2, 0.35]))


def test_the_runs_own_axis_changes_nothing(sweep: Sweep) -> None:
    assert on_axis(sweep, "flops") is sweep
    assert notes(sweep) == [] and budget_text(sweep) == "1 TFLOP"


def test_an_axis_that_was_not_recorded_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="axis joules: .* recorded are flops, device_seconds"):
        on_axis(sweep, "joules")
    with pytest.raises(ConfigError, match="axis queries: .* not recorded with held_out; .* flops, device_seconds$"):
        viewed(sweep, axis="queries")
    by_queries = viewed(sweep, "reward/mean", "queries")
    assert by_queries.limits == {"tiny_dense": 1280, "tiny_moe": 1280}  # PPO's runs had spent eight times as much
    assert budgets(by_queries).note.startswith("Equal axis: flops, limit 1 TFLOP.")
    begun = read_sweep(write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_moe", 0, "interrupted", steps=10)]))
    with pytest.raises(ConfigError, match="no run has finished"):
        on_axis(begun, "tokens")


def test_a_metric_is_found_by_its_name(sweep: Sweep) -> None:
    assert find_metric(sweep, "signed") == Metric("evaluations", "signed")
    assert find_metric(sweep, "area:signed") == Metric("evaluations", "signed", "area")
    assert find_metric(sweep, "area:reward/mean") == Metric("runs", "reward/mean", "area")
    assert headline_metric(viewed(sweep, "grad_norm")) == Metric("runs", "grad_norm")
    for name in ("rewards", "budget/flops", "seed", "area:"):
        with pytest.raises(ConfigError, match=f"metric {name}: .* held_out, longer, signed, .*reward/mean"):
            viewed(sweep, name)


def test_with_a_baseline_all_are_compared_with_it_alone(sweep: Sweep) -> None:
    found = headline_verdicts(viewed(sweep, baseline="grpo"))
    assert {verdict.second for verdict in found} == {"grpo"}
    assert {verdict.setting: verdict.comparisons for verdict in found} == {"tiny_dense": 2, "tiny_moe": 3}
    with pytest.raises(ConfigError, match="baseline dapo: .* there are ppo, grpo, grpo_replay, gspo"):
        viewed(sweep, baseline="dapo")
    with pytest.raises(ConfigError, match="baseline grpo: .* there are ppo, gspo"):
        viewed(sweep, baseline="grpo", filters=["algorithm=ppo,gspo"])


@pytest.mark.parametrize(
    ("filters", "cells"),
    [
        (["algorithm=grpo,gspo"], 12),
        (["algorithm=grpo,gspo", "seed=0,2", "model=tiny_moe"], 4),
        (["variant=ppo"], 6),
        (["task=chain_sum"], 24),
        (["status=failed,diverged"], 2),
        (["algorithm.completions_per_prompt=1"], 6),
        (["algorithm.optimizer.learning_rate=3e-4"], 24),
        (["algorithm.critic.learning_rate=1e-3"], 6),
    ],
)
def test_filters_keep_cells_that_have_one_value_of_each(sweep: Sweep, filters: list[str], cells: int) -> None:
    found = filtered(sweep, filters)
    assert (len(found.cells), found.left_out) == (cells, 24 - cells)
    assert set(found.runs["run"]) | set(found.samples["run"]) | set(found.evaluations["run"]) <= set(found.cells["run"])
    assert found.variants == list(dict.fromkeys(found.cells["variant"]))


def test_a_variant_keeps_its_name_and_may_have_commas_in_it(tmp_path: Path) -> None:
    cells = [
        Cell("gspo", "tiny_dense", 0, learning_rate=rate, config={"rollout": {"temperature": warm}})
        for rate, warm in ((1e-4, 0.5), (1e-4, 1.0), (2e-4, 1.0))
    ]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    name = "gspo learning_rate=0.0001, temperature=0.5"
    assert filtered(found, [f'variant="{name}"']).variants == [name]
    assert len(filtered(found, ["rollout.temperature=1"]).variants) == 2


def test_a_filter_that_finds_nothing_says_what_there_is(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="filter algorithm=dapo: .* one of ppo, grpo, grpo_replay, gspo$"):
        filtered(sweep, ["algorithm=dapo"])
    with pytest.raises(ConfigError, match="filter algorithm=ppo,gpso: no cell has algorithm=gpso; .* ppo, grpo"):
        filtered(sweep, ["algorithm=ppo,gpso"])
    with pytest.raises(ConfigError, match="filter seed=1: no cell is left; seed is one of 0$"):
        filtered(sweep, ["seed=0", "seed=1"])
    with pytest.raises(ConfigError, match="filter status=failed: no cell is left; status is one of done"):
        filtered(sweep, ["status=done,skipped", "status=failed"])
    with pytest.raises(ConfigError, match="filter model: give KEY=VALUE"):
        filtered(sweep, ["model"])
    with pytest.raises(ConfigError, match="filter algoritm: .* algorithm, variant, model, task, seed, status"):
        filtered(sweep, ["algoritm=ppo"])


def test_scores_of_a_filtered_sweep_are_those_of_the_whole(sweep: Sweep) -> None:
    whole, part = (final_scores(one).frame for one in (sweep, filtered(sweep, ["algorithm=gspo"])))
    pd.testing.assert_frame_equal(whole[whole["algorithm"] == "gspo"].reset_index(drop=True), part)


def test_runs_whose_budget_no_rollout_batch_fits_are_named(sweep: Sweep) -> None:
    run = sweep.cells.loc[sweep.cells["label"] == "gspo-tiny_dense-chain_sum-s0", "run"].item()
    later = sweep.evaluations["step"].where(sweep.evaluations["run"] != run, 0)
    (said,) = notes(replace(sweep, evaluations=sweep.evaluations.assign(step=later)))
    assert "what is evaluated of gspo-tiny_dense-chain_sum-s0 is the cold start, not what was trained" in said
    only_before = sweep.evaluations[sweep.evaluations["fraction"] == 0]
    assert notes(replace(sweep, evaluations=only_before)) == []


def test_what_is_looked_at_is_said_and_can_be_asked_for_again(sweep: Sweep) -> None:
    found = viewed(sweep, "area:reward/mean", "queries", "grpo", ["algorithm=grpo,gspo", "seed=1"])
    said = " ".join(notes(found))
    assert "Filtered by algorithm=grpo,gspo and seed=1: 4 of 24 cells" in said
    assert "an equal budget of queries" in said and "ended at 1 TFLOP (flops)" in said
    assert "1.28 thousand on tiny_dense, 1.28 thousand on tiny_moe" in said
    assert "area under the curve of training reward: better means more of it" in said
    assert "the baseline grpo alone; at equal budgets all are compared with all" in said
    assert arguments(found)[1:] == [
        "--metric", "area:reward/mean", "--axis", "queries", "--baseline", "grpo",
        "--filter", "algorithm=grpo,gspo", "--filter", "seed=1",
    ]  # fmt: skip


def test_a_reward_is_said_to_be_a_mean_over_steps_where_verdicts_are_about_it(sweep: Sweep) -> None:
    smoothed = "training reward (mean over the tenth of a run's steps that ends there): better"
    assert smoothed in " ".join(notes(viewed(sweep, metric="reward/mean")))
    assert "held_out: better" in " ".join(notes(viewed(sweep, metric="held_out")))


def test_what_is_no_score_has_no_margin_and_what_one_alone_has_is_refused(sweep: Sweep) -> None:
    assert {verdict.margin for verdict in headline_verdicts(viewed(sweep, metric="reward/mean"))} == {0.02}
    about = viewed(sweep, metric="grad_norm")
    assert {verdict.margin for verdict in headline_verdicts(about)} == {0.0}
    assert "no score for which a margin is known" in verdict_table(about).note
    runs = sweep.all_runs.assign(**{"critic/loss": sweep.all_runs["step"].where(sweep.all_runs["variant"] == "ppo")})
    with pytest.raises(ConfigError, match="metric critic/loss: ppo alone has it"):
        viewed(replace(sweep, all_runs=runs), metric="critic/loss")
