"""Real runs of the training loop: the same twice, the same after a kill, and honest when they go wrong."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import harness.trainer
from harness.analysis.figures import all_figures
from harness.analysis.page import write_report
from harness.analysis.style import figure_style
from harness.analysis.sweep import read_sweep
from harness.cell import run_cell
from harness.config import compose, load
from harness.errors import ConfigError, Diverged
from harness.evaluation import evaluate
from harness.evaluation.entries import LOCAL_TASKS
from harness.policy.decoder_layer import DecoderLayer
from harness.policy.loading import load_policy
from harness.policy.tokenizer import build_tokenizer
from harness.runs import load_runs
from harness.runs.directory import EVALUATIONS, METRICS, RunDirectory
from harness.tasks import PromptStream
from harness.tasks.bounded import BOUNDED
from harness.trainer import Trainer
from harness.update import recomputing
from tests.policy.conftest import make_batch
from tests.policy.test_packing import assert_same, dense, passes
from tests.tiny_run import TINY, UPDATES, lines, numbers, planned, run

_ROOT = Path(__file__).parents[1]
_EVALUATED = ["evaluation.fractions=[0.0,0.5,1.0]"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, cold_starts):
    return tmp_path_factory.mktemp("results")


def moved(directory, key):
    """A metric at every step."""
    return [row.get(key) for row in lines(directory, METRICS)]


# --- the same twice, and after a kill --------------------------------------------------------------------------------

_LONG = [*_EVALUATED, "budget.limits.updates=18", "checkpoint_every=2"]  # five steps, the last one past the limit
_CELLS = {
    "ppo": ["algorithm=ppo", *_LONG],
    "grpo_routing_replay": ["algorithm=grpo_routing_replay", "model=tiny_moe", *_LONG],
}
# Each is a moment of a run, seen in what is on its disk. The first lies before there is anything to continue from.
_MOMENTS = {
    "the first step done": lambda path: _line_count(path) == 1 and not (path / "checkpoint" / "state.pt").exists(),
    "a checkpoint half written": lambda path: (path / "checkpoint" / ".state.pt.tmp").exists(),
    "a step done that no checkpoint has": lambda path: _line_count(path) == 3,
    "the final policy half written": lambda path: (path / "checkpoint" / "policy").exists(),
}


def _line_count(path):
    try:
        return (path / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def processes(cold_starts):
    """Processes of their own that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.trainer", "lm_eval.evaluator", "harness.evaluation.policy_lm"])
    return context


def _telling_every_step(directory):
    harness.trainer._PROGRESS = 0.0
    run_cell(directory)


def _kill_at(moment, directory, processes):
    """Start the run, or continue it, and kill it at the moment; whether that succeeded."""
    process = processes.Process(target=_telling_every_step, args=(directory,))
    process.start()
    while process.is_alive() and not moment(directory.path):
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL and moment(directory.path)


@pytest.fixture(scope="module", params=_CELLS)
def undisturbed(request, results):
    return run(results, "sweep=undisturbed", *_CELLS[request.param]), _CELLS[request.param]


def test_two_runs_of_one_cell_are_the_same_but_for_times(undisturbed, results):
    first, overrides = undisturbed
    second = run(results, "sweep=second", *overrides)
    assert second.path.name == first.path.name
    assert numbers(second) == numbers(first)
    assert [row["step"] for row in lines(first, METRICS)] == [1, 2, 3, 4, 5]
    assert len(set(moved(first, "loss"))) == 5  # it does learn from its rewards


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(undisturbed, results, processes):
    expected, overrides = undisturbed
    for attempt in range(10):  # a moment of milliseconds may be missed
        directory = planned(results, f"sweep=killed_{attempt}", *overrides)
        if all(_kill_at(moment, directory, processes) for moment in _MOMENTS.values()):
            break
        shutil.rmtree(directory.path)
    else:
        pytest.fail("the moments were missed every time")
    assert directory.read_status()["status"] == "running"  # as SIGKILL leaves it
    process = processes.Process(target=run_cell, args=(directory,))
    process.start()
    process.join()
    assert directory.read_status()["status"] == "done"
    assert numbers(directory) == numbers(expected)


def test_the_process_that_judges_answers_is_there_before_the_first_step(results):
    directory = planned(results, "algorithm=grpo", "task.verifier=reasoning_gym", "sweep=judged")
    trainer = Trainer(load(directory.path / "config.yaml"), directory)
    BOUNDED._process = None
    trainer.warm_up()
    assert BOUNDED._process is not None


