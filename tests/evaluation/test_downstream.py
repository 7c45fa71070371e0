import json
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from harness.errors import ConfigError
from harness.evaluation import check_evaluation, evaluate, prepare_evaluation
from harness.evaluation.problems import held_out
from harness.policy.loading import weights_hash

LOCAL_TASKS = Path(harness.__file__).parent / "evaluation" / "tasks"
FOUR = {"=": "#", "#": "4", "4": ["<eos>"], "<eos>": "7", "7": "7"}
ANY_DIGIT = {"=": "#", "#": "0123456789", **{digit: ["<eos>"] for digit in "0123456789"}}
PARAMETERS = {
    "chain_sum_held_out": {"min_terms": 3, "max_terms": 4},
    "chain_sum_longer": {"min_terms": 5, "max_terms": 6},
    "chain_sum_signed": {"min_terms": 3, "max_terms": 4, "allow_negation": True},
}


def share_of_fours(task: str, n: int) -> float:
    answers = held_out("chain_sum", PARAMETERS[task])["test"]["answer"][:n]
    return sum(answer == "4" for answer in answers) / n


def test_scores_are_the_share_of_right_answers_with_its_standard_error(markov_policy, tokenizer, evaluation):
    rows = evaluate(markov_policy(FOUR), tokenizer, evaluation, seed=0)
    assert [row["task"] for row in rows] == evaluation.tasks
    for row in rows:
        expected = share_of_fours(row["task"], 64)
        assert row["n"] == 64
        assert row["score"] == pytest.approx(expected)
        assert row["stderr"] == pytest.approx(math.sqrt(expected * (1 - expected) / 63))
    assert any(row["score"] > 0 for row in rows)


def test_the_score_does_not_depend_on_the_batch_size(markov_policy, tokenizer, evaluation):
    small = replace(evaluation, batch_size=7)
    model = markov_policy(FOUR)
    assert evaluate(model, tokenizer, small, seed=0) == evaluate(model, tokenizer, evaluation, seed=0)


def test_the_seed_decides_the_samples_whatever_the_global_state(markov_policy, tokenizer, evaluation):
    model = markov_policy(ANY_DIGIT)
    scores = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(random.randrange(2**32))
        scores.append([row["score"] for row in evaluate(model, tokenizer, evaluation, seed)])
    assert scores[0] == scores[1]
    assert len({tuple(score) for score in scores}) > 1


def test_as_many_problems_are_scored_as_are_asked_for(markov_policy, tokenizer, evaluation):
    many = replace(evaluation, tasks=["chain_sum_held_out"], limit=600)
    (row,) = evaluate(markov_policy(FOUR), tokenizer, many, seed=0)
    assert row["n"] == 600


def test_sampling_is_at_temperature_1_without_truncation(markov_policy, tokenizer, evaluation):
    """Ten equally likely digits: greedy decoding or a top-k below ten would miss most answers or all but one."""
    model = markov_policy(ANY_DIGIT)
    wide = replace(evaluation, tasks=["chain_sum_held_out"], limit=512, batch_size=512)
    answers = held_out("chain_sum", PARAMETERS["chain_sum_held_out"])["test"]["answer"]
    expected = sum(answer in set("0123456789") for answer in answers) / 512 / 10
    (row,) = evaluate(model, tokenizer, wide, seed=0)
    assert row["score"] == pytest.approx(expected, abs=4 * math.sqrt(expected / 512))


