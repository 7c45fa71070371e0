"""Estimators of the divergence of the policy from its reference (http://joschu.net/blog/kl-approx.html)."""

import torch
from torch import Tensor

# exp(20) is 5e8: far past any clip range, and far from the overflow of float32.
LOG_RATIO_BOUND = 20.0


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy, reference), in nats.

    Args:
        logprobs: [B, T], of the policy that is trained.
        ref_logprobs: [B, T], of the reference.
        estimator: ``k1`` l - l_ref; ``k2`` (l - l_ref)^2 / 2; ``k3`` exp(l_ref - l) - (l_ref - l) - 1.

    Returns:
        [B, T].
    """
    log_ratio = (logprobs - ref_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return torch.exp(-log_ratio) + log_ratio - 1
