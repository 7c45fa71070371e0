"""The harness's side of the comparison, and the comparison itself."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.algorithms.objective import policy_loss
from harness.config import AlgorithmConfig, compose
from tests.parity.inputs import Inputs
from tests.parity.peers import Loss

# Changes of an entry.
TOKEN_MEAN = {"aggregation": {"name": "token_mean"}}
SEQUENCE_MEAN = {"aggregation": {"name": "sequence_mean"}}
SEQUENCE_SUM = {"aggregation": {"name": "sequence_sum"}}
GSPO_TOKEN = {"ratio": {"name": "sequence_token"}}
# The band of grpo and gspo in the peers' words.
GRPO_CLIP = {"epsilon": 0.2, "epsilon_high": 0.27}
GSPO_CLIP = {"epsilon": 3e-4, "epsilon_high": 4e-4}
# verl's vanilla loss always has a second bound on what a negative advantage may lose; this one is out of reach.
VANILLA = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.27, "clip_ratio_c": 1e9}
VERL_GSPO = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}


@cache
def entry(name: str) -> AlgorithmConfig:
    """An entry of conf/algorithm as it is."""
    return compose([f"algorithm={name}"]).algorithm


def algorithm(name: str, **parts: Any) -> AlgorithmConfig:
    """An entry with some parts replaced, or with some settings of a part: ``surrogate={"clip_low": 0.1}``."""
    config = entry(name)
    for key, change in parts.items():
        value = getattr(config, key)
        if isinstance(value, dict):
            parts[key] = change if "name" in change else {**value, **change}
        elif isinstance(change, dict):
            parts[key] = replace(value, **change)
    return replace(config, **parts)


def harness_loss(name: str, **parts: Any) -> Loss:
    """The loss of an :func:`algorithm`, with its rollout correction and KL penalty if it has them."""

    def loss(inputs: Inputs) -> tuple[Tensor, dict[str, float]]:
        config = algorithm(name, **parts)
        return policy_loss(
            inputs.logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.mask,
            config,
            rollout_logprobs=inputs.rollout_logprobs if config.correction["name"] != "none" else None,
            ref_logprobs=inputs.ref_logprobs if config.kl.coefficient else None,
        )

    return loss


def differentiate(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss, its gradient with respect to the log-probabilities [B, T], and the metrics."""
    logprobs = inputs.logprobs.clone().requires_grad_()
    value, metrics = loss(inputs._replace(logprobs=logprobs))
    value.backward()
    assert logprobs.grad is not None
    return value.detach(), logprobs.grad, metrics


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all elements agree to 1e-5 relative."""
    return torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-12)


def assert_same(ours: Loss, theirs: Loss, inputs: Inputs) -> None:
    """Loss and every element of its gradient agree to 1e-5 relative."""
    ours_value, ours_gradient, _ = differentiate(ours, inputs)
    their_value, their_gradient, _ = differentiate(theirs, inputs)
    torch.testing.assert_close(ours_value, their_value.double(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(ours_gradient, their_gradient, rtol=1e-5, atol=1e-12)
