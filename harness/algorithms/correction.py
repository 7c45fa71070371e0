"""Rollout/trainer mismatch: weights for samples whose sampler and trainer disagree about likelihoods.

A registered correction is called as ``fn(log_ratio, mask, **settings) -> weights`` with ``log_ratio`` [B, T] =
old_logprobs - rollout_logprobs and ``weights`` [B, T], float32 both. Weights carry no gradient and
multiply the policy loss alone.
"""

from typing import Literal

import torch
from torch import Tensor

from harness.algorithms.divergence import LOG_RATIO_BOUND, kl_divergence
from harness.algorithms.metrics import Metrics
from harness.algorithms.registry import register
from harness.typed_values import NotNegative, Positive


@register("correction", "none")
def none(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Weight 1: the sampler and the trainer are taken to agree."""
    return torch.ones_like(log_ratio)


@register("correction", "truncate")
def truncate(log_ratio: Tensor, mask: Tensor, *, level: Literal["token", "sequence"], cap: Positive) -> Tensor:
    """Truncated importance sampling: min(w, cap), ``level`` token or sequence (TIS)."""
    return _weights(log_ratio, mask, level).clamp(max=cap)


@register("correction", "mask", ordered=("low", "high"))
def band(
    log_ratio: Tensor, mask: Tensor, *, level: Literal["token", "sequence"], low: NotNegative, high: NotNegative
) -> Tensor:
    """w inside [low, high] and 0 outside, ``level`` token or sequence (IcePop, arXiv 2510.18855)."""
    weights = _weights(log_ratio, mask, level)
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def _weights(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    log_ratio = log_ratio * mask
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far the sampler's log-probabilities are from the trainer's, [B, T] each, in nats: mean, maximum and k3."""
    log_ratio = (old_logprobs - rollout_logprobs) * mask
    count = mask.sum()
    metrics = Metrics()
    metrics.mean("mismatch/logprob_abs_mean", log_ratio.abs().sum(), count)
    metrics.maximum("mismatch/logprob_abs_max", log_ratio.abs().max())
    metrics.mean("mismatch/kl", (kl_divergence(rollout_logprobs, old_logprobs, "k3") * mask).sum(), count)
    return metrics
