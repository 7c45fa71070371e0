"""The fairness contract, line by line and in its order, held against real runs."""

import json
import re
from dataclasses import asdict
from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

import harness.trainer
import harness.update
from harness.analysis.evidence import headline_verdicts
from harness.analysis.fairness import checks
from harness.analysis.figures import all_figures
from harness.analysis.page import write_report
from harness.analysis.style import figure_style
from harness.analysis.sweep import read_sweep
from harness.analysis.tables import budgets, completion, score_overview
from harness.analysis.verdicts import headlines
from harness.cell import run_cell
from harness.config import BUDGET_AXES, compose
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.policy.loading import weights_hash
from harness.policy.routing import Routing
from harness.reward import Rewards
from harness.rollout.batch import Batch
from harness.runs.directory import EVALUATIONS, METRICS, SAMPLES, RunDirectory
from harness.sweep.plan import Cell, check_folder, freeze
from harness.tasks import PromptStream
from tests.analysis import synthetic
from tests.tiny_run import COMPLETIONS, TINY, UPDATES, lines, numbers, planned, run

CELLS = [
    *((algorithm, "tiny_dense") for algorithm in ("ppo", "grpo", "gspo")),
    *((algorithm, "tiny_moe") for algorithm in ("ppo", "grpo", "grpo_routing_replay", "gspo")),
]
# Two steps, evaluated before, between and after them, with every completion kept.
EVALUATED = ["evaluation.fractions=[0.0,0.5,1.0]", f"evaluation.samples={COMPLETIONS}"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, cold_starts):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(results):
    """Every algorithm on both models, by (algorithm, model)."""
    return {
        (algorithm, model): run(results, f"algorithm={algorithm}", f"model={model}", *EVALUATED)
        for algorithm, model in CELLS
    }


@pytest.fixture(scope="module")
def sweep(results, runs):
    return read_sweep(results / "runs")


def column(directory, key):
    return [row[key] for row in map(json.loads, (directory.path / METRICS).read_text().splitlines())]


def group_size(directory):
    return OmegaConf.load(directory.path / "config.yaml").algorithm.completions_per_prompt


def samples(directory, step):
    """The completions that led to the state after a step."""
    return [row for row in lines(directory, SAMPLES) if row["step"] == step]


def final_weights(directory):
    return weights_hash(AutoModelForCausalLM.from_pretrained(directory.policy_dir))


# --- everything but the algorithm is equal ---------------------------------------------------------------------------


def test_same_initial_weights_per_model_by_hash(runs):
    hashes = {}
    for (_, model), directory in runs.items():
        hashes.setdefault(model, set()).add(directory.read_status()["provenance"]["initial_weights"])
    assert all(len(found) == 1 for found in hashes.values())
    assert hashes["tiny_dense"] != hashes["tiny_moe"]


def test_a_run_that_began_from_other_weights_is_refused(results):
    directory = planned(results, "sweep=others")
    known = directory.read_status()["provenance"]
    directory.update_status(provenance={**known, "initial_weights": "0" * 64})
    assert run_cell(directory) == "failed"
    assert "began from other weights" in directory.read_status()["reason"]
    assert lines(directory, METRICS) == []


def test_cached_weights_that_were_altered_are_refused(results, tmp_path, monkeypatch):
    monkeypatch.setenv("LEVELFIELD_CACHE", str(tmp_path))
    run(results, "sweep=cached")
    (weights,) = tmp_path.glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    directory = planned(results, "sweep=altered")
    assert run_cell(directory) == "failed"
    assert "was altered" in directory.read_status()["reason"]


