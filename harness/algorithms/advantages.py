"""Rewards to advantages.

A registered advantage is called once for a rollout batch as
``fn(rewards, group_ids, mask, values, **settings) -> (advantages, returns)`` with
``rewards`` [B, T] (what each completion token earned; an outcome reward sits on the last valid token), ``group_ids``
[B] (equal for the completions of one prompt), ``mask`` [B, T] and ``values`` [B, T] or None. ``advantages`` is [B, T];
``returns`` [B, T] is the critic's target, None where there is no critic.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from harness.algorithms.registry import part, register

if TYPE_CHECKING:
    from harness.config import AlgorithmConfig


def place_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Outcome rewards [B] on the last valid position of ``mask`` [B, T]: [B, T]."""
    token_rewards = torch.zeros_like(mask)
    last = (mask.sum(1).long() - 1).clamp(min=0)
    token_rewards[torch.arange(len(mask), device=mask.device), last] = rewards
    return token_rewards


def group_statistics(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each completion's group.

    Args:
        rewards: [B] float.
        group_ids: [B] int.

    Returns:
        mean [B] and std [B]; a group of one has mean 0 and std 1, so that its advantage is its reward.
    """
    _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    size = counts.to(rewards.dtype)
    mean = torch.zeros_like(size).index_add_(0, index, rewards) / size
    squares = torch.zeros_like(size).index_add_(0, index, (rewards - mean[index]) ** 2)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = counts == 1
    return mean.masked_fill(alone, 0.0)[index], std.masked_fill(alone, 1.0)[index]


def all_equal(rewards: Tensor, std: Tensor) -> Tensor:
    """[B] whether the rewards of each completion's group are equal but for rounding; ``std`` [B] is the group's."""
    return std <= 1e-6 * rewards.abs().clamp(min=1.0)


def group_advantages(rewards: Tensor, group_ids: Tensor, config: "AlgorithmConfig") -> Tensor:
    """Advantages relative to the group, one a completion.

    Args:
        rewards: [B], one a completion.
        group_ids: [B], equal for the completions of one prompt.
        config: the algorithm; its `advantage` part must be relative to the group.

    Returns:
        [B] advantages.
    """
    function, settings = part("advantage", config.advantage)
    ones = torch.ones_like(rewards).unsqueeze(1)
    advantages, _ = function(rewards.unsqueeze(1), group_ids, ones, None, **settings)
    return advantages.squeeze(1)


@register("advantage", "group")
def group(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    values: Tensor | None,
    *,
    scale: Literal["std", "none"],
    epsilon: float,
) -> tuple[Tensor, None]:
    """``scale: std``: (r - mean) / (std + epsilon) (GRPO, arXiv 2402.03300); ``scale: none``: r - mean (Dr. GRPO)."""
    totals = (rewards * mask).sum(1)
    mean, std = group_statistics(totals, group_ids)
    advantages = totals - mean
    if scale == "std":
        # Rounding in the mean leaves about 1e-8 where all rewards are equal, which a tiny std would blow up.
        advantages = (advantages / (std + epsilon)).masked_fill(all_equal(totals, std), 0.0)
    return advantages.unsqueeze(1) * mask, None


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over valid positions.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = sum_k (gamma lam)^k delta_{t+k}``; after the last valid position
    the value is 0, since the answer ends there.

    Args:
        rewards: [B, T], per token.
        values: [B, T], the critic's estimate before the token is chosen.
        mask: [B, T], valid completion positions.
        gamma: discount per token.
        lam: bias-variance trade-off.

    Returns:
        advantages [B, T] and returns [B, T] = advantages + values; 0 at masked positions.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        valid = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # A masked position is skipped, not a step of zero reward: what follows it is what it passes on.
        next_value = torch.where(valid, values[:, t], next_value)
        next_advantage = torch.where(valid, advantage, next_advantage)
        advantages[:, t] = torch.where(valid, advantage, torch.zeros_like(advantage))
    return advantages, (advantages + values) * mask


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Centre and scale [B, T] over the valid positions, unbiased variance, ``rsqrt(var + 1e-8)``."""
    valid = values[mask.bool()]
    variance = valid.var(correction=1) if valid.numel() > 1 else torch.ones_like(valid.sum())
    return (values - valid.mean()) * torch.rsqrt(variance + 1e-8) * mask


@register("advantage", "gae", needs_critic=True)
def gae_advantage(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor, *, gamma: float, lam: float, whiten: bool
) -> tuple[Tensor, Tensor]:
    """GAE from the critic's values; returns are taken before whitening (PPO)."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return (whitened(advantages, mask) if whiten else advantages), returns
