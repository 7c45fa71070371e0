"""No phase waits for the device before its end.

A network on torch's `meta` device stands in for one on a GPU: its tensors have shapes but no numbers, so that whatever
asks for a number, or for a shape that depends on numbers, raises.
"""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from harness.algorithms.metrics import Metrics
from harness.budget import Meter
from harness.config import BudgetConfig, compose
from harness.judging import Judge
from harness.policy.critic import Critic
from harness.policy.flops import critic_cost, policy_cost
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.policy.routing import padding_routes
from harness.update import CriticUpdater, PolicyUpdater, Targets
from tests.policy.conftest import fresh, make_batch

MODELS = ("tiny_dense", "tiny_moe")
ALGORITHMS = ("grpo", "gspo", "ppo", "clip_cov", "grpo_kl", "grpo_tis")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def policy(name):
    model = fresh(name)
    fuse_normalization(model)
    drop_padding(model)
    return model.to("meta", torch.bfloat16)  # which off the CPU grouped products of experts must have


@pytest.fixture
def batch(policy):
    batch = make_batch(group_size=3)
    if any(parameter.ndim == 3 for parameter in policy.parameters()):
        config = policy.config
        like = torch.zeros(config.num_hidden_layers, config.num_experts_per_tok, dtype=torch.int16)
        batch.routes = padding_routes(*batch.input_ids.shape, like=like)
    return batch


def targets(batch):
    numbers = torch.randn(*batch.mask.shape, generator=torch.Generator().manual_seed(0))
    return Targets(numbers, numbers, numbers, numbers, numbers, routes=batch.routes)


@pytest.fixture(autouse=True)
def _on_meta(monkeypatch):
    """Autocast and the fused optimizer want a real device; neither is what is looked at."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr("torch.optim.AdamW", lambda *args, fused, **settings: adamw(*args, **settings))
    monkeypatch.setattr("harness.policy.logprobs.autocast", lambda device: nullcontext())


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [*itertools.product(MODELS, ALGORITHMS), ("tiny_moe", "grpo_rollout_routing_replay")],
    indirect=["name"],
)
def test_gradients_of_an_optimizer_batch(name, policy, batch, algorithm):
    config = compose([f"algorithm={algorithm}", f"model={name}", "algorithm.entropy_coefficient=0.01"])
    updater = PolicyUpdater(policy, config, Meter(BudgetConfig("updates", {"updates": 1}), torch.device("cpu")).paused)
    updater.updates = 1  # not the first one, so that expert changes are measured
    loss = updater.backward(batch, targets(batch), torch.randperm(len(batch.mask)), Metrics())
    assert loss.is_meta and all(parameter.grad.is_meta for parameter in policy.parameters())
    with pytest.raises(RuntimeError):
        float(loss)


def test_gradients_of_the_critic(policy, batch):
    updater = CriticUpdater(Critic(policy).to("meta"), compose(["algorithm=ppo"]))
    loss = updater.backward(batch, targets(batch), torch.randperm(len(batch.mask)), Metrics())
    assert loss.is_meta


@pytest.mark.parametrize("algorithm", ["grpo", "grpo_routing_replay"])
def test_old_log_probabilities(policy, batch, algorithm, monkeypatch):
    """All passes are under way before the first result is fetched."""
    config = compose([f"algorithm={algorithm}", "model=tiny_moe"])
    config.model.micro_batch_sequences = 1
    monkeypatch.setattr("harness.judging._SEQUENCES", 2)
    batch = replace(batch, routes=None)
    meter = Meter(config.budget, torch.device("cpu"))
    judge = Judge(config, meter, policy, policy_cost(policy), None, None, None)
    passes, fetched = [], []
    policy.base_model.register_forward_hook(lambda *_: passes.append(len(fetched)))

    def fetch(tensor):
        fetched.append(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", fetch)
    with torch.no_grad():
        judge._old_logprobs(batch)
    assert passes == [0, 0, 0] and len(fetched) >= 3


def test_values(policy, batch):
    critic = Critic(policy).to("meta")
    assert critic_cost(critic, policy.config).batch(batch) > 0
    with torch.no_grad():
        assert critic(batch).is_meta
