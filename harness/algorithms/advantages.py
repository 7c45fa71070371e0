"""Rewards to advantages.

A registered advantage is called once for a rollout batch as
``fn(rewards, ends, group_ids, mask, values, **settings) -> (advantages, returns)`` with
``rewards`` [B, T] (what each completion token earned), ``ends`` [B, T] (true at the last token of each rewarded step;
an outcome reward is one step that ends with the completion), ``group_ids`` [B] (equal for completions of one prompt),
``mask`` [B, T] and ``values`` [B, T] or None, floats all float32. ``advantages`` is [B, T] float32; ``returns`` [B, T]
float32 is the critic's target, None where there is no critic.

Traits: ``needs_critic``, ``needs_group`` (several completions a prompt), ``outcome_only`` (one advantage a completion),
``to_go`` (a token's advantage depends on what is earned from it on).
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from harness.algorithms.registry import call, register
from harness.typed_values import NotNegative, Share

if TYPE_CHECKING:
    from harness.config import AlgorithmConfig


def last_tokens(mask: Tensor) -> Tensor:
    """[B, T] bool, true at the last valid position of each row of ``mask`` [B, T], where an outcome reward sits."""
    return (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask.bool()


def group_statistics(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each completion's group.

    Args:
        rewards: [B] float.
        group_ids: [B] int, at least 0.

    Returns:
        mean [B] and std [B]; a group of one has mean 0 and std 1, so that its advantage is its reward.
    """
    size = group_ids.bincount().to(rewards.dtype)
    mean = torch.zeros_like(size).index_add_(0, group_ids, rewards) / size
    squares = torch.zeros_like(size).index_add_(0, group_ids, (rewards - mean[group_ids]) ** 2)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = size == 1
    return mean.masked_fill(alone, 0.0)[group_ids], std.masked_fill(alone, 1.0)[group_ids]


def group_sums(values: Tensor, group_ids: Tensor) -> Tensor:
    """[B] the sum of ``values`` [B] over each completion's group."""
    groups = int(group_ids.max()) + 1
    return values.new_zeros(groups).index_add_(0, group_ids, values)[group_ids]


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
    ones = torch.ones_like(rewards).unsqueeze(1)
    advantages, _ = call(
        "advantage", config.advantage, rewards.unsqueeze(1), ones.bool(), group_ids, ones, None, like=(ones, None)
    )
    return advantages.squeeze(1)


@register("advantage", "group", needs_group=True)
def group(
    rewards: Tensor,
    ends: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    values: Tensor | None,
    *,
    scale: Literal["std", "none", "batch"],
    epsilon: NotNegative,
) -> tuple[Tensor, None]:
    """Rewards relative to those of the group.

    ``scale: std``: (r - mean) / (std + epsilon) (GRPO, arXiv 2402.03300, section 4.1.2); ``none``: r - mean (Dr. GRPO,
    arXiv 2503.20783); ``batch``: as ``std``, with the deviation of all rewards of the rollout batch (Lite PPO, arXiv
    2508.08221).

    With rewards for steps, each is compared with all steps of the group, and a token's advantage is the sum over the
    steps that end at or after it (process supervision, section 4.1.3).
    """
    rows, columns, steps = step_rewards(rewards, ends, mask)
    mean, std = group_statistics(steps, group_ids[rows])
    # Rounding in the mean leaves about 1e-8 where all rewards are equal, which a tiny std would blow up.
    advantages = (steps - mean).masked_fill(all_equal(steps, std), 0.0)
    if scale != "none":
        divisor = std if scale == "std" else group_statistics(steps, torch.zeros_like(rows))[1]
        advantages = advantages / (divisor + epsilon)
    placed = torch.zeros_like(mask).index_put((rows, columns), advantages)
    return to_go(placed) * mask, None


