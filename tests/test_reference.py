"""What is committed under results/ supports what the README says of it."""

import pandas as pd
import pytest
import yaml

from harness.config import compose
from harness.entries import conf_dir
from harness.runs import load_cells, load_evaluations, load_runs
from harness.runs.trials import best_trials, trial_scores

_RESULTS = conf_dir().parent / "results"
_ALGORITHMS = ("ppo", "grpo", "grpo_routing_replay", "gspo")


@pytest.fixture(scope="module")
def steps() -> pd.DataFrame:
    """The steps of the reference runs that lie inside the budget."""
    runs = load_runs(_RESULTS / "reference")
    return runs[runs["budget/flops"] <= runs["budget_limit"]]


@pytest.mark.parametrize("name", _ALGORITHMS)
def test_the_search_tried_what_each_algorithm_declares(name):
    preset = yaml.safe_load((conf_dir() / "experiment" / "learning_rate_search.yaml").read_text(encoding="utf-8"))
    tried = preset["hydra"]["sweeper"]["params"]["algorithm.optimizer.learning_rate"]
    declared = compose([f"algorithm={name}", "model=tiny_moe"]).algorithm.search_space["optimizer.learning_rate"]
    assert [float(value) for value in tried.split(",")] == declared


@pytest.mark.parametrize("name", _ALGORITHMS)
def test_learning_rates_are_the_best_of_the_recorded_search(name):
    runs = load_runs(_RESULTS / "reference_search").dropna(subset="step")
    runs = runs[(runs["algorithm"] == name) & (runs["budget/flops"] <= runs["budget_limit"])]
    configs = load_cells(_RESULTS / "reference_search").set_index("run")["learning_rate"]
    runs["rate"] = runs["run"].map(configs)
    area = runs.groupby(["rate", "model", "run"])["reward/mean"].mean().groupby(["rate", "model"]).mean()
    best = area.groupby("rate").mean().idxmax()
    assert compose([f"algorithm={name}", "model=tiny_moe"]).algorithm.optimizer.learning_rate == best


def test_every_cell_of_the_reference_is_there():
    cells = load_cells(_RESULTS / "reference")
    counts = cells.groupby(["algorithm", "model"])["status"].value_counts()
    assert len(cells) == 40
    assert counts["grpo_routing_replay", "tiny_dense", "skipped"] == 5
    finished = cells[cells["status"] != "skipped"]
    assert set(finished["status"]) <= {"done", "diverged"}
    assert len(finished) == 35


def test_both_models_improve_on_their_cold_start_with_at_least_one_algorithm():
    rows = load_evaluations(_RESULTS / "reference")
    rows = rows[rows["eval_task"] == "chain_sum_held_out"]
    means = rows.groupby(["model", "algorithm", "fraction"])["score"].mean()
    for model in ("tiny_dense", "tiny_moe"):
        gains = means[model].xs(1.0, level="fraction") - means[model].xs(0.0, level="fraction")
        assert gains.max() > 0.05


def test_gspo_clips_over_thirty_times_the_tokens_that_grpo_clips(steps):
    means = steps.groupby(["model", "algorithm"])["clip_fraction/token"].mean()
    for model in ("tiny_dense", "tiny_moe"):
        assert means[model, "gspo"] > 30 * means[model, "grpo"]


def test_experts_change_without_replay_and_not_inside_a_replayed_update(steps):
    means = steps[steps["model"] == "tiny_moe"].groupby("algorithm").mean(numeric_only=True)
    without = means.drop("grpo_routing_replay")
    assert (without["moe/update_expert_change_fraction"] > 0.025).all()
    assert (without["moe/update_token_change_fraction"] > 0.25).all()
    assert means.loc["grpo_routing_replay", "moe/used_expert_change_fraction"] == 0
    pd.testing.assert_series_equal(
        without["moe/used_expert_change_fraction"], without["moe/expert_change_fraction"], check_names=False
    )


def test_all_runs_end_within_one_step_of_the_same_budget():
    cells = load_cells(_RESULTS / "reference")
    done = cells[cells["status"] == "done"]
    assert done["budget_limit"].nunique() == 1
    runs = load_runs(_RESULTS / "reference").dropna(subset="step")
    last_step = runs.groupby("run")["budget/flops"].apply(lambda spent: spent.diff().max())
    for _, cell in done.iterrows():
        assert 0 <= cell["overshoot"] * cell["budget_limit"] <= last_step[cell["run"]]


def test_the_tuned_comparison_is_all_there_and_was_tuned_alike():
    cells, trials = load_cells(_RESULTS / "tuned"), trial_scores(_RESULTS / "tuned" / "trials")
    assert len(cells) == 64 and cells["status"].value_counts().to_dict() == {"done": 56, "skipped": 8}
    ran = trials[trials["status"] != "skipped"]
    assert set(ran.groupby(["algorithm", "model"])["trial"].nunique()) == {5}
    assert set(ran["seed"]) == {1000, 1001} and set(ran["seed"]).isdisjoint(cells["seed"])
    best = best_trials(trials).merge(ran, on=["algorithm", "model", "task", "trial"])
    chosen = {
        (row.algorithm, row.model): row.settings["algorithm.optimizer.learning_rate"] for row in best.itertuples()
    }
    compared = cells[cells["status"] == "done"]
    assert all(chosen[cell.algorithm, cell.model] == cell.learning_rate for cell in compared.itertuples())


@pytest.mark.parametrize(("sweep", "gain"), [("all_algorithms", "0.082"), ("reinforce_moe", "0.075")])
def test_reinforce_is_ahead_of_grpo_by_what_the_readme_says(sweep, gain):
    rows = load_evaluations(_RESULTS / sweep)
    final = rows[(rows["fraction"] == 1) & (rows["eval_task"] == "chain_sum_held_out")]
    scores = final.pivot(index="seed", columns="algorithm", values="score")
    assert len(scores) == 8
    difference = scores["reinforce"] - scores["grpo"]
    assert f"{difference.mean():.3f}" == gain and (difference > 0).all()
    assert gain in (_RESULTS.parent / "README.md").read_text(encoding="utf-8")


def test_greedy_scores_on_the_mixture_are_what_the_readme_says():
    means = pd.read_csv(_RESULTS / "reinforce_moe" / "greedy.csv").groupby("algorithm")["accuracy"].mean()
    readme = " ".join((_RESULTS.parent / "README.md").read_text(encoding="utf-8").split())
    start = "the cold start has {cold start:.3f}, GSPO {gspo:.3f}, GRPO {grpo:.3f}, "
    assert (start + "DAPO {dapo:.3f} and REINFORCE {reinforce:.3f}").format(**means) in readme