def test_same_stream_of_prompts_per_seed(runs):
    """Algorithms with groups take the same prompts; PPO takes more of the same stream."""
    task = compose(TINY).task
    for directory in runs.values():
        stream, group = PromptStream(task, 0, "train"), group_size(directory)
        for step in (1, 2):
            asked = [row["prompt"] for row in samples(directory, step)]
            expected = [problem.prompt for problem in stream.take(COMPLETIONS // group)]
            assert asked == [prompt for prompt in expected for _ in range(group)]


def test_same_sampling_seeds(runs):
    """The first rollout batch is the same where the prompts are, down to the last bit of what was measured on it."""
    for model, others in (("tiny_dense", ["gspo"]), ("tiny_moe", ["gspo", "grpo_routing_replay"])):
        grpo = runs["grpo", model]
        for other in (runs[algorithm, model] for algorithm in others):
            assert samples(other, 1) == samples(grpo, 1)
            first, second = lines(other, METRICS)[0], lines(grpo, METRICS)[0]
            same = [key for key in first if re.match("reward/|completion/|flops/rollout|budget/tokens|mismatch/", key)]
            assert len(same) >= 9
            assert {key: first[key] for key in same} == {key: second[key] for key in same}
        # PPO's first prompt is the first group's: the same random numbers make the same completion of it.
        assert samples(runs["ppo", model], 1)[0] == samples(grpo, 1)[0]


def test_another_seed_is_another_stream_and_other_samples(results, runs):
    other = run(results, "algorithm=grpo", "sweep=seed", "seed=1", *EVALUATED)
    for key in ("prompt", "completion"):
        asked = [[row[key] for row in samples(directory, 1)] for directory in (runs["grpo", "tiny_dense"], other)]
        assert asked[0] != asked[1]


def test_same_number_of_completions_per_rollout_batch(runs):
    for directory in runs.values():
        group = group_size(directory)
        assert [queries * group for queries in column(directory, "budget/queries")] == [COMPLETIONS, 2 * COMPLETIONS]
        assert len(samples(directory, 1)) == COMPLETIONS
        tokens = column(directory, "completion/length_mean")[0] * COMPLETIONS
        assert tokens == pytest.approx(column(directory, "budget/tokens")[0])


def test_an_algorithm_entry_changes_nothing_but_the_algorithm():
    """Context lengths, micro-batching, temperature, evaluation and all else are the same whichever is chosen."""
    entries = {path.stem for path in (conf_dir() / "algorithm").glob("*.yaml")} - {"base"}
    assert entries >= {"ppo", "grpo", "grpo_routing_replay", "gspo"}
    rest = []
    for entry in sorted(entries):
        config = asdict(compose([f"algorithm={entry}", "model=tiny_moe"]))
        assert config.pop("algorithm")["name"] == entry
        rest.append(config)
    assert all(config == rest[0] for config in rest)


def test_same_precision_and_auxiliary_losses(runs):
    for directory in runs.values():
        model = AutoModelForCausalLM.from_pretrained(directory.policy_dir)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not getattr(model.config, "output_router_logits", False)  # would add a load-balancing loss


@pytest.mark.parametrize(
    "change",
    [
        "rollout.completions_per_batch=32",
        "rollout.temperature=0.5",
        "budget.axis=flops",
        "budget.limits.updates=12",
        "evaluation.limit=3",
        "evaluation.tasks=[chain_sum_longer]",
        "threads=2",
    ],
)
def test_what_must_be_equal_is_refused_where_it_differs(tmp_path, change):
    done = compose([*TINY, f"results={tmp_path}", "sweep=s", "algorithm=grpo"])
    freeze(tmp_path / "s", [Cell(done, None)])
    RunDirectory(done.run_dir).update_status(status="done")
    other = [*TINY, f"results={tmp_path}", "sweep=s", "algorithm=gspo"]
    check_folder(tmp_path / "s", [compose(other)])
    with pytest.raises(ConfigError, match=re.escape(change.partition("=")[0])):
        check_folder(tmp_path / "s", [compose([*other, change])])


@pytest.mark.parametrize(
    ("section", "key"), [("task", "max_completion_tokens"), ("model", "micro_batch_sequences"), ("task", "parameters")]
)
def test_cells_with_another_model_or_task_of_one_name_are_named_in_the_report(tmp_path, section, key):
    changed = {"name": {"task": "chain_sum", "model": "tiny_dense"}[section], key: 7}
    cells = [
        synthetic.Cell("grpo", "tiny_dense", 0),
        synthetic.Cell("gspo", "tiny_dense", 0, config={section: changed}),
    ]
    found = checks(read_sweep(synthetic.write_sweep(tmp_path / "s", cells)))
    assert [check for check in found if not check.equal and f"{section}.{key}" in check.detail]


def test_every_check_of_the_report_holds_on_real_runs(sweep):
    failed = [check.what for check in checks(sweep) if not check.equal]
    # Not tuned; and runs of a second say nothing of how fast the machine was.
    assert [what for what in failed if not what.startswith("speed of the machine")] == ["tuning trials"]


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["flops", "tokens", "queries"])
def test_the_budget_is_spent_on_one_axis_and_metered_on_all(results, runs, axis):
    """It stops at the first step boundary at or past the limit: here the second."""
    limit = 1.5 * column(runs["ppo", "tiny_dense"], f"budget/{axis}")[0]
    directory = run(results, "sweep=axis", "algorithm=ppo", f"budget.axis={axis}", f"budget.limits.{axis}={limit}")
    spent = column(directory, f"budget/{axis}")
    assert len(spent) == 2 and spent[0] < limit <= spent[1]
    status = directory.read_status()["budget"]
    assert (status["axis"], status["limit"]) == (axis, limit)
    assert status["overshoot"] == pytest.approx(spent[1] / limit - 1) and status["overshoot"] > 0
    for other in BUDGET_AXES:
        amounts = column(directory, f"budget/{other}")
        assert 0 < amounts[0] < amounts[1] == status["spent"][other]


def test_a_budget_of_seconds_stops_at_a_step_boundary_too(results):
    directory = run(results, "sweep=axis", "budget.axis=device_seconds", "budget.limits.device_seconds=1e-6")
    assert len(column(directory, "step")) == 1
    assert directory.read_status()["budget"]["overshoot"] > 0


def test_a_limit_that_is_met_exactly_is_no_overshoot(runs):
    for directory in runs.values():
        assert directory.read_status()["budget"]["overshoot"] == 0
        assert lines(directory, EVALUATIONS)[-1]["step"] == 2
        assert column(directory, "budget/updates") == [UPDATES, 2 * UPDATES]


@pytest.fixture(scope="module")
def overshooting(results):
    """A limit between the second step and the third."""
    limit = 2 * UPDATES + 1
    return run(results, "algorithm=gspo", "sweep=overshooting", f"budget.limits.updates={limit}", *EVALUATED)


def test_what_is_compared_is_the_last_state_inside_the_limit(runs, overshooting):
    exact = runs["gspo", "tiny_dense"]
    assert lines(overshooting, METRICS)[:2] == lines(exact, METRICS)
    assert final_weights(overshooting) == final_weights(exact)
    last, expected = lines(overshooting, EVALUATIONS)[-1], lines(exact, EVALUATIONS)[-1]
    assert last == expected and (last["fraction"], last["step"]) == (1.0, 2)
    assert overshooting.read_status()["scores"] == exact.read_status()["scores"]
    assert samples(overshooting, 2) == samples(exact, 2)


def test_every_evaluation_is_of_the_last_state_inside_its_fraction(overshooting):
    limit = overshooting.read_status()["budget"]["limit"]
    spent = [0, *column(overshooting, "budget/updates")]
    for row in lines(overshooting, EVALUATIONS):
        assert row["budget/updates"] == spent[row["step"]] <= row["fraction"] * limit < spent[row["step"] + 1]


def test_the_overshoot_is_recorded_and_no_curve_shows_it(overshooting):
    assert overshooting.read_status()["budget"]["overshoot"] == pytest.approx(3 / 9)
    sweep = read_sweep(overshooting.path)
    assert sweep.runs["step"].tolist() == [1, 2]
    assert budgets(sweep).frame["largest overshoot"].item() == pytest.approx(3 / 9)


def test_a_limit_smaller_than_one_step_leaves_the_initial_policy(results):
    directory = run(results, "sweep=smaller", "budget.limits.updates=1", *EVALUATED)
    assert column(directory, "step") == [1]
    assert [(row["fraction"], row["step"]) for row in lines(directory, EVALUATIONS)] == [(0.0, 0), (0.5, 0), (1.0, 0)]
    assert final_weights(directory) == directory.read_status()["provenance"]["initial_weights"]
    assert directory.read_status()["budget"]["overshoot"] == 3


# --- what is charged and what is not ---------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """The meter's clock stands still but in calls that are made slow: those take 1000 seconds each."""
    clock = SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr("harness.budget.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def make_slow(place, name):
        function = getattr(place, name)

        def wrapper(*arguments, **settings):
            clock.now, clock.calls = clock.now + 1000, clock.calls + 1
            return function(*arguments, **settings)

        monkeypatch.setattr(place, name, wrapper)

    clock.make_slow = make_slow
    return clock


def charged_seconds(directory) -> dict[str, float]:
    """By phase, of those that were charged any."""
    phases = directory.read_status()["budget"]["phases"]
    return {phase: cost["seconds"] for phase, cost in phases.items() if cost["seconds"]}


def test_evaluation_checkpoints_logging_and_start_up_are_never_charged(results, slow):
    for name in ("append_metrics", "append_evaluations", "append_samples", "update_status", "save_state"):
        slow.make_slow(RunDirectory, name)
    for name in ("evaluate", "load_policy", "Critic", "weights_hash"):
        slow.make_slow(harness.trainer, name)
    slow.make_slow(harness.trainer.Trainer, "warm_up")
    slow.make_slow(harness.update, "_expert_changes")
    slow.make_slow(Routing, "choices")  # without replay it only measures
    directory = run(results, "sweep=uncharged", "algorithm=ppo", "model=tiny_moe", "evaluation.fractions=[0.0,1.0]")
    assert slow.calls > 15
    assert column(directory, "budget/device_seconds") == [0.0, 0.0]


def test_seconds_and_flops_are_those_of_the_phases_and_nothing_else(runs):
    for directory in runs.values():
        budget = directory.read_status()["budget"]
        for unit, axis in (("seconds", "device_seconds"), ("flops", "flops")):
            phases = {phase: column(directory, f"{unit}/{phase}") for phase in budget["phases"]}
            assert sum(map(sum, phases.values())) == pytest.approx(budget["spent"][axis])
            cumulative = [0.0, *column(directory, f"budget/{axis}")]
            for step, (before, after) in enumerate(pairwise(cumulative)):
                assert sum(shares[step] for shares in phases.values()) == pytest.approx(after - before)


def test_the_critic_is_always_charged(runs):
    for (algorithm, _), directory in runs.items():
        charged = [min(column(directory, f"{unit}/critic")) > 0 for unit in ("flops", "seconds")]
        assert charged == [algorithm == "ppo"] * 2
    ppo = runs["ppo", "tiny_dense"]
    # As large as the policy: one forward pass to judge, and an update, but for its head.
    policy = column(ppo, "flops/update")[0] + column(ppo, "flops/old_logprobs")[0]
    assert column(ppo, "flops/critic")[0] == pytest.approx(policy, rel=0.05)
    parameters = ppo.read_status()["parameters"]
    assert parameters["critic"] == pytest.approx(parameters["policy"], rel=0.01)


def test_reference_passes_are_always_charged(results, runs):
    directory = run(results, "sweep=reference", "algorithm=grpo", "algorithm.kl.coefficient=0.1")
    assert column(directory, "flops/reference") == column(directory, "flops/old_logprobs")
    assert min(column(directory, "seconds/reference")) > 0
    assert column(runs["grpo", "tiny_dense"], "flops/reference") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("algorithm", "phases"),
    [
        ("grpo_routing_replay", {"old_logprobs"}),
        ("grpo_rollout_routing_replay", {"rollout", "old_logprobs"}),
    ],
)
def test_recording_routes_for_replay_is_always_charged(results, slow, monkeypatch, algorithm, phases):
    slow.make_slow(Routing, "choices")
    slow.make_slow(Batch, "alike")
    monkeypatch.setattr(harness.trainer.Trainer, "warm_up", lambda trainer: None)  # samples too, uncharged
    directory = run(results, "sweep=recording", f"algorithm={algorithm}", "model=tiny_moe")
    assert slow.calls >= 4
    assert charged_seconds(directory).keys() == phases
    assert column(directory, "budget/device_seconds")[-1] == 1000 * slow.calls


def test_prompts_and_the_choice_among_groups_are_always_charged(results, slow, monkeypatch):
    for place, name in (
        (PromptStream, "take"),
        (harness.trainer.Trainer, "_prompt_tokens"),
        (Batch, "concatenate"),
        (Rewards, "select"),
    ):
        slow.make_slow(place, name)
    monkeypatch.setattr(harness.trainer.Trainer, "warm_up", lambda trainer: setattr(slow, "calls", 0))
    directory = run(results, "sweep=prompts", "algorithm=dapo")
    assert slow.calls >= 8
    assert charged_seconds(directory).keys() == {"rollout", "reward"}
    assert column(directory, "budget/device_seconds")[-1] == 1000 * slow.calls


# --- evaluation and the random state ---------------------------------------------------------------------------------


def test_evaluation_does_not_touch_the_trainings_random_state(results, overshooting):
    """Evaluated at every step with checkpoints, or never and without: the same run, at the same cost."""
    limit = overshooting.read_status()["budget"]["limit"]
    never = run(results, "algorithm=gspo", "sweep=never", f"budget.limits.updates={limit}", "checkpoint_every=1000")
    assert len(lines(overshooting, EVALUATIONS)) == 3 and lines(never, EVALUATIONS) == []
    same = (METRICS, "spent", "flops", "policy")
    assert {key: numbers(overshooting)[key] for key in same} == {key: numbers(never)[key] for key in same}


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_every_algorithm_declares_as_many_tuning_trials():
    entries = {path.stem for path in (conf_dir() / "algorithm").glob("*.yaml")} - {"base"}
    spaces = [compose([f"algorithm={entry}", "model=tiny_moe"]).algorithm.search_space for entry in sorted(entries)]
    trials = {prod(map(len, space.values())) for space in spaces}
    assert len(trials) == 1 and trials.pop() > 1


@pytest.mark.parametrize(
    ("trials", "took", "equal", "detail"),
    [
        ({"gspo": 2, "ppo": 2}, 1e-4, True, "2 trials of each algorithm on each model, seeds 1000"),
        ({"gspo": 2, "ppo": 1}, 1e-4, False, "not tuned alike: trials of gspo on tiny_dense 2, ppo on tiny_dense 1"),
        ({"gspo": 2}, 1e-4, False, "not tuned alike: trials of gspo on tiny_dense 2; none of ppo on tiny_dense"),
        ({}, 1e-4, False, "not tuned in this sweep"),
        ({"gspo": 2, "ppo": 2}, 2e-4, False, "not tuned alike: ppo-tiny_dense-chain_sum-s0 ran with other settings"),
    ],
)
def test_the_report_says_whether_tuning_trials_were_equal(tmp_path, trials, took, equal, detail):
    compared = [synthetic.trial("gspo", None, 1e-4, seed=0), synthetic.trial("ppo", None, took, seed=0)]
    folder = synthetic.write_sweep(tmp_path / "s", compared)
    cells = [
        synthetic.trial(name, i, 10 ** (i - 4), gain=0.3 - 0.2 * i)
        for name, count in trials.items()
        for i in range(count)
    ]
    if cells:
        synthetic.write_sweep(folder / "trials", cells)
    (check,) = [check for check in checks(read_sweep(folder)) if check.what == "tuning trials"]
    assert check.equal == equal and check.detail.startswith(detail)


# --- what did not finish ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubled(results):
    """A sweep with a cell of each ending."""
    sweep = ["sweep=troubled", "evaluation.fractions=[0.0,1.0]"]
    run(results, "algorithm=gspo", *sweep)
    diverging = planned(results, "algorithm=gspo", "seed=1", "algorithm.ratio.name=breaks", *sweep)
    assert run_cell(diverging) == "diverged"
    failing = planned(results, "algorithm=gspo", "seed=2", "task.max_prompt_tokens=1", *sweep)
    assert run_cell(failing) == "failed"
    killed = planned(results, "algorithm=gspo", "seed=3", *sweep)
    killed.update_status(status="running", pid=2**22 + 1)  # beyond the largest number of a process
    planned(results, "algorithm=gspo", "seed=4", *sweep)
    return read_sweep(results / "troubled")


def test_failed_diverged_and_unfinished_runs_are_shown_and_counted(troubled, tmp_path):
    shown = completion(troubled).frame.sort_values("seed")
    endings = ["done", "diverged", "failed", "interrupted", "planned"]
    assert shown["status"].tolist() == endings
    report = write_report(troubled, tmp_path)
    assert report.counts == dict.fromkeys(endings, 1)
    assert (report.wrong, report.unfinished) == (dict.fromkeys(endings[1:3], 1), dict.fromkeys(endings[3:], 1))
    for page in ("report.md", "report.html"):
        text = " ".join((tmp_path / page).read_text(encoding="utf-8").split())
        assert "1 diverged" in text and "1 failed" in text and "1 interrupted" in text
        assert "optimizer step 2: loss is nan" in text and "task.max_prompt_tokens=1" in text


def test_a_diverged_run_keeps_its_evidence_and_enters_no_mean(troubled):
    rows = troubled.runs[troubled.runs["status"] == "diverged"]
    assert rows["step"].tolist() == [1] and rows["loss"].isna().all() and rows["reward/mean"].notna().all()
    assert set(troubled.finished(troubled.runs)["status"]) == {"done"}


# --- what may be claimed ---------------------------------------------------------------------------------------------


def captions(sweep):
    with figure_style():
        return {drawing.name: drawing.caption for drawing in all_figures(sweep)}


def test_n_the_interval_and_the_statistic_stand_in_every_caption(tmp_path):
    cells = [synthetic.Cell(name, "tiny_moe", seed) for name in ("grpo", "grpo_replay", "gspo") for seed in range(4)]
    found = captions(read_sweep(synthetic.write_sweep(tmp_path / "s", cells)))
    assert len(found) == 10
    for caption in found.values():
        assert re.search(r"\bn\s=\s4\b|n stands beside", caption)
        assert re.search(r"\bmeans?\b|the share of runs", caption)
        assert re.search(r"95 % (bootstrap |t )?interval", caption)


def test_of_single_runs_no_mean_no_interval_and_no_ranking_is_claimed(sweep):
    found = captions(sweep)
    assert len(found) == 6
    for name, caption in found.items():
        assert re.search(r"\bn\s=\s1\b|n stands beside", caption), name
        assert "95 %" not in caption or name == "budget_by_phase", caption
    overview = score_overview(sweep).frame
    assert not overview.map(lambda score: "[" in str(score)).any().any()
    assert {verdict.outcome for verdict in headline_verdicts(sweep)} == {"too few"}
    assert all("nothing is ranked" in sentence for sentence in headlines(headline_verdicts(sweep)))
