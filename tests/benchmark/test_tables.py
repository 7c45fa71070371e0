"""Every table at a size that says nothing about speed: its work is the right one, and its columns are there."""

import dataclasses
import json
import os
from datetime import UTC, datetime
from importlib.util import find_spec

import pytest
import torch

from harness.benchmark import growth, logprobs, overhead, profile, report, rollout, step, sweep, update
from harness.benchmark.sharing import distinct
from harness.benchmark.sizes import TINY
from harness.benchmark.synthetic import write_sweep
from harness.benchmark.table import Options
from harness.benchmark.training import WholeSteps, run_config
from harness.errors import ConfigError
from harness.policy.attention import is_padding_free
from harness.policy.kernels.cpu import attention, decoding, elements, experts, products, vocabulary
from harness.policy.kernels.cpu.lanes import _VERSION
from harness.policy.logprobs import token_logprobs
from harness.policy.normalization import RMSNorm
from harness.rollout.batch import join
from harness.runs import load_evaluations, load_runs
from harness.runs.reading import load_cells

pytestmark = pytest.mark.usefixtures("cold_starts")
LENGTH = 8  # tokens to which TINY cuts completions
OPTIONS = Options(repetitions=2, sizes=TINY, device="cpu", shapes=(), sweep=None)
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="compares with TRL, from the extra")


def columns(rows):
    (names,) = {tuple(row) for row in rows}
    return set(names)


def test_our_steps_have_four_optimizer_steps_and_fixed_lengths_are_full():
    steps = WholeSteps("tiny_dense", "fixed", TINY)
    before = steps.trainer.meter.spent["updates"]
    measured = steps()
    assert steps.trainer.meter.spent["updates"] - before == 4 * TINY.batches
    assert measured["tokens a completion"] == LENGTH
    assert measured["tokens/s"] == pytest.approx(LENGTH * TINY.completions * TINY.batches / measured["seconds"])
    shares = [measured[f"{phase} share"] for phase in ("rollout", "reward", "old_logprobs", "update")]
    assert all(share > 0 for share in shares) and sum(shares) < 1


def test_rollout_log_probabilities_cost_no_pass():
    measured = WholeSteps("tiny_moe", "natural", TINY, ["algorithm.old_logprobs=rollout"])()
    assert measured["old_logprobs share"] == 0 and measured["tokens a completion"] <= LENGTH


@needs_trl
@pytest.mark.parametrize("lengths", ["fixed", "natural"])
def test_trl_does_the_same_work(lengths):
    from harness.benchmark.trl_side import TrlSteps

    theirs = TrlSteps("tiny_dense", lengths, TINY)
    arguments, algorithm = theirs.trainer.args, run_config("tiny_dense", TINY).algorithm
    assert (arguments.generation_batch_size, arguments.per_device_train_batch_size) == (TINY.completions, 4)
    assert (arguments.steps_per_generation, arguments.num_iterations) == (4, 1)
    assert arguments.gradient_accumulation_steps == 1 and arguments.epsilon_high == algorithm.surrogate["clip_high"]
    assert arguments.loss_type == "grpo" and not arguments.activation_checkpointing
    prompts = [row["prompt"] for row in theirs.trainer.train_dataset]
    ours = WholeSteps("tiny_dense", lengths, TINY)
    taken = ours.trainer.prompts.position  # by the step that warms up
    ours.trainer.prompts.seek(0)
    assert [problem.prompt for problem in ours.trainer.prompts.take(taken)] == prompts[:taken]
    measured = theirs()
    assert theirs.trainer.state.global_step == 4 * (1 + TINY.batches)
    assert measured["tokens a completion"] <= LENGTH
    assert (measured["tokens a completion"] == LENGTH) == (lengths == "fixed")
    for name, weights in ours.trainer.policy.state_dict().items():
        assert torch.allclose(weights, theirs.trainer.model.state_dict()[name], atol=1e-6)


