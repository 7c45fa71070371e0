"""The same code on a CUDA device. These tests need one."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

from harness.algorithms.metrics import Metrics
from harness.config import compose
from harness.policy.experts import follow_autocast
from harness.policy.logprobs import completion_logprobs
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.rollout.embedded import EmbeddedEngine
from harness.runs.directory import METRICS
from harness.torch_setup import set_up_torch
from harness.update import PolicyUpdater, Targets
from tests.policy.conftest import fresh
from tests.tiny_run import lines, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EOS, PAD, MOST = 1, 0, 48


@pytest.fixture(autouse=True)
def _as_a_run_has_it():
    set_up_torch(1)


@pytest.mark.parametrize(
    "cell",
    [
        "algorithm=gspo model=tiny_dense",
        "algorithm=ppo model=tiny_moe",
        "algorithm=grpo_routing_replay model=tiny_moe",
        "algorithm=grpo_rollout_routing_replay model=tiny_moe",
        "algorithm=gspo model=tiny_moe rollout.cuda_graphs=false",
        "algorithm=gspo model=tiny_dense model.activation_checkpointing=true evaluation.fractions=[1.0]",
    ],
)
def test_a_run_on_the_gpu_is_done_and_its_sampler_and_trainer_agree(cold_starts, tmp_path, cell):
    directory = run(tmp_path, "device=cuda", *cell.split())
    rows = lines(directory, METRICS)
    assert len(rows) == 2
    assert all(row["mismatch/logprob_abs_mean"] < 0.05 for row in rows)  # bfloat16 keeps two to three digits


def on_gpu(name):
    model = fresh(name)
    with torch.no_grad():  # so that sequences end at different steps
        model.lm_head.weight[EOS] += 0.05
    fuse_normalization(model)
    drop_padding(model)
    model.to("cuda")
    follow_autocast(model)
    return model


def sample(model, seed, graphs=True, record_routes=False):
    config = compose().rollout
    config.cuda_graphs = graphs
    engine = EmbeddedEngine(model, config, (EOS,), PAD, MOST, record_routes)
    prompts = [[5 + row % 9, 6, 7][: 1 + row % 3] for row in range(32)]
    return [engine.generate(prompts, 8, torch.Generator().manual_seed(seed)) for _ in range(2)], engine


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_graphs_sample_what_the_trainer_finds_likely(name, monkeypatch):
    monkeypatch.setattr("harness.rollout.graphs._LOOK", 4)  # so that graphs of fewer rows take over
    model = on_gpu(name)
    (first, again), engine = sample(model, 0, record_routes=name == "tiny_moe")
    assert len(engine.graphs._steps) > 1
    assert torch.equal(first.completions, again.completions)  # recorded while it ran first
    for batch in (first, *sample(model, 0, graphs=False)[0]):
        with torch.no_grad():
            logprobs = completion_logprobs(model, batch, 1.0)[0].cpu()
        assert ((batch.rollout_logprobs - logprobs).abs() * batch.mask).sum() / batch.mask.sum() < 0.05


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_an_update_waits_for_the_device_once(name):
    """When it asks whether all of its steps were finite."""
    model = on_gpu(name)
    (batch, _), _ = sample(model, 0)
    advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    targets = Targets(batch.rollout_logprobs, advantages)
    updater = PolicyUpdater(copy.deepcopy(model), compose(["algorithm=gspo", f"model={name}"]), nullcontext)
    updater.update(batch, targets, torch.Generator().manual_seed(0), Metrics())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            updater.update(batch, targets, torch.Generator().manual_seed(0), Metrics())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits
