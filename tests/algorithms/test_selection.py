"""Selections against values worked out by hand."""

import torch

from harness.algorithms.selection import high_covariance, none

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
# Means over the five valid tokens: 0.2 and -1; the masked one would be chosen first if it counted.
ADVANTAGES = torch.tensor([[1.2, 1.2, 1.2], [-1.3, -1.3, 99.0]])
LOGPROBS = torch.tensor([[-0.5, -2.0, 0.0], [-1.5, -1.0, 99.0]])
# Covariances: 1 x 0.5, 1 x -1, 1 x 1; -1.5 x -0.5 = 0.75, -1.5 x 0.


def test_no_selection_chooses_nothing():
    assert not none(ADVANTAGES, LOGPROBS, MASK).any()


def test_the_largest_covariances_are_chosen():
    selected = high_covariance(ADVANTAGES, LOGPROBS, MASK, fraction=0.4, low=None, high=None, pick="largest")
    assert selected.tolist() == [[False, False, True], [True, False, False]]


def test_at_least_one_token_is_chosen():
    selected = high_covariance(ADVANTAGES, LOGPROBS, MASK, fraction=1e-4, low=None, high=None, pick="largest")
    assert selected.tolist() == [[False, False, True], [False, False, False]]


def test_only_covariances_between_the_bounds_are_candidates():
    for pick in ("largest", "random"):
        selected = high_covariance(ADVANTAGES, LOGPROBS, MASK, fraction=1.0, low=0.4, high=0.9, pick=pick)
        assert selected.tolist() == [[True, False, False], [True, False, False]]


def test_nothing_is_chosen_where_there_is_no_candidate():
    selected = high_covariance(ADVANTAGES, LOGPROBS, MASK, fraction=1.0, low=5.0, high=None, pick="random")
    assert not selected.any()


def test_a_random_pick_is_the_same_each_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    advantages, logprobs, mask = torch.randn(40, 5), torch.randn(40, 5), torch.ones(40, 5)
    state = torch.get_rng_state()
    settings = {"fraction": 0.1, "low": 0.1, "high": 5.0, "pick": "random"}
    first, second = (high_covariance(advantages, logprobs, mask, **settings) for _ in range(2))
    assert first.sum() == 20
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    largest = high_covariance(advantages, logprobs, mask, **(settings | {"pick": "largest"}))
    assert not torch.equal(first, largest)