@needs_trl
@pytest.mark.slow
def test_step_table_has_a_row_for_each_source_of_old_log_probabilities():
    rows = step.compare("tiny_dense", "natural", OPTIONS)
    assert [row["old log-probabilities"] for row in rows] == ["trainer", "rollout"]
    assert {"ours, tokens/s", "TRL, tokens/s", "ratio", "goal", "reached"} < columns(rows)
    assert rows[0]["goal"] == "at least 3" and len(rows[0]["ratio"].values) == 2
    assert rows[0]["TRL, tokens/s"] == rows[1]["TRL, tokens/s"]


def test_step_table_says_what_to_install(monkeypatch):
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        step.tables(OPTIONS)


def test_update_is_held_against_the_peak():
    row = update.compare("tiny_dense", "fixed", OPTIONS)
    assert (row["update, GFLOP/s"] / row["peak, GFLOP/s"]).values == pytest.approx(row["share"].values)
    assert all(peak >= 1 for peak in (row["peak, GFLOP/s"] / row["torch.mm, GFLOP/s"]).values)
    assert row["goal"] == "at least 0.5" and row["reached"] == "no"
    assert 0.5 < row["distinct tokens"] < 1  # prompts are all different, but some begin alike


@pytest.mark.parametrize("logprobs", [False, True])
def test_generate_does_the_same_work_as_our_rollout(logprobs):
    ours = rollout.OurRollout("tiny_dense", "fixed", TINY)
    theirs = rollout.Generate("tiny_dense", "fixed", TINY, logprobs)
    assert ours()["tokens a completion"] == theirs()["tokens a completion"] == LENGTH
    assert len(ours.prompts) * ours.group_size == TINY.completions
    rows = theirs.inputs["input_ids"].tolist()
    assert [[token for token in row if token != 0] for row in rows] == ours.prompts


def test_generate_runs_on_layers_of_transformers_and_our_sides_on_our_own():
    plain, ours = rollout.Generate("tiny_moe", "fixed", TINY, False).policy, WholeSteps("tiny_moe", "fixed", TINY)
    assert not any(type(module).__module__.startswith("harness.") for module in plain.modules())
    assert plain.config._attn_implementation == plain.base_model.config._attn_implementation == "sdpa"
    assert plain.config._experts_implementation == "grouped_mm"
    for policy in (ours.trainer.policy, growth.Updates(TINY).updater.policy):
        assert is_padding_free(policy.base_model)
        assert any(isinstance(module, RMSNorm) for module in policy.modules())


def test_generate_counts_tokens_to_the_end_of_each_completion():
    theirs = rollout.Generate("tiny_dense", "natural", TINY, logprobs=False)
    theirs.eos = 5  # any token ends a completion in hindsight
    torch.manual_seed(0)
    measured = theirs()["tokens a completion"]
    torch.manual_seed(0)
    sequences = theirs.policy.generate(**theirs.inputs, generation_config=theirs.settings).sequences
    lengths = []
    for row in sequences[:, theirs.inputs["input_ids"].shape[1] :].tolist():
        lengths.append(row.index(5) + 1 if 5 in row else len(row))
    assert measured == sum(lengths) / len(lengths) and min(lengths) < LENGTH


def test_log_probabilities_of_generated_logits():
    logits = torch.randn(3, 2, 5)  # steps, sequences, vocabulary
    completions = torch.tensor([[1, 4, 0], [2, 2, 3]])
    found = rollout.logprobs_of(logits.unbind(0), completions)
    assert found[1, 2] == pytest.approx(float(logits[2, 1].log_softmax(-1)[3]))


@pytest.mark.slow
def test_rollout_table_has_a_row_with_and_one_without_log_probabilities():
    rows = rollout.compare("tiny_moe", "natural", OPTIONS)
    assert [row["generate"] for row in rows] == ["without log-probabilities", "with log-probabilities"]
    assert all(0 < row["distinct tokens"] < 1 for row in rows)
    assert {"ours, tokens/s", "generate, tokens/s", "ratio", "goal", "reached"} < columns(rows)


