"""Advantages against values worked out by hand."""

import pytest
import torch

from harness.algorithms.advantages import gae, group_advantages, last_tokens, whitened
from harness.algorithms.registry import part
from harness.algorithms.value import explained_variance, value_loss
from harness.config import compose

GRPO = compose(["algorithm=grpo"]).algorithm
ONE_GROUP = torch.zeros(4, dtype=torch.long)
REWARDS = torch.tensor([95.0, 70.0, 85.0, 80.0])


def advantages_of(config, rewards, mask, group_ids, ends=None):
    """What an advantage part makes of rewards [B] at the last token of each row, or [B, T] with the steps' ends."""
    function, settings = part("advantage", config)
    if ends is None:
        ends = last_tokens(mask)
        rewards = ends * rewards.unsqueeze(1)
    return function(rewards, ends, group_ids, mask, None, **settings)


def per_completion(config, rewards, mask, group_ids):
    """[B] the advantage of each completion, which must be the same at all of its tokens and 0 elsewhere."""
    advantages, returns = advantages_of(config, rewards, mask, group_ids)
    assert returns is None
    torch.testing.assert_close(advantages, advantages[:, :1] * mask)
    return advantages[:, 0].tolist()


RAGGED = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
PAIRS = torch.tensor([4, 4, 7, 7])


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
    mask = torch.ones(2, 3)
    ends = last_tokens(mask)
    rewards = ends * torch.tensor([[1.0], [0.0]])
    advantages, returns = function(rewards, ends, torch.arange(2), mask, torch.zeros(2, 3), **settings)
    assert returns.tolist() == [[1.0] * 3, [0.0] * 3]
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-6)


def test_an_outcome_reward_sits_on_the_last_valid_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert last_tokens(mask).tolist() == [[False, True, False], [False, False, True], [False, False, True]]


def test_scaling_by_the_batch_uses_the_deviation_of_all_rewards():
    config = {"name": "group", "scale": "batch", "epsilon": 0.0}
    advantages = per_completion(config, torch.tensor([1.0, 0.0, 4.0, 4.0]), RAGGED, PAIRS)
    # Around the batch's mean 2.25: 1.5625 + 5.0625 + 3.0625 + 3.0625, over 3.
    std = (12.75 / 3) ** 0.5
    assert advantages == pytest.approx([0.5 / std, -0.5 / std, 0.0, 0.0])


@pytest.mark.parametrize("scale", ["std", "batch"])
def test_equal_rewards_give_no_advantage_however_they_are_scaled(scale):
    config = {"name": "group", "scale": scale, "epsilon": 1e-6}
    assert per_completion(config, torch.full((4,), 0.1), RAGGED, ONE_GROUP[:4]) == [0.0] * 4


def test_steps_are_compared_with_all_steps_of_the_group():
    # Two completions with two steps each: rewards 1, 0 and 1, 1, mean 0.75; a token has the sum of the steps ahead.
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    ends = torch.tensor([[True, False, True], [True, True, False]])
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    config = {"name": "group", "scale": "none", "epsilon": 1e-6}
    advantages, _ = advantages_of(config, rewards, mask, ONE_GROUP[:2], ends=ends)
    assert advantages.tolist() == [[-0.5, -0.75, -0.75], [0.5, 0.25, 0.0]]


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards, mask = torch.tensor([1.0, 2.0, 6.0]), torch.ones(3, 2)
    advantages = per_completion({"name": "leave_one_out"}, rewards, mask, ONE_GROUP[:3])
    assert advantages == pytest.approx([1 - 4.0, 2 - 3.5, 6 - 1.5])


def test_leaving_one_out_of_a_group_of_one_keeps_its_reward():
    assert per_completion({"name": "leave_one_out"}, torch.tensor([0.5]), torch.ones(1, 2), ONE_GROUP[:1]) == [0.5]


def test_the_optimal_baseline_weights_rewards_by_length():
    # Lengths 3 and 1: (3 x 2 + 1 x 6) / 4 = 3. Lengths 2 and 2: the plain mean, 0.5.
    advantages = per_completion({"name": "optimal_baseline"}, torch.tensor([2.0, 6.0, 1.0, 0.0]), RAGGED, PAIRS)
    assert advantages == pytest.approx([-1.0, 3.0, 0.5, -0.5])


def test_the_optimal_baseline_of_a_group_of_one_is_0():
    assert per_completion({"name": "optimal_baseline"}, torch.tensor([0.5]), torch.ones(1, 2), ONE_GROUP[:1]) == [0.5]


def test_uninformative_groups_do_not_thin_out_the_others():
    # Half of the completions are in a group whose rewards differ: its advantages count double.
    advantages = per_completion({"name": "active_group"}, torch.tensor([1.0, 0.0, 1.0, 1.0]), RAGGED, PAIRS)
    assert advantages == pytest.approx([1.0, -1.0, 0.0, 0.0])


def test_a_batch_without_information_has_no_advantages():
    assert per_completion({"name": "active_group"}, torch.full((4,), 1 / 3), RAGGED, PAIRS) == [0.0] * 4


def test_the_reward_itself_is_the_return_from_each_token_on():
    rewards = torch.tensor([[1.0, 0.0, 3.0], [2.0, 9.0, 9.0], [0.0, 1.0, 9.0], [0.0, 0.0, 9.0]])
    advantages, returns = advantages_of({"name": "reward"}, rewards, RAGGED, PAIRS, ends=last_tokens(RAGGED))
    assert advantages.tolist() == [[4.0, 3.0, 3.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns is None


def test_whitened_returns_are_whitened_over_tokens_of_the_batch():
    # Valid returns 1, 1, 1, 0, 2, 2, 0, 0: mean 7/8, squares 11 - 49/8.
    rewards = torch.tensor([1.0, 0.0, 2.0, 0.0])
    advantages = per_completion({"name": "whitened_return"}, rewards, RAGGED, PAIRS)
    std = ((11 - 49 / 8) / 7) ** 0.5
    assert advantages == pytest.approx([(1 - 7 / 8) / std, -7 / 8 / std, (2 - 7 / 8) / std, -7 / 8 / std], rel=1e-5)


def test_whitened_returns_above_the_groups_mean():
    # Above the group's mean: 0.5, 0.5, 0.5, -0.5, 1, 1, -1, -1: mean 1/8, squares 5 - 1/8.
    rewards = torch.tensor([1.0, 0.0, 2.0, 0.0])
    advantages = per_completion({"name": "whitened_group"}, rewards, RAGGED, PAIRS)
    std = ((5 - 1 / 8) / 7) ** 0.5
    assert advantages == pytest.approx([(value - 1 / 8) / std for value in (0.5, -0.5, 1.0, -1.0)], rel=1e-5)


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
