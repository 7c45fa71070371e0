"""Importance ratio x surrogate x aggregation -> the policy loss and its metrics.

All tensors are [B, T] float32: B sequences, T completion positions, ``mask`` 1 at valid ones. The registered parts:

- ratio: ``fn(logprobs, old_logprobs, mask) -> ratio`` [B, T]
- surrogate: ``fn(ratio, advantages, logprobs, **settings) -> (loss, clipped_low, clipped_high, outside)``, each [B, T];
  ``clipped_*`` say where clipping removes the gradient, ``outside`` where the ratio has left the band
- aggregation: ``fn(mask, **settings) -> weights`` [B, T] over a whole optimizer batch; the loss is the weighted sum, so
  it does not depend on how that batch is cut into micro-batches
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.algorithms.correction import mismatch_metrics
from harness.algorithms.divergence import LOG_RATIO_BOUND, kl_divergence
from harness.algorithms.metrics import Metrics
from harness.algorithms.registry import part, register

if TYPE_CHECKING:
    from harness.config import AlgorithmConfig


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: "AlgorithmConfig",
    *,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one whole optimizer batch.

    Args:
        logprobs: [B, T] log-probabilities under the policy that is trained; gradients flow through them.
        old_logprobs: [B, T] under the policy that sampled.
        advantages: [B, T], constant.
        mask: [B, T], 1 at valid completion positions.
        config: the algorithm.
        rollout_logprobs: [B, T] as the rollout engine computed them; without them the correction's weight is 1.
        ref_logprobs: [B, T] under the reference policy; needed where the KL penalty is in the loss.

    Returns:
        the scalar loss, and metrics by name (clip fractions, ratios).
    """
    weights = aggregation_weights(mask, config)
    loss, metrics = weighted_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        weights,
        config,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
    )
    return loss, metrics.compute()


def aggregation_weights(mask: Tensor, config: "AlgorithmConfig") -> Tensor:
    """[B, T] weights of a whole optimizer batch's elements; rows may then be cut into micro-batches."""
    function, settings = part("aggregation", config.aggregation)
    return function(mask, **settings)


def weighted_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    config: "AlgorithmConfig",
    *,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """A micro-batch's share of the loss: the sum over its rows, with the optimizer batch's ``weights`` [B, T].

    Arguments and metrics otherwise as in :func:`policy_loss`; the shares of all micro-batches add up to its loss.
    """
    ratio_function, ratio_settings = part("ratio", config.ratio)
    surrogate, surrogate_settings = part("surrogate", config.surrogate)
    ratio = ratio_function(logprobs, old_logprobs, mask, **ratio_settings)
    element_loss, low, high, outside = surrogate(ratio, advantages, logprobs, **surrogate_settings)

    if rollout_logprobs is not None:
        correction, correction_settings = part("correction", config.correction)
        log_ratio = (old_logprobs - rollout_logprobs).detach()
        element_loss = element_loss * correction(log_ratio, mask, **correction_settings)
    if ref_logprobs is not None and config.kl.placement == "loss":
        element_loss = element_loss + config.kl.coefficient * kl_divergence(logprobs, ref_logprobs, config.kl.estimator)
    # where, not a product: a masked position may hold anything, and 0 x inf would be NaN.
    loss = torch.where(mask.bool(), element_loss * weights, torch.zeros_like(element_loss)).sum()

    metrics = _ratio_metrics(ratio.detach(), low, high, outside, mask)
    kl_old = kl_divergence(old_logprobs, logprobs.detach(), "k3")
    metrics.mean("kl/policy_old", torch.where(mask.bool(), kl_old, torch.zeros_like(kl_old)).sum(), mask.sum())
    if rollout_logprobs is not None:
        metrics.update(mismatch_metrics(old_logprobs, rollout_logprobs, mask))
    if ref_logprobs is not None:
        kl = kl_divergence(logprobs.detach(), ref_logprobs, config.kl.estimator)
        metrics.mean("kl/reference", (kl * mask).sum(), mask.sum())
    return loss, metrics


def _ratio_metrics(ratio: Tensor, low: Tensor, high: Tensor, outside: Tensor, mask: Tensor) -> Metrics:
    valid = mask.bool()
    tokens = mask.sum()
    low, high = low & valid, high & valid
    metrics = Metrics()
    metrics.mean("clip_fraction/token", (low | high).sum(), tokens)
    metrics.mean("clip_fraction/low", low.sum(), tokens)
    metrics.mean("clip_fraction/high", high.sum(), tokens)
    metrics.mean("clip_fraction/sequence", (low | high).any(1).sum(), float(len(mask)))
    metrics.mean("ratio/outside_fraction", (outside & valid).sum(), tokens)
    metrics.maximum("ratio/max", ratio.masked_fill(~valid, 0.0).max())
    metrics.minimum("ratio/min", ratio.masked_fill(~valid, torch.inf).min())
    return metrics


@register("ratio", "token")
def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(l - l_old), one a token (PPO, GRPO)."""
    return _bounded_exp(torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs)))


@register("ratio", "sequence")
def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(pi / pi_old)^(1/|y|), one a sequence (GSPO, arXiv 2507.18071, eq. 7); the gradient goes through the mean."""
    return _bounded_exp(_mean_log_ratio(logprobs, old_logprobs, mask)).expand_as(logprobs)


@register("ratio", "sequence_token")
def sequence_token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """sg[s_i] exp(l - sg[l]): the sequence's ratio with each token's own gradient (GSPO-token, eq. 14)."""
    sequence = _bounded_exp(_mean_log_ratio(logprobs, old_logprobs, mask)).detach()
    change = torch.where(mask.bool(), logprobs - logprobs.detach(), torch.zeros_like(logprobs))
    return sequence * change.exp()


def _mean_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs))
    return log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


@register("surrogate", "clip", clips=True)
def clip(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347, eq. 7)."""
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return loss, below & (advantages < 0), above & (advantages > 0), below | above


@register("surrogate", "none")
def none(ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-A l, the plain policy gradient (REINFORCE); it clips nothing."""
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return -advantages * logprobs, nowhere, nowhere, nowhere


@register("aggregation", "sequence_mean")
def sequence_mean(mask: Tensor) -> Tensor:
    """mean_i (sum_t m l_it / sum_t m): each sequence counts the same (GRPO, GSPO)."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


@register("aggregation", "token_mean")
def token_mean(mask: Tensor) -> Tensor:
    """sum m l / sum m: each token counts the same (DAPO)."""
    return mask / mask.sum().clamp(min=1)


@register("aggregation", "sequence_sum")
def sequence_sum(mask: Tensor) -> Tensor:
    """mean_i sum_t m l_it."""
    return mask / len(mask)


@register("aggregation", "constant_length")
def constant_length(mask: Tensor, *, length: int) -> Tensor:
    """sum m l / (B L): no length normalisation (Dr. GRPO, arXiv 2503.20783)."""
    return mask / (len(mask) * length)
