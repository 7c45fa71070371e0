"""Advantages against values worked out by hand."""

import pytest
import torch

from harness.algorithms.advantages import gae, group_advantages, place_rewards, whitened
from harness.algorithms.registry import part
from harness.algorithms.value import explained_variance, value_loss
from harness.config import compose

GRPO = compose(["algorithm=grpo"]).algorithm
REWARDS = torch.tensor([95.0, 70.0, 85.0, 80.0])


def test_centred_only_as_in_the_textbook_example():
    config = compose(["algorithm=grpo", "algorithm.advantage.scale=none"]).algorithm
    advantages = group_advantages(REWARDS, torch.zeros(4, dtype=torch.long), config)
    assert advantages.tolist() == [12.5, -12.5, 2.5, -2.5]


def test_centred_and_scaled_uses_the_unbiased_deviation():
    advantages = group_advantages(REWARDS, torch.zeros(4, dtype=torch.long), GRPO)
    std = ((12.5**2 + 12.5**2 + 2.5**2 + 2.5**2) / 3) ** 0.5
    assert advantages.tolist() == pytest.approx([12.5 / std, -12.5 / std, 2.5 / std, -2.5 / std], rel=1e-5)


def test_groups_are_told_apart_by_their_ids_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0])
    advantages = group_advantages(rewards, torch.tensor([3, 9, 3, 9]), GRPO)
    half = 0.5**0.5
    assert advantages.tolist() == pytest.approx([half, -half, -half, half], rel=1e-4)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_no_advantage(reward):
    advantages = group_advantages(torch.full((7,), reward), torch.zeros(7, dtype=torch.long), GRPO)
    assert advantages.tolist() == [0.0] * 7


def test_a_group_of_one_keeps_its_reward():
    advantages = group_advantages(torch.tensor([0.5]), torch.tensor([0]), GRPO)
    assert advantages.tolist() == pytest.approx([0.5], rel=1e-5)


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5; delta = (0 + 0.5*2 - 1, 0 + 0.5*4 - 2, 1 - 4) = (0, 0, -3).
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-3 / 16, -3 / 4, -3.0]]
    assert returns.tolist() == [[1 - 3 / 16, 2 - 3 / 4, 1.0]]


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.3, 0.6, 0.9, 123.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert advantages[0].tolist() == pytest.approx([0.7, 0.4, 0.1, 0.0])
    assert returns[0].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])


def test_gae_passes_over_masked_positions_in_between():
    holes = torch.tensor([[1.0, 0.0, 1.0]])
    advantages, _ = gae(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 7.0, 0.25]]), holes, 0.9, 0.8)
    dense, _ = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), 0.9, 0.8)
    assert advantages[0, [0, 2]].tolist() == pytest.approx(dense[0].tolist())
    assert advantages[0, 1] == 0.0


def test_whitened_advantages_have_mean_zero_and_unbiased_variance_one():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    white = whitened(torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), mask)
    valid = white[mask.bool()]
    assert valid.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert valid.var(correction=1).item() == pytest.approx(1.0, rel=1e-5)
    assert white[~mask.bool()].tolist() == [0.0, 0.0, 0.0]


def test_ppo_whitens_advantages_but_not_the_critics_targets():
    function, settings = part("advantage", compose(["algorithm=ppo"]).algorithm.advantage)
    rewards = place_rewards(torch.tensor([1.0, 0.0]), torch.ones(2, 3))
    advantages, returns = function(rewards, torch.arange(2), torch.ones(2, 3), torch.zeros(2, 3), **settings)
    assert returns.tolist() == [[1.0] * 3, [0.0] * 3]
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-6)


def test_outcome_rewards_sit_on_the_last_valid_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert place_rewards(torch.tensor([2.0, 3.0]), mask).tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]


def test_clipped_value_loss_by_hand():
    # Old value 0, clip 0.2. Value 1, return 1: clipped to 0.2, error 0.8^2. Value 0.1, return 0: 0.1^2 either way.
    values = torch.tensor([[1.0, 0.1, 5.0]], requires_grad=True)
    loss, clipped = value_loss(
        values, torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]), 0.2
    )
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.01))
    assert clipped.item() == 1
    loss.backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.1, 0.0])


def test_explained_variance():
    returns, mask = torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.ones(1, 3), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(1, 3), mask).item() == 0.0
