"""The critic's loss."""

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss: half the larger of the two squared errors.

    Args:
        values: [B, T], of the critic that is trained.
        old_values: [B, T], when the rollout batch was judged.
        returns: [B, T], the targets.
        mask: [B, T].
        value_clip: how far a value may move from its old one.

    Returns:
        the sum over valid positions (to be divided by the optimizer batch's tokens, so that micro-batches add up), and
        the number of positions whose clipped error is the larger.
    """
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    return 0.5 * (torch.maximum(plain, clipped) * mask).sum(), ((clipped > plain) & mask.bool()).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over valid positions; 0 where the returns do not vary."""
    valid = mask.bool()
    variance = returns[valid].var(correction=0)
    error = (returns - values)[valid].var(correction=0)
    return torch.where(variance > 1e-12, 1 - error / variance.clamp(min=1e-12), torch.zeros_like(variance))