def test_evaluation_leaves_no_trace_in_the_training_state(markov_policy, tokenizer, evaluation):
    model = markov_policy(ANY_DIGIT)
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    weights, pointers = weights_hash(model), [parameter.data_ptr() for parameter in model.parameters()]
    configs = model.config.to_dict(), model.generation_config.to_dict(), tokenizer.init_kwargs.copy()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with torch.enable_grad():
        evaluate(model, tokenizer, evaluation, seed=5)
        assert torch.is_grad_enabled()
    assert random.getstate() == states[0]
    assert all(np.array_equal(after, before) for after, before in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    assert weights_hash(model) == weights
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert (model.config.to_dict(), model.generation_config.to_dict(), tokenizer.init_kwargs) == configs
    assert tokenizer.padding_side == "left"


def test_the_states_are_put_back_after_a_failure_too(markov_policy, tokenizer, evaluation):
    model = markov_policy(FOUR)
    model.train()
    model.config.max_position_embeddings = 60  # too short for the 80 tokens of chain_sum_longer
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(AssertionError, match="maximum sequence length"):
        evaluate(model, tokenizer, evaluation, seed=0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert model.training


def test_evaluation_opens_no_connection_and_prints_nothing(markov_policy, tokenizer, evaluation, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("evaluation must work offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    evaluate(markov_policy(FOUR), tokenizer, evaluation, seed=0)
    assert capfd.readouterr() == ("", "")


def test_one_problem_has_no_standard_error(markov_policy, tokenizer, evaluation):
    (row,) = evaluate(markov_policy(FOUR), tokenizer, replace(evaluation, tasks=evaluation.tasks[:1], limit=1), seed=0)
    assert row["n"] == 1
    assert math.isnan(row["stderr"])


def test_a_folder_of_the_users_own_tasks_is_read(markov_policy, tokenizer, evaluation, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"include: {LOCAL_TASKS / 'chain_sum_held_out.yaml'}\ntask: my_sums\n")
    mine = replace(evaluation, tasks=["my_sums", "chain_sum_held_out"], task_path=str(tmp_path))
    check_evaluation(mine)
    rows = evaluate(markov_policy(FOUR), tokenizer, mine, seed=0)
    assert [row["task"] for row in rows] == mine.tasks
    assert rows[0]["score"] == rows[1]["score"]


def test_the_score_is_the_first_metric_that_is_the_better_the_higher(markov_policy, tokenizer, evaluation, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(doc, results):\n    return {'loss': 7.0, 'acc': 1.0}\n")
    (tmp_path / "mine.yaml").write_text(
        f"include: {LOCAL_TASKS / 'chain_sum_held_out.yaml'}\ntask: mine\nprocess_results: !function judge.judge\n"
        "metric_list:\n  - {metric: loss, aggregation: mean, higher_is_better: false}\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (row,) = evaluate(
        markov_policy(FOUR), tokenizer, replace(evaluation, tasks=["mine"], task_path=str(tmp_path)), seed=0
    )
    assert row["score"] == 1.0


def test_unknown_tasks_and_folders_stop_before_compute(evaluation, tmp_path):
    check_evaluation(evaluation)
    with pytest.raises(ConfigError, match=r"chain_sum_hold_out: .*own are chain_sum_held_out, chain_sum_longer"):
        check_evaluation(replace(evaluation, tasks=["chain_sum_longer", "chain_sum_hold_out"]))
    with pytest.raises(ConfigError, match=r"evaluation\.task_path=.*no such folder"):
        check_evaluation(replace(evaluation, task_path=str(tmp_path / "absent")))


def test_data_that_cannot_be_read_stop_a_run_before_it_is_trained(markov_policy, evaluation, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: /absent/problems.jsonl}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    with pytest.raises(ConfigError, match=r"evaluation\.tasks=\['mine'\] cannot be loaded; are their data"):
        prepare_evaluation(markov_policy(FOUR), replace(evaluation, tasks=["mine"], task_path=str(tmp_path)))


@pytest.mark.slow
def test_the_lm_eval_command_gives_the_same_scores_on_the_exported_model(
    markov_policy, tokenizer, evaluation, tmp_path
):
    markov_policy(FOUR).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'policy'}"]
    command += ["--tasks", ",".join(evaluation.tasks), "--include_path", str(LOCAL_TASKS)]
    command += ["--limit", "24", "--batch_size", "24", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    env = {**os.environ, **offline, "PYTHONPATH": str(Path(harness.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    for task in evaluation.tasks:
        assert results[task]["acc,none"] == pytest.approx(share_of_fours(task, 24))