@pytest.mark.parametrize("epochs", [1, 2])
def test_with_the_samplers_log_probabilities_the_mismatch_is_that_of_the_first_minibatch(results, epochs):
    rows = []
    for where in ("trainer", "rollout"):
        cell = ["algorithm=grpo", f"algorithm.old_logprobs={where}", f"algorithm.epochs={epochs}"]
        directory = planned(results, *cell, "sweep=mismatch")
        run_cell(directory)
        rows.append(lines(directory, METRICS)[0])
    trainer, rollout = rows
    mismatch = sorted(key for key in trainer if key.startswith("mismatch/"))
    assert len(mismatch) == 3 and mismatch == sorted(key for key in rollout if key.startswith("mismatch/"))
    assert 0 < rollout["mismatch/logprob_abs_max"] < 1e-4
    assert rollout["mismatch/logprob_abs_max"] <= trainer["mismatch/logprob_abs_max"] * 1.5


# --- divergence ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_ends_the_run_as_diverged_with_the_evidence_kept(results):
    directory = planned(results, "algorithm=grpo", "algorithm.ratio.name=breaks", *_EVALUATED)
    assert run_cell(directory) == "diverged"
    status = directory.read_status()
    assert status["reason"].startswith("optimizer step 2: loss is nan")
    (row,) = lines(directory, METRICS)
    assert (
        row["loss"] is None and row["reward/mean"] > 0 and row["budget/tokens"] == status["budget"]["spent"]["tokens"]
    )
    # The step is charged in full: those after the one that diverged were made, though they changed no weight.
    assert row["budget/updates"] == UPDATES and row["flops/update"] == pytest.approx(3 * row["flops/old_logprobs"])
    assert run_cell(directory) == "diverged"  # it is a result: not run again
    assert len(lines(directory, METRICS)) == 1


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_diverging_step_leaves_the_weights_finite(results, algorithm):
    directory = planned(results, f"algorithm={algorithm}", "algorithm.ratio.name=breaks", "sweep=finite")
    trainer = Trainer(load(directory.path / "config.yaml"), directory)
    trainer.resume()
    with pytest.raises(Diverged):
        trainer.step()
    assert trainer.policy_updater.updates == 1
    assert all(parameter.isfinite().all() for parameter in trainer.policy.parameters())
    assert any(
        (tensor != trainer.policy.state_dict()[name]).any() for name, tensor in trainer.inside["weights"].items()
    )


def test_a_critic_that_diverges_leaves_the_policys_metrics_too(results):
    overrides = ["algorithm=ppo", "algorithm.critic.learning_rate=1e38", "algorithm.optimizer.warmup_updates=0"]
    directory = planned(results, *overrides)
    assert run_cell(directory) == "diverged"
    row = lines(directory, METRICS)[-1]
    assert row["critic/loss"] is None
    assert row["loss"] is not None and row["clip_fraction/token"] is not None


def test_a_learning_rate_beyond_all_bounds_diverges(results):
    rate = ["algorithm.optimizer.learning_rate=1e38", "algorithm.optimizer.warmup_updates=0"]
    directory = planned(results, "algorithm=grpo", *rate)
    assert run_cell(directory) == "diverged", directory.read_status()["traceback"]


def test_a_full_disk_stops_a_run_before_compute(results, monkeypatch):
    monkeypatch.setattr("harness.runs.directory.shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    directory = planned(results, "sweep=full")
    assert run_cell(directory) == "failed"
    assert re.search("0 MB free and .* MB are needed: free some space", directory.read_status()["reason"])
    assert lines(directory, METRICS) == []


@pytest.mark.parametrize(("algorithm", "networks"), [("grpo", 1), ("ppo", 2)])
def test_the_space_that_is_asked_for_is_that_of_twelve_copies_of_each_network(
    results, monkeypatch, algorithm, networks
):
    asked = []
    monkeypatch.setattr(RunDirectory, "check_space", lambda directory, size: asked.append(size))
    directory = planned(results, f"algorithm={algorithm}", "sweep=space")
    trainer = Trainer(load(directory.path / "config.yaml"), directory)
    parameters = sum(parameter.numel() for parameter in trainer.policy.parameters())
    assert asked == [12 * 4 * parameters * networks]


def test_an_evaluation_without_a_score_stops_a_run_before_compute(results, tmp_path):
    included = f"include: {LOCAL_TASKS}/chain_sum_held_out.yaml\ntask: mistakes\n"
    metric = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: false}]\n"
    (tmp_path / "mistakes.yaml").write_text(included + metric)
    own = ["evaluation.tasks=[mistakes]", f"evaluation.task_path={tmp_path}", "evaluation.fractions=[1.0]"]
    directory = planned(results, "sweep=mistakes", *own)
    assert run_cell(directory) == "failed"
    assert re.search(r"evaluation\.tasks has mistakes: no metric of it \(acc\) is the better the", _reason(directory))
    assert lines(directory, METRICS) == []


