"""Surrogates: the loss of each element from its importance ratio and advantage.

rho is the ratio, A the advantage, l the log-probability and sg[.] a constant; all are zero where masked but rho, which
is 1 or the sequence's. *Clipped* is where clipping removes the gradient of an element, *outside* where its ratio has
left the band, whatever the sign of A.
"""

from typing import Literal

import torch
from torch import Tensor

from harness.algorithms.divergence import LOG_RATIO_BOUND
from harness.algorithms.objective import Elements, Surrogate
from harness.algorithms.registry import register
from harness.typed_values import AboveOne, NotNegative, Positive

_ROUNDING = 1e-5  # nats: by so much log-probabilities of the same weights may differ in float32


@register("surrogate", "none")
def none(elements: Elements) -> Surrogate:
    """-A l, the plain policy gradient (REINFORCE, Williams 1992)."""
    return _unclipped(-elements.advantages * elements.logprobs)


@register("surrogate", "clip", clips=True)
def clip(elements: Elements, *, clip_low: NotNegative, clip_high: NotNegative) -> Surrogate:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347, eq. 7)."""
    ratio, advantages = elements.ratio, elements.advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return Surrogate(loss, below & (advantages < 0), above & (advantages > 0), below | above)


@register("surrogate", "dual_clip", clips=True)
def dual_clip(elements: Elements, *, clip_low: NotNegative, clip_high: NotNegative, bound: AboveOne) -> Surrogate:
    """As ``clip``, and where A < 0 at most -bound A, so that no huge ratio rules a batch (arXiv 1912.09729, eq. 5)."""
    loss, low, high, outside = clip(elements, clip_low=clip_low, clip_high=clip_high)
    capped = (elements.advantages < 0) & (elements.ratio > bound)
    return Surrogate(torch.where(capped, -bound * elements.advantages, loss), low, high | capped, outside)


@register("surrogate", "masked_clip", clips=True)
def masked_clip(
    elements: Elements, *, clip_low: NotNegative, clip_high: NotNegative, divergence: NotNegative
) -> Surrogate:
    """As ``clip``, and 0 where A < 0 in a sequence that has become less likely than it was by more than ``divergence``
    nats a token (off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556, eq. 9)."""
    loss, low, high, outside = clip(elements, clip_low=clip_low, clip_high=clip_high)
    length = elements.mask.sum(1, keepdim=True).clamp(min=1)
    drift = (elements.old_logprobs - elements.logprobs.detach()).sum(1, keepdim=True) / length
    dropped = (drift > divergence) & (elements.advantages < 0)
    return Surrogate(loss.masked_fill(dropped, 0.0), low | dropped, high, outside)


@register("surrogate", "ratio_mask", ordered=("lower", "upper"), clips=True)
def ratio_mask(elements: Elements, *, lower: NotNegative, upper: NotNegative) -> Surrogate:
    """-rho A where lower <= rho <= upper, else 0, whatever the sign of A (INTELLECT-3, arXiv 2512.16144, eq. 1)."""
    ratio, advantages = elements.ratio, elements.advantages
    below, above = ratio < lower, ratio > upper
    loss = (-ratio * advantages).masked_fill(below | above, 0.0)
    return Surrogate(loss, below & (advantages != 0), above & (advantages != 0), below | above)


@register("surrogate", "divergence_mask", clips=True)
def divergence_mask(
    elements: Elements, *, divergence: Literal["tv", "kl"], low: NotNegative, high: NotNegative, cap: Positive
) -> Surrogate:
    """-sg[min(rho, cap)] A l, and 0 where the token's probability p has left the trust region in the direction of A
    (DPPO, arXiv 2602.04879, eqs. 11 to 14).

    The region bounds a divergence of the two-way distributions (p, 1 - p) and (p_old, 1 - p_old): ``tv`` |p - p_old|,
    ``kl`` KL(p_old, p); ``low`` bounds it where p falls, ``high`` where it rises.
    """
    p, old_p = elements.logprobs.detach().exp(), elements.old_logprobs.exp()
    if divergence == "tv":
        distance = (p - old_p).abs()
    else:
        rest = torch.log((1 - old_p + 1e-8) / (1 - p + 1e-8))
        distance = old_p * (elements.old_logprobs - elements.logprobs.detach()) + (1 - old_p) * rest
    fallen, risen = (p < old_p) & (distance > low), (p > old_p) & (distance > high)
    clipped_low, clipped_high = fallen & (elements.advantages < 0), risen & (elements.advantages > 0)
    loss = -elements.ratio.detach().clamp(max=cap) * elements.advantages * elements.logprobs
    return Surrogate(loss.masked_fill(clipped_low | clipped_high, 0.0), clipped_low, clipped_high, fallen | risen)


@register("surrogate", "cispo", ordered=("lower", "upper"))
def cispo(elements: Elements, *, lower: NotNegative, upper: NotNegative) -> Surrogate:
    """-sg[clip(rho, lower, upper)] A l: the weight is bounded and every gradient kept (arXiv 2506.13585, eqs. 4, 5).

    Both bounds are on the ratio itself, not distances from 1.
    """
    ratio = elements.ratio.detach()
    loss = -ratio.clamp(lower, upper) * elements.advantages * elements.logprobs
    return _unclipped(loss)._replace(outside=(ratio < lower) | (ratio > upper))


@register("surrogate", "sapo")
def sapo(elements: Elements, *, tau_positive: Positive, tau_negative: Positive) -> Surrogate:
    """-f(rho) A with f(rho) = sigmoid(tau (rho - 1)) 4 / tau, a gate whose slope is 1 at rho = 1 and falls smoothly
    (SAPO, arXiv 2511.20347); ``tau_positive`` where A > 0, else ``tau_negative``."""
    ratio, advantages = elements.ratio, elements.advantages
    tau = _by_sign(advantages, tau_positive, tau_negative)
    return _unclipped(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages)


@register("surrogate", "geometric_mean", clips=True, sequence_level=True)
def geometric_mean(elements: Elements, *, clip_low: NotNegative, clip_high: NotNegative) -> Surrogate:
    """-A times the geometric mean of the sequence's clipped token ratios (GMPO, arXiv 2507.20673).

    The *logarithm* of each ratio is clipped to [-clip_low, clip_high], on the side that the sign of A says.
    """
    log_ratio, advantages = elements.ratio.log(), elements.advantages
    low = (log_ratio < -clip_low) & (advantages < 0)
    high = (log_ratio > clip_high) & (advantages > 0)
    clipped = log_ratio.masked_fill(low, -clip_low).masked_fill(high, clip_high)
    length = elements.mask.sum(1, keepdim=True).clamp(min=1)
    mean = (clipped * elements.mask).sum(1, keepdim=True) / length
    return Surrogate(-mean.exp() * advantages, low, high, (log_ratio < -clip_low) | (log_ratio > clip_high))


@register("surrogate", "vespo", sequence_weight=True)
def vespo(
    elements: Elements,
    *,
    k_positive: NotNegative,
    lambda_positive: NotNegative,
    k_negative: NotNegative,
    lambda_negative: NotNegative,
) -> Surrogate:
    """-sg[W^k exp(lambda (1 - W))] A l with W the product of the sequence's token ratios (VESPO, arXiv 2602.10693);
    k and lambda by the sign of A. The weight is 1 at W = 1 and fades on both sides."""
    advantages = elements.advantages
    k = _by_sign(advantages, k_positive, k_negative)
    decay = _by_sign(advantages, lambda_positive, lambda_negative)
    log_weight = _log_sequence_ratio(elements)
    weight = (k * log_weight + decay * (1 - log_weight.exp())).exp()
    return _unclipped(-weight * advantages * elements.logprobs)


@register("surrogate", "taper", sequence_weight=True)
def taper(elements: Elements, *, cap: Positive) -> Surrogate:
    """-A l where A >= 0, and -sg[min(W, cap)] A l where A < 0, with W the product of the sequence's token ratios: a
    sequence to unlearn counts less the less likely it has become (TOPR, arXiv 2503.14286)."""
    weight = _log_sequence_ratio(elements).exp().clamp(max=cap)
    weight = torch.where(elements.advantages < 0, weight, 1.0)
    return _unclipped(-weight * elements.advantages * elements.logprobs)


@register("surrogate", "squared_log_ratio")
def squared_log_ratio(elements: Elements, *, coefficient: NotNegative) -> Surrogate:
    """-A l + coefficient / 2 (l - l_old)^2: a quadratic leash in place of clipping (DRO, arXiv 2405.19107)."""
    change = elements.logprobs - elements.old_logprobs
    return _unclipped(-elements.advantages * elements.logprobs + 0.5 * coefficient * change**2)


@register("surrogate", "clip_selected", clips=True, needs_selection=True)
def clip_selected(elements: Elements, *, clip_low: NotNegative, clip_high: NotNegative) -> Surrogate:
    """As ``clip``, and 0 at selected tokens (Clip-Cov, arXiv 2505.22617).

    Those count as clipped, on the side to which A would have pushed them.
    """
    loss, low, high, outside = clip(elements, clip_low=clip_low, clip_high=clip_high)
    selected, advantages = elements.selected, elements.advantages
    loss = loss.masked_fill(selected, 0.0)
    return Surrogate(loss, low | (selected & (advantages < 0)), high | (selected & (advantages > 0)), outside)


@register("surrogate", "kl_selected", needs_selection=True)
def kl_selected(elements: Elements, *, coefficient: NotNegative) -> Surrogate:
    """-rho A, and + coefficient |l - l_old| at selected tokens (KL-Cov, arXiv 2505.22617)."""
    change = (elements.logprobs - elements.old_logprobs).abs()
    # Before the first optimizer step nothing has changed but by rounding, whose sign would push at full strength.
    penalty = coefficient * change.masked_fill(change < _ROUNDING, 0.0)
    return _unclipped(-elements.ratio * elements.advantages + penalty * elements.selected)


def _unclipped(loss: Tensor) -> Surrogate:
    """No element has lost its gradient, and there is no band to leave."""
    nowhere = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, nowhere, nowhere, nowhere)


def _log_sequence_ratio(elements: Elements) -> Tensor:
    """[B, 1] bounded logarithm of the product of each sequence's token ratios, a constant."""
    log_ratio = (elements.ratio.detach().log() * elements.mask).sum(1, keepdim=True)
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """[B, T] ``positive`` where A > 0, else ``negative``."""
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
