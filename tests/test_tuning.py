"""Equal trials for every algorithm, and the best of them in the comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.config import TuningConfig, compose
from harness.errors import ConfigError, Declined, NothingToChoose
from harness.runs.directory import RunDirectory
from harness.runs.trials import best_trials, trial_scores
from harness.sweep.tuning import draw, trial_seeds
from tests.analysis import synthetic
from tests.tiny_run import PLAIN

_ROOT = Path(__file__).parents[1]
_RATES = [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]
_TWO_TRIALS = ["tuning.trials=2", 'tuning.overrides=["seed=1000","evaluation.fractions=[1.0]"]']


def _trials(folder, scores, seeds=(1000,)):
    """A folder of trials, one for each score and seed, of gspo on tiny_dense; NaN leaves the run unfinished."""
    cells = []
    for trial, score in enumerate(scores):
        for seed in seeds:
            cell = synthetic.trial("gspo", trial, _RATES[trial], seed, gain=score)
            if np.isneginf(score):
                cell.status, cell.gain, cell.steps = "diverged", 0.0, 10
            elif np.isnan(score):
                cell.status, cell.gain, cell.steps = "interrupted", 0.0, 10
            cells.append(cell)
    return synthetic.write_sweep(folder, cells)


def _compose(results, *overrides):
    return compose(["experiment=tuned", "algorithm=gspo", f"results={results}", *overrides])


def test_trials_are_drawn_from_the_declared_space_none_twice_and_always_the_same():
    algorithm = compose(["algorithm=gspo"]).algorithm
    drawn = [settings["algorithm.optimizer.learning_rate"] for settings in draw(algorithm, 4)]
    assert len(set(drawn)) == 4 and set(drawn) < set(algorithm.search_space["optimizer.learning_rate"])
    assert drawn == [settings["algorithm.optimizer.learning_rate"] for settings in draw(algorithm, 4)]


def test_more_trials_begin_with_those_of_fewer():
    algorithm = compose(["algorithm=gspo"]).algorithm
    for trials in range(1, 5):
        assert draw(algorithm, trials) == draw(algorithm, 5)[:trials]


def test_every_algorithm_gets_as_many_trials_or_the_plan_stops():
    algorithm = compose(["algorithm=gspo"]).algorithm
    with pytest.raises(ConfigError, match=r"search_space of gspo has 5 combinations where tuning.trials=6"):
        draw(algorithm, 6)
    algorithm.search_space["optimizer.learning_rate"] = [1e-4, 2e-4, 1e-4]
    with pytest.raises(ConfigError, match=r"search_space.optimizer.learning_rate of gspo lists 0.0001 more than once"):
        draw(algorithm, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.trials=0", "tuning.trials=0: must be at least 1"),
        ("tuning.trial=3", "leave it null"),
        ("seed=0,1000", "seed=1000: tuning.overrides give it to the trials"),
        ('tuning.overrides=["budget.limits.flops=1e9"]', "tuning.overrides give the trials no seed"),
        ("evaluation.fractions=[2.0]", "evaluation.fractions has 2.0"),  # the trials have others
    ],
)
def test_a_comparison_that_cannot_run_stops_before_its_trials(tmp_path, override, message):
    command = [sys.executable, "-m", "harness.run", "-m", "experiment=tuned", f"results={tmp_path}", override]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)})
    assert ended.returncode == 2 and message in ended.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        (["seed=1000", "budget.limits.flops=1e9"], {1000}),
        (["seed=1000,1001"], {1000, 1001}),
        (["+seed=range(2)", "seed='7','8'"], {0, 1, 7, 8}),
    ],
)
def test_the_seeds_of_the_trials_are_those_of_the_overrides(given, seeds):
    assert trial_seeds(TuningConfig(1, given, None)) == seeds


def test_trials_that_hydra_refuses_stop_the_comparison_though_there_are_earlier_ones(tmp_path):
    _trials(tmp_path / "tuned_run" / "trials", [0.1] * 5)
    cell = [f"results={tmp_path}", "algorithm=gspo", "model=tiny_dense", "seed=0"]
    command = [sys.executable, "-m", "harness.run", "-m", "experiment=tuned", *cell]
    command.append('tuning.overrides=["seed=1000","bugdet.axis=tokens"]')
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)})
    assert ended.returncode == 2 and "bugdet: no such key; near it are budget" in ended.stderr
    assert not list((tmp_path / "tuned_run").glob("gspo-*"))


def test_a_trial_has_the_settings_that_were_drawn_for_it(tmp_path):
    runs = [_compose(tmp_path, f"tuning.trial={trial}") for trial in range(5)]
    assert sorted(run.algorithm.optimizer.learning_rate for run in runs) == _RATES
    assert len({run.run_name for run in runs}) == 5


@pytest.mark.parametrize("trial", [-1, 5])
def test_a_trial_that_does_not_exist_is_refused(tmp_path, trial):
    with pytest.raises(ConfigError, match=rf"tuning.trial={trial}: must be from 0 to"):
        _compose(tmp_path, f"tuning.trial={trial}")


def test_a_misspelt_key_of_a_search_space_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"search_space.*rate_of_learning"):
        _compose(tmp_path, "tuning.trial=0", "algorithm.search_space={optimizer.rate_of_learning:[1,2,3,4,5]}")


def test_the_best_trial_is_that_of_the_highest_mean_over_seeds():
    rows = [("a", 0, 0.9), ("a", 0, 0.1), ("a", 1, 0.6), ("a", 1, 0.6), ("b", 0, -np.inf), ("b", 1, 0.1)]
    scores = pd.DataFrame(rows, columns=["algorithm", "trial", "score"]).assign(model="m", task="t", status="done")
    best = best_trials(scores).set_index("algorithm")
    assert best["trial"].to_dict() == {"a": 1, "b": 1}
    assert best["score"].to_dict() == {"a": pytest.approx(0.6), "b": 0.1}


def test_nothing_is_chosen_before_all_trials_are_over():
    scores = pd.DataFrame({"algorithm": "a", "model": "m", "task": "t", "status": "done", "trial": [0, 1]})
    assert best_trials(scores.assign(score=[0.5, np.nan])).empty


def test_the_score_is_the_mean_reward_within_the_budget(tmp_path):
    folder = _trials(tmp_path / "trials", [0.2])
    (directory,) = folder.glob("gspo-*")
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    inside = [step["reward/mean"] for step in steps if step["budget/flops"] <= synthetic.LIMIT]
    assert 0 < len(inside) < len(steps)
    found = trial_scores(folder).iloc[0]
    assert found["score"] == pytest.approx(np.mean(inside))
    assert found["settings"] == {"algorithm.optimizer.learning_rate": 5e-5}


def test_the_comparison_takes_the_best_trial(tmp_path):
    _trials(tmp_path / "tuned_run" / "trials", [0.1, 0.2, 0.5, 0.3, -np.inf], seeds=(1000, 1001))
    assert _compose(tmp_path).algorithm.optimizer.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("scores", "overrides", "error", "message"),
    [
        ([0.1, 0.2, 0.3, 0.4], [], ConfigError, "are not all there: run them first"),
        ([0.1, 0.2, 0.3, 0.4, np.nan], [], ConfigError, r"are not all there \(gspo-.*-s1000-\w+ not over\): run them"),
        ([0.1] * 5, ["model=tiny_moe"], ConfigError, "trials of gspo on tiny_moe and chain_sum .* are not all there"),
        ([0.1] * 5, ["seed=1000"], ConfigError, "seed=1000: trials in .* have used it"),
        ([-np.inf] * 5, [], Declined, "every trial of gspo .* diverged"),
    ],
)
def test_the_comparison_does_not_start_without_a_best_trial(tmp_path, scores, overrides, error, message):
    _trials(tmp_path / "tuned_run" / "trials", scores)
    with pytest.raises(error, match=message):
        _compose(tmp_path, *overrides)


@pytest.mark.parametrize(("status", "error"), [("failed", NothingToChoose), ("diverged", Declined)])
def test_that_no_trial_is_left_is_a_failure_where_one_of_them_failed(tmp_path, status, error):
    folder = _trials(tmp_path / "tuned_run" / "trials", [-np.inf] * 5)
    RunDirectory(next(folder.glob("gspo-*"))).update_status(status=status)
    with pytest.raises(Declined, match="every trial of gspo") as raised:
        _compose(tmp_path)
    assert raised.type is error


def test_a_trial_that_ended_with_its_first_step_is_named(tmp_path):
    folder = _trials(tmp_path / "tuned_run" / "trials", [0.1] * 5)
    last = max(folder.glob("gspo-*"))
    first, *_ = (last / "metrics.jsonl").read_text().splitlines()
    spent = json.loads(first) | {"budget/flops": 2 * synthetic.LIMIT}
    (last / "metrics.jsonl").write_text(json.dumps(spent) + "\n")
    with pytest.raises(ConfigError, match=rf"the first rollout batch of {last.name} .* raise budget\.limits"):
        _compose(tmp_path)


def test_without_trials_the_comparison_says_how_to_make_them(tmp_path):
    with pytest.raises(ConfigError, match="there are no trials in .*tuned_run/trials: run them first"):
        _compose(tmp_path)


@pytest.mark.slow
def test_one_command_runs_the_trials_and_then_the_comparison_on_their_best(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "LEVELFIELD_CACHE": str(tmp_path / "cache")}
    cells = ["seed=0", "algorithm=gspo,grpo_routing_replay", "model=tiny_dense"]
    settings = ["hydra/launcher=basic", *cells, *PLAIN, *_TWO_TRIALS]
    command = [sys.executable, "-m", "harness.run", "-m", "experiment=tuned", *settings]

    def tune():
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    first = tune()
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.index("results/tuned_run/trials: 2 to do, 2 skipped") < first.stdout.index(
        "results/tuned_run: 1 to do"
    )
    folder = tmp_path / "results" / "tuned_run"
    scores = trial_scores(folder / "trials").query("algorithm == 'gspo'")
    assert set(scores["seed"]) == {1000} and set(scores["status"]) == {"done"}
    best = scores.sort_values("trial").iloc[int(scores.sort_values("trial")["score"].argmax())]
    (run,) = folder.glob("gspo-*")
    assert RunDirectory(run).read_status()["status"] == "done"
    chosen = yaml.safe_load((run / "config.yaml").read_text())["algorithm"]["optimizer"]["learning_rate"]
    assert chosen == best["settings"]["algorithm.optimizer.learning_rate"]
    again = tune()
    assert again.returncode == 0
    assert "2 done, 2 skipped" in again.stdout and "1 done, 1 skipped" in again.stdout