def test_sequences_that_the_model_has_no_positions_for_are_refused_before_compute(results):
    directory = planned(results, "sweep=positions")
    config = load(directory.path / "config.yaml")
    config.task.max_completion_tokens = 600
    with pytest.raises(ConfigError, match="max_completion_tokens=600 make .* Qwen3ForCausalLM has 512 positions"):
        Trainer(config, directory)
    assert lines(directory, METRICS) == []


def test_a_prompt_that_is_too_long_is_found_before_compute(results, tmp_path):
    rows = [{"question": f"{n} + {n} =", "answer": f"#### {2 * n}"} for n in range(10, 60)]
    rows.append({"question": "1 + " * 30 + "1 =", "answer": "#### 31"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["task=gsm8k", f"task.path={tmp_path}/rows.jsonl", "task.prompt='{question}'", "task.max_prompt_tokens=20"]
    directory = planned(results, "sweep=prompts", *own)
    assert run_cell(directory) == "failed"
    assert re.search("max_prompt_tokens=20: a prompt has 6. tokens", _reason(directory))
    assert lines(directory, METRICS) == []


def test_a_generated_prompt_that_is_too_long_is_found_before_compute(results):
    task = load(planned(results, "sweep=generated").path / "config.yaml").task
    problems, tokenizer = PromptStream(task, 0, "train").take(200), build_tokenizer()
    lengths = [len(tokenizer(problem.prompt)["input_ids"]) for problem in problems]
    assert min(lengths) < max(lengths)
    directory = planned(results, "sweep=generated_too_long", f"task.max_prompt_tokens={max(lengths) - 1}", *_EVALUATED)
    assert run_cell(directory) == "failed"
    assert re.search(f"a prompt has {max(lengths)} tokens; raise the limit, or see to it", _reason(directory))
    assert lines(directory, EVALUATIONS) == lines(directory, METRICS) == []


def _reason(directory):
    return directory.read_status()["reason"]


def test_a_state_is_evaluated_once_for_all_fractions_that_a_step_passes(results, monkeypatch):
    calls = []
    monkeypatch.setattr("harness.trainer.evaluate", lambda *given: calls.append(given) or evaluate(*given))
    directory = run(results, "sweep=once", "evaluation.fractions=[0.0,0.1,0.2,0.5,1.0]")  # of two steps
    rows = lines(directory, EVALUATIONS)
    assert [row["fraction"] for row in rows] == [0.0, 0.1, 0.2, 0.5, 1.0]
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 2] and len({row["score"] for row in rows[:3]}) == 1
    assert len(calls) == 4  # at the start, for what the first step passed, where it ended, at the end


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [["algorithm=gspo"], ["algorithm=ppo"], ["algorithm=kl_cov"]])
def test_micro_batches_change_no_result(results, cell):
    rows = []
    for size in (1, 3, 16):
        directory = run(results, *cell, f"model.micro_batch_sequences={size}", "budget.limits.updates=1")
        (row,) = lines(directory, METRICS)
        rows.append({key: value for key, value in row.items() if not key.startswith("mismatch/")})
    assert rows[1] == pytest.approx(rows[0], rel=1e-4, abs=1e-6)
    assert rows[2] == pytest.approx(rows[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("cell", [["algorithm=ppo"], ["algorithm=grpo_routing_replay", "model=tiny_moe"]])
def test_activations_computed_again_change_no_result_and_are_charged(results, cell, monkeypatch):
    load_policy(compose([*TINY, *cell]).model, "cpu")  # the cold start, which is not counted
    passes: list[bool] = []
    layer = DecoderLayer._in_halves
    monkeypatch.setattr(
        DecoderLayer, "_in_halves", lambda *args: passes.append(torch.is_grad_enabled()) or layer(*args)
    )
    rows, counts = [], []
    for setting in ("false", "true"):
        passes.clear()
        directory = run(results, *cell, f"model.activation_checkpointing={setting}", "budget.limits.updates=4")
        rows += lines(directory, METRICS)
        counts.append(sum(passes))
    kept, again = rows
    layers, networks = 3, 2 if "algorithm=ppo" in cell else 1
    assert counts[1] - counts[0] == UPDATES * layers * networks
    measured = {key for key in kept if not key.startswith(("flops/", "budget/"))}
    assert {key: again[key] for key in measured} == {key: kept[key] for key in measured}
    assert 1.2 < again["flops/update"] / kept["flops/update"] < 4 / 3
    assert again["flops/rollout"] == kept["flops/rollout"]
    if "algorithm=ppo" in cell:
        assert 1.15 < again["flops/critic"] / kept["flops/critic"] < 1.3  # a forward pass of its own among four


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # its new name is younger than our oldest
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("opt", {"dropout": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("falcon", {"hidden_dropout": 0.5}),
        ("biogpt", {"hidden_dropout_prob": 0.5}),  # around its layers, too
    ],
)
def test_activations_computed_again_are_those_without_dropout(family, dropout):
    batch, found, computed = make_batch(), [], []
    for again in (False, True):
        model = dense(family, **dropout)
        layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        next(layer.children()).register_forward_pre_hook(lambda *_, again=again: computed.append(again))
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with recomputing(model):
            found.append(passes(model, batch))
        assert not any(module.training for module in model.modules())
    assert_same(*found)
    assert computed == [False, True, True]


def test_a_model_that_cannot_compute_its_activations_again_is_refused(cold_starts, monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"model\.activation_checkpointing=true: Qwen3ForCausalLM .* set it to false"):
        load_policy(compose([*TINY, "model.activation_checkpointing=true"]).model, "cpu")


def test_before_the_first_optimizer_step_the_ratio_is_one(results):
    """One step for a rollout batch, which only a surrogate that does not clip may take; then two."""
    plain = ["algorithm=grpo", "algorithm.surrogate.name=none", "algorithm.minibatches=1"]
    plain += ["~algorithm.surrogate.clip_low", "~algorithm.surrogate.clip_high"]
    one = run(results, *plain, "budget.limits.updates=3")
    assert moved(one, "ratio/max") == pytest.approx([1, 1, 1], abs=1e-5)
    assert moved(one, "ratio/min") == pytest.approx([1, 1, 1], abs=1e-5)
    two = run(results, *plain, "algorithm.epochs=2", "budget.limits.updates=2")
    assert moved(two, "ratio/max")[0] > 1.001 and moved(two, "ratio/min")[0] < 0.999


@pytest.fixture(scope="module")
def routed(results):
    """Steps large enough to change many experts, with and without replay."""
    large = ["model=tiny_moe", "algorithm.optimizer.learning_rate=5e-3"]
    return {name: run(results, f"algorithm={name}", *large) for name in ("grpo", "grpo_routing_replay")}


def test_a_replayed_update_uses_the_old_policys_experts_and_measures_its_own(routed):
    replayed = routed["grpo_routing_replay"]
    assert moved(replayed, "moe/used_expert_change_fraction") == [0, 0]
    assert min(moved(replayed, "moe/expert_change_fraction")) > 0.01
    assert min(moved(replayed, "moe/token_change_fraction")) > 0.01


def test_what_a_whole_update_changes_is_told_beside_the_mean_over_its_steps(routed):
    for steps in routed.values():
        whole = moved(steps, "moe/update_expert_change_fraction")
        assert min(whole) > 0.01
        assert set(whole).isdisjoint(moved(steps, "moe/expert_change_fraction"))
        assert min(moved(steps, "moe/update_token_change_fraction")) >= max(whole)


def test_without_replay_the_experts_that_are_used_change(routed):
    used = moved(routed["grpo"], "moe/used_expert_change_fraction")
    assert min(used) > 0.01


def test_ppo_alone_has_a_critic_and_tells_how_much_it_explains(results, routed):
    ppo = run(results, "algorithm=ppo", "algorithm.critic.learning_rate=1e-2", "budget.limits.updates=24")
    explained = moved(ppo, "critic/explained_variance")
    assert explained[0] == pytest.approx(0, abs=1e-6)  # its head begins at 0
    assert len(explained) == 6 and all(value <= 1 for value in explained) and len(set(explained)) == 6
    assert all(value > 0 for key in ("critic/loss", "critic/grad_norm") for value in moved(ppo, key))
    assert not [key for row in lines(routed["grpo"], METRICS) for key in row if key.startswith("critic/")]


# --- an algorithm of the user's own ----------------------------------------------------------------------------------

_DR_GRPO = """\
defaults:
  - grpo
  - _self_
name: my_dr_grpo
advantage:
  scale: none
aggregation:
  name: constant_length
  length: 12
"""


@pytest.mark.slow
def test_an_algorithm_of_yaml_alone_outside_the_repository_trains_and_is_drawn(results, tmp_path):
    (tmp_path / "mine" / "algorithm").mkdir(parents=True)
    (tmp_path / "mine" / "algorithm" / "my_dr_grpo.yaml").write_text(_DR_GRPO)
    arguments = ["--config-dir", "mine", "algorithm=my_dr_grpo", "sweep=own", *TINY, *_EVALUATED]
    command = [sys.executable, "-m", "harness.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    sweep = tmp_path / "results" / "own"
    rows = load_runs(sweep)
    assert rows["algorithm"].tolist() == ["my_dr_grpo"] * 2 and rows["status"].tolist() == ["done"] * 2
    (directory,) = map(RunDirectory, sweep.glob("my_dr_grpo-*"))
    grpo = run(results, "algorithm=grpo", "sweep=own", *_EVALUATED)
    assert moved(directory, "reward/mean")[0] == moved(grpo, "reward/mean")[0]  # the same first batch
    assert moved(directory, "loss")[0] != moved(grpo, "loss")[0]
    with figure_style():
        drawings = all_figures(read_sweep(sweep))
    legends = {
        text.get_text() for drawing in drawings for legend in drawing.figure.legends for text in legend.get_texts()
    }
    assert "my_dr_grpo" in legends
    assert json.loads((directory.path / "run.json").read_text())["scores"]["chain_sum_held_out"]["n"] == 2


def test_a_sweep_in_which_nothing_was_ever_rewarded_has_a_report(results, tmp_path):
    directory = run(results, "algorithm=grpo", "sweep=nothing", "task.verifier=marked_answer", "task.name=unrewarded")
    rows = lines(directory, METRICS)
    assert {row["grad_norm"] for row in rows} == {row["clip_fraction/token"] for row in rows} == {0}
    write_report(read_sweep(results / "nothing"), tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("seconds", "told"), [(0.0, [2, 4, 6]), (1e9, [2, 6])])
def test_what_is_new_of_a_run_is_written_now_and_then_and_at_its_end(results, monkeypatch, seconds, told):
    monkeypatch.setattr("harness.trainer._PROGRESS", seconds)
    said, update = [], RunDirectory.update_status

    def listening(directory, **fields):
        if set(fields) == {"budget"}:
            said.append(fields["budget"]["spent"]["updates"])
            assert [row["budget/updates"] for row in lines(directory, METRICS)] == [2, 4, 6][: int(said[-1]) // 2]
        update(directory, **fields)

    monkeypatch.setattr(RunDirectory, "update_status", listening)
    settings = ["algorithm.minibatches=2", "budget.limits.updates=6", "checkpoint_every=9"]
    directory = run(results, f"sweep=told_{seconds}", *settings)
    assert said == told
    assert directory.read_status()["budget"]["spent"]["updates"] == 6


def test_the_rows_before_an_evaluation_are_there_when_it_is(results, monkeypatch):
    monkeypatch.setattr("harness.trainer._PROGRESS", 1e9)
    there, append = [], RunDirectory.append_evaluations

    def watching(directory, rows):
        there.append([row["step"] for row in lines(directory, METRICS)])
        append(directory, rows)

    monkeypatch.setattr(RunDirectory, "append_evaluations", watching)
    settings = ["algorithm.minibatches=2", "budget.limits.updates=6", "checkpoint_every=9"]
    run(results, "sweep=rows_first", *settings, "evaluation.fractions=[0.5,1.0]")
    assert there == [[1, 2], [1, 2, 3]]
