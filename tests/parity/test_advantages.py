"""The same advantages as TRL and verl."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from harness.algorithms.registry import part
from harness.budget import Meter
from harness.config import compose
from harness.judging import Judge
from harness.rollout.batch import Batch
from tests.parity.inputs import Inputs, Rollouts, rollouts
from tests.parity.peers import trl_scores, verl_advantages
from tests.parity.peers import verl as verl_core


class Case(NamedTuple):
    """An advantage of the harness and its equal; both are [B, T] and 0 where masked."""

    config: dict[str, Any]
    peer: Callable[[Rollouts], Tensor]
    dense: bool = False  # rewards for every token
    even: bool = False  # groups of one size, side by side


def verl(name: str, **settings: Any) -> Callable[[Rollouts], Tensor]:
    return lambda batch: verl_advantages(name, batch, **settings)[0]


def trl(name: str, **options: Any) -> Callable[[Rollouts], Tensor]:
    def advantages(batch: Rollouts) -> Tensor:
        scores = trl_scores(name, Inputs(*[batch.mask] * 6), batch.rewards.sum(1), **options, **GROUPS_OF_THREE)
        return scores["advantages"].unsqueeze(1) * batch.mask

    return advantages


def group(scale: str, epsilon: float) -> dict[str, Any]:
    return {"name": "group", "scale": scale, "epsilon": epsilon}


GROUPS_OF_THREE = {"num_generations": 3, "per_device_train_batch_size": 3}
GAMMA = SimpleNamespace(gamma=1.0)  # as verl's estimators ask for it

CASES = {
    "verl-group": Case(group("std", 1e-6), verl("grpo")),
    "verl-group-unscaled": Case(group("none", 1e-6), verl("grpo", norm_adv_by_std_in_grpo=False)),
    "trl-group": Case(group("std", 1e-4), trl("GRPO", scale_rewards="group"), even=True),
    "trl-group-unscaled": Case(group("none", 1e-6), trl("GRPO", scale_rewards="none"), even=True),
    "trl-group-batch": Case(group("batch", 1e-4), trl("GRPO", scale_rewards="batch"), even=True),
    "verl-leave_one_out": Case({"name": "leave_one_out"}, verl("rloo")),
    "trl-leave_one_out": Case({"name": "leave_one_out"}, trl("RLOO", beta=0.0), even=True),
    "verl-optimal_baseline": Case({"name": "optimal_baseline"}, verl("opo")),
    "verl-whitened_return": Case({"name": "whitened_return"}, verl("reinforce_plus_plus", config=GAMMA), dense=True),
    "verl-whitened_group": Case({"name": "whitened_group"}, verl("reinforce_plus_plus_baseline")),
    "verl-gae": Case(
        {"name": "gae", "gamma": 0.97, "lam": 0.9, "whiten": True}, verl("gae", gamma=0.97, lam=0.9), True
    ),
    "verl-reward": Case({"name": "reward"}, verl("remax", reward_baselines=torch.zeros(1)), dense=True),
}


@pytest.mark.parametrize("name", CASES)
def test_advantages_are_the_same(name):
    config, peer, dense, even = CASES[name]
    function, settings = part("advantage", config)
    for batch in rollouts(dense, even):
        ours = function(batch.rewards, batch.ends, batch.group_ids, batch.mask, batch.values, **settings)[0]
        torch.testing.assert_close(ours, peer(batch) * batch.mask, rtol=1e-5, atol=1e-7)


def test_the_critics_returns_are_the_same():
    function, settings = part("advantage", CASES["verl-gae"].config)
    for batch in rollouts(dense=True):
        ours = function(batch.rewards, batch.ends, batch.group_ids, batch.mask, batch.values, **settings)[1]
        theirs = verl_advantages("gae", batch, gamma=0.97, lam=0.9)[1]
        torch.testing.assert_close(ours, theirs * batch.mask, rtol=1e-5, atol=1e-12)


def judged(overrides: list[str], batch: Rollouts, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The advantages that the harness gives to a batch from its log-probabilities."""
    config = compose([*overrides, "algorithm.old_logprobs=rollout"])
    judge = Judge(config, Meter(config.budget, torch.device("cpu")), *[None] * 5)
    judge._reference = lambda batch: ref_logprobs
    sampled = Batch(*[batch.mask] * 3, batch.mask, batch.group_ids, old_logprobs)
    return judge.judge(sampled, SimpleNamespace(tokens=batch.rewards, ends=batch.ends)).advantages


KL_IN_REWARD = ["algorithm.kl.placement=reward", "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=k1"]


def test_a_penalty_in_the_reward_is_that_of_verl():
    core = verl_core()
    for batch in rollouts():
        old_logprobs, ref_logprobs = batch.values - 5, batch.values.flip(0) - 5
        rewards = core.compute_rewards(batch.rewards, old_logprobs, ref_logprobs, 0.1)
        theirs = verl_advantages("reinforce_plus_plus", batch._replace(rewards=rewards), config=GAMMA)[0]
        ours = judged(["algorithm=reinforce_plus_plus", *KL_IN_REWARD], batch, old_logprobs, ref_logprobs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_penalty_in_the_reward_is_that_of_trl():
    for batch in rollouts(even=True):
        old_logprobs, ref_logprobs = batch.values - 5, batch.values.flip(0) - 5
        inputs = Inputs(*[batch.mask] * 6)._replace(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        theirs = trl_scores("RLOO", inputs, batch.rewards.sum(1), beta=0.1, **GROUPS_OF_THREE)["advantages"]
        ours = judged(["algorithm=rloo", *KL_IN_REWARD], batch, old_logprobs, ref_logprobs)
        torch.testing.assert_close(ours, theirs.unsqueeze(1) * batch.mask, rtol=1e-5, atol=1e-7)
