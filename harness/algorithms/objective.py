"""Importance ratio x surrogate x aggregation -> the policy loss and its metrics.

All tensors are [B, T] float32: B sequences, T completion positions, ``mask`` 1 at valid ones. The registered parts:

- ratio: ``fn(logprobs, old_logprobs, mask) -> ratio`` [B, T]
- surrogate: ``fn(elements, **settings) -> Surrogate`` of :class:`Elements` (harness/algorithms/surrogates.py)
- aggregation: ``fn(mask, **settings) -> weights`` [B, T] over a whole optimizer batch; the loss is the weighted sum, so
  it does not depend on how that batch is cut into micro-batches

A masked position may hold anything; ratios and surrogates are given zeros there.

Traits: ``sequence_level`` (one ratio or loss a sequence), ``sequence_weight`` (one weight a sequence, by the sign of
its advantage), ``clips`` (a surrogate whose clipping removes gradients, so that one optimizer step a batch never shows
it), ``needs_selection``.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from harness.algorithms.correction import mismatch_metrics
from harness.algorithms.divergence import LOG_RATIO_BOUND, kl_divergence
from harness.algorithms.metrics import Metrics
from harness.algorithms.registry import call, register
from harness.typed_values import Count

if TYPE_CHECKING:
    from harness.config import AlgorithmConfig


class Elements(NamedTuple):
    """What a surrogate computes its loss from, [B, T] each."""

    ratio: Tensor  # importance ratio; gradients flow through it
    logprobs: Tensor  # under the policy that is trained; gradients flow through them
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor  # 1 at valid positions
    selected: Tensor  # bool, the tokens that the selection chose


class Surrogate(NamedTuple):
    """The loss of each element and what clipping did to it, [B, T] each."""

    loss: Tensor
    clipped_low: Tensor  # bool, where clipping removes the gradient below the band
    clipped_high: Tensor  # bool, likewise above it
    outside: Tensor  # bool, where the ratio has left the band


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
    loss, metrics = weighted_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        aggregation_weights(mask, config),
        selected_tokens(advantages, old_logprobs, mask, config),
        config,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
    )
    return loss, metrics.compute()


def aggregation_weights(mask: Tensor, config: "AlgorithmConfig") -> Tensor:
    """[B, T] weights of a whole optimizer batch's elements; rows may then be cut into micro-batches."""
    return call("aggregation", config.aggregation, mask, like=mask)


def selected_tokens(advantages: Tensor, old_logprobs: Tensor, mask: Tensor, config: "AlgorithmConfig") -> Tensor:
    """[B, T] which tokens of a whole optimizer batch the surrogate treats apart; rows may then be cut alike."""
    return call("selection", config.selection, advantages, old_logprobs, mask, like=mask.bool())


def weighted_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    selected: Tensor,
    config: "AlgorithmConfig",
    *,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """A micro-batch's share of the loss: the sum over its rows, with the optimizer batch's ``weights``, ``selected``.

    Arguments and metrics otherwise as in :func:`policy_loss`; the shares of all micro-batches add up to its loss.
    """

    def valid(values: Tensor) -> Tensor:
        # where, not a product: 0 x inf would be NaN. Before all else, so that NaN does not come back as a gradient.
        return torch.where(mask.bool(), values, torch.zeros_like(values))

    logprobs, old_logprobs, advantages = valid(logprobs), valid(old_logprobs), valid(advantages)
    ratio = call("ratio", config.ratio, logprobs, old_logprobs, mask, like=logprobs)
    elements = Elements(ratio, logprobs, old_logprobs, advantages, mask, selected)
    element_loss, low, high, outside = call(
        "surrogate", config.surrogate, elements, like=Surrogate(logprobs, selected, selected, selected)
    )

    metrics = _ratio_metrics(ratio.detach(), low, high, outside, mask)
    kl_old = kl_divergence(old_logprobs, logprobs.detach(), "k3")
    metrics.mean("kl/policy_old", (kl_old * mask).sum(), mask.sum())
    if rollout_logprobs is not None:
        rollout_logprobs = valid(rollout_logprobs)
        log_ratio = old_logprobs - rollout_logprobs
        element_loss = element_loss * call("correction", config.correction, log_ratio, mask, like=log_ratio)
        metrics.update(mismatch_metrics(old_logprobs, rollout_logprobs, mask))
    if ref_logprobs is not None:
        kl = kl_divergence(logprobs, valid(ref_logprobs), config.kl.estimator)
        metrics.mean("kl/reference", (kl * mask).sum(), mask.sum())
        if config.kl.placement == "loss":
            element_loss = element_loss + config.kl.coefficient * (kl * ratio if config.kl.importance_weighted else kl)
    return (element_loss * weights).sum(), metrics


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


@register("ratio", "token", token_level=True)
def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(l - l_old), one a token (PPO, GRPO)."""
    return _bounded_exp(logprobs - old_logprobs)


@register("ratio", "sequence", sequence_level=True)
def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(pi / pi_old)^(1/|y|), one a sequence (GSPO, arXiv 2507.18071, eq. 7); the gradient goes through the mean."""
    return _bounded_exp(_mean_log_ratio(logprobs, old_logprobs, mask)).expand_as(logprobs)


@register("ratio", "sequence_token")
def sequence_token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """sg[s_i] exp(l - sg[l]): the sequence's ratio with each token's own gradient (GSPO-token, eq. 14)."""
    sequence = _bounded_exp(_mean_log_ratio(logprobs, old_logprobs, mask)).detach()
    return sequence * (logprobs - logprobs.detach()).exp()


def _mean_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (logprobs - old_logprobs).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


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
def constant_length(mask: Tensor, *, length: Count) -> Tensor:
    """sum m l / (B L): no length normalisation (Dr. GRPO, arXiv 2503.20783)."""
    return mask / (len(mask) * length)