def test_holding_logits_gives_the_same_numbers_and_gradients():
    found = []
    for function in (token_logprobs, logprobs.holding_logits):
        torch.manual_seed(0)
        states, head = torch.randn(300, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=False)
        values, entropy = function(states, head, torch.arange(300) % 50, 0.7)
        values.sum().backward()
        found.append((values, entropy, states.grad, head.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_log_probability_table_has_memory_and_time():
    (table,) = logprobs.tables(dataclasses.replace(OPTIONS, repetitions=1))  # each is a process of its own
    assert [row[""] for row in table.rows] == ["memory, MiB", "time, s"]
    assert "64 tokens over a vocabulary of 512 from 16 hidden units" in table.text
    assert [row["goal"] for row in table.rows] == ["at most 0.125", "at most 1.2"]


def test_profile_says_where_all_of_a_phases_time_goes():
    (table,) = profile.tables(dataclasses.replace(OPTIONS, repetitions=1))
    assert [row["part"] for row in table.rows] == [*profile.PARTS, profile.REST]
    for column in columns(table.rows) - {"part"}:
        shares = {row["part"]: row[column].median for row in table.rows}
        assert sum(shares.values()) == pytest.approx(1)
        none = {part for part, share in shares.items() if share <= 0}
        assert none == {f"{'experts' if 'dense' in column else 'feed-forward layers'}, in kernels"}


def test_each_operation_of_a_profile_is_of_one_kind_and_torchs_or_a_kernel_of_ours():
    names = [name for part in profile.PARTS.values() for name in part.split()]
    assert len(names) == len(set(names))
    kernels = set()
    for module in (attention, decoding, elements, experts, products, vocabulary):
        # By the version in its name, which parts of kernels have not; one that was profiled here keeps it.
        held = {name for name, held in vars(module).items() if getattr(held, "__qualname__", "").endswith(_VERSION)}
        kernels |= {f"{module.__name__.split('.')[-1]}.{name}" for name in held}
    assert {name for name in names if "." in name} == kernels
    for name in set(names) - kernels:
        space, _, operation = name.rpartition("::")
        assert hasattr(getattr(torch.ops, space or "aten"), operation), name


def test_distinct_tokens_by_hand():
    mask = torch.ones(3, 2)
    batch = join([[5]] * 3, torch.tensor([[6, 7], [6, 7], [8, 9]]), mask, mask, torch.zeros(3, dtype=torch.long), 0)
    assert batch.input_ids.tolist() == [[5, 6], [5, 6], [5, 8]]
    assert distinct([batch]) == 3 / 6
    assert distinct([batch, batch.select(torch.tensor([0, 2]))]) == (3 + 3) / (6 + 4)


def test_growth_changes_one_thing_at_a_time():
    sizes = dataclasses.replace(TINY, sequences=(8, 16), group_sizes=(2, 4), lengths=(16, 32))
    tokens, groups, lengths = (
        [point for point in growth.points(sizes) if point.axis == axis]
        for axis in ("tokens", "group size", "sequence length")
    )
    assert [point.size for point in tokens] == [8 * 48, 16 * 48]
    assert [(point.sequences, point.group_size) for point in groups] == [(16, 2), (32, 4)]
    batches = [growth.random_batch(point) for point in lengths]
    # The last sampled token is not fed back.
    assert [batch.input_ids.shape for batch in batches] == [(32, 15), (32, 31)]
    assert growth.random_batch(groups[1]).group_ids.bincount().tolist() == [4] * 8


def test_growth_table_has_the_slopes_of_seconds_and_flops():
    (table,) = growth.tables(OPTIONS)
    assert [row["what grows"] for row in table.rows] == ["tokens", "group size", "sequence length"]
    assert [row["slope of model FLOPs"] for row in table.rows[:2]] == pytest.approx([1.0, 1.0])
    # 24 tokens and 8, of which 23 and 7 are fed, would be log2(31/15) = 1.05 without attention.
    assert 1.05 < table.rows[2]["slope of model FLOPs"] < 1.3
    assert table.rows[2]["goal"] != "at most 1.1"


def test_overhead_is_what_is_spent_inside_of_metering_and_logging():
    instrumented = overhead.Instrumented("tiny_moe", TINY)
    directory = instrumented.steps.trainer.directory
    lines = directory.line_counts()["metrics.jsonl"]
    measured = instrumented()
    assert directory.line_counts()["metrics.jsonl"] == lines + instrumented.sizes.batches  # it still logs
    assert all(measured[kind] > 0 for kind in ("metering", "logging", "expert changes"))
    assert measured["metering"] + measured["logging"] + measured["expert changes"] < measured["step"]


def test_overhead_of_a_block_is_without_what_it_holds():
    instrumented = overhead.Instrumented("tiny_dense", TINY)
    instrumented.seconds.clear()
    phases = instrumented.steps.trainer.meter.phases["reward"]
    before = phases["seconds"]
    with instrumented.steps.trainer.meter.phase("reward"):
        sum(range(3_000_000))
    held = phases["seconds"] - before
    assert 0 < instrumented.seconds["metering"] < held / 2


def test_synthetic_sweep_reads_like_a_real_one(tmp_path):
    path = write_sweep(tmp_path / "synthetic", seeds=2, steps=4)
    cells, runs = load_cells(path), load_runs(path)
    assert len(cells) == 16 and set(cells["status"]) == {"done"}
    assert len(runs) == 16 * 4 and runs["reward/mean"].notna().all()
    assert len(load_evaluations(path)) == 16 * 5 * 3


@pytest.mark.slow
def test_report_table_has_time_and_memory():
    options = dataclasses.replace(OPTIONS, repetitions=1, sizes=dataclasses.replace(TINY, seeds=3, steps=5))
    (table,) = report.tables(options)
    assert "24 runs with 5 steps" in table.text
    assert [row["goal"] for row in table.rows] == ["at most 60", "at most 2"]
    assert 0.05 < table.rows[1]["report"].median < 2


def record(started, finished, seconds, status="done"):
    spent = {"device_seconds": seconds}
    return {
        "status": status,
        "started": started,
        "finished": finished,
        "budget": {"axis": "flops", "limit": 4e11, "spent": spent},
    }


def test_sweep_is_held_against_what_was_charged_by_how_many_ran_at_once(tmp_path):
    records = {
        "a": record("2026-01-01T00:00:10+00:00", "2026-01-01T00:01:00+00:00", 40.0),
        "b": record("2026-01-01T00:00:12+00:00", "2026-01-01T00:01:40+00:00", 30.0),
        "d": record("2026-01-01T00:01:00+00:00", "2026-01-01T00:01:31+00:00", 30.0),  # once the first one has ended
        "c": {"status": "skipped", "budget": {"axis": "flops", "limit": 1.0}},
    }
    for name, content in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    plan = tmp_path / "sweep.json"
    plan.write_text("{}")
    planned = datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC).timestamp()
    os.utime(plan, (planned, planned))
    (table,) = sweep.tables(dataclasses.replace(OPTIONS, sweep=tmp_path))
    assert table.rows[0] == {
        "a run's budget": "4e+11 flops",
        "cells": 3,
        "at once": 2,
        "wall clock, s": 95.0,
        "charged / at once, s": 50.0,
        "ratio": 1.9,
        "goal": "at most 1.25",
        "reached": "no",
    }
    os.utime(plan)  # a copy's plan is younger than its cells
    (table,) = sweep.tables(dataclasses.replace(OPTIONS, sweep=tmp_path))
    assert table.rows[0]["wall clock, s"] == 90.0


def test_an_unfinished_sweep_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    content = {**record("2026-01-01T00:00:10+00:00", None, 4.0), "status": "running"}
    (tmp_path / "a" / "run.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not ended"):
        sweep.tables(dataclasses.replace(OPTIONS, sweep=tmp_path))
    with pytest.raises(ConfigError, match="--sweep"):
        sweep.tables(OPTIONS)