@register("advantage", "leave_one_out", needs_group=True, outcome_only=True)
def leave_one_out(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """The reward minus the mean of the other completions of the group (RLOO, arXiv 2402.14740)."""
    outcomes = outcome_rewards(rewards, mask)
    mean, std = group_statistics(outcomes, group_ids)
    size = group_sums(torch.ones_like(outcomes), group_ids)
    advantages = size / (size - 1).clamp(min=1) * (outcomes - mean)
    return spread(advantages.masked_fill(all_equal(outcomes, std), 0.0), mask), None


@register("advantage", "optimal_baseline", needs_group=True, outcome_only=True)
def optimal_baseline(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """The reward minus the group's mean reward weighted by lengths: the baseline of least variance if a completion's
    squared gradient grows with its length (OPO, arXiv 2505.23585); 0 for a group of one."""
    outcomes, lengths = outcome_rewards(rewards, mask), mask.sum(1)
    baseline = group_sums(lengths * outcomes, group_ids) / group_sums(lengths, group_ids).clamp(min=1)
    baseline = baseline.masked_fill(group_sums(torch.ones_like(outcomes), group_ids) == 1, 0.0)
    _, std = group_statistics(outcomes, group_ids)
    return spread((outcomes - baseline).masked_fill(all_equal(outcomes, std), 0.0), mask), None


@register("advantage", "active_group", needs_group=True, outcome_only=True)
def active_group(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """(r - mean) x completions / completions of groups whose rewards differ: groups that say nothing do not thin out
    the gradient (GPG, arXiv 2504.02546)."""
    outcomes = outcome_rewards(rewards, mask)
    mean, std = group_statistics(outcomes, group_ids)
    active = ~all_equal(outcomes, std)
    return spread(active * (outcomes - mean) * (len(outcomes) / active.sum().clamp(min=1)), mask), None


@register("advantage", "whitened_return", to_go=True)
def whitened_return(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """The return from each token on, whitened over the rollout batch's valid tokens (REINFORCE++, arXiv 2501.03262)."""
    return whitened(to_go(rewards * mask), mask), None


@register("advantage", "whitened_group", needs_group=True)
def whitened_group(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """Rewards less the mean of the group's, whitened over the rollout batch's valid tokens (REINFORCE++-baseline, arXiv
    2501.03262)."""
    centred, _ = group(rewards, ends, group_ids, mask, values, scale="none", epsilon=0.0)
    return whitened(centred, mask), None


@register("advantage", "reward", to_go=True)
def reward(
    rewards: Tensor, ends: Tensor, group_ids: Tensor, mask: Tensor, values: Tensor | None
) -> tuple[Tensor, None]:
    """The return from each token on, without a baseline (REINFORCE, Williams 1992)."""
    return to_go(rewards * mask) * mask, None


def outcome_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] what each completion earned, from ``rewards`` [B, T]."""
    return (rewards * mask).sum(1)


def spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T] one advantage a completion, ``advantages`` [B], at each of its valid positions."""
    return advantages.unsqueeze(1) * mask


def step_rewards(rewards: Tensor, ends: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each step earned: rewards [B, T] summed from the step before it to its end.

    Returns:
        rows [S], columns [S] and rewards [S] of the S steps, in the order of the rows and from left to right.
    """
    rows, columns = ends.nonzero(as_tuple=True)
    until = (rewards * mask).cumsum(1)[rows, columns]
    before = torch.cat([until.new_zeros(1), until[:-1]])
    first = torch.cat([rows.new_full((1,), -1), rows[:-1]]) != rows
    return rows, columns, until - before.masked_fill(first, 0.0)


def to_go(rewards: Tensor) -> Tensor:
    """[B, T] sums from each position to the end of its row."""
    return rewards.flip(1).cumsum(1).flip(1)


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
    rewards: Tensor,
    ends: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    values: Tensor,
    *,
    gamma: Share,
    lam: Share,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """GAE from the critic's values; returns are taken before whitening (PPO)."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return (whitened(advantages, mask) if whiten else advantages), returns
