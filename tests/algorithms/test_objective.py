"""The policy loss against values worked out by hand; what holds for all entries is in test_entries.py."""

import math
from dataclasses import replace

import pytest
import torch

from harness.algorithms.objective import policy_loss
from harness.algorithms.registry import PARTS, register
from harness.config import compose

GRPO = compose(["algorithm=grpo"]).algorithm
GSPO = compose(["algorithm=gspo"]).algorithm


def variant(base, **parts):
    """The algorithm with some of its parts replaced."""
    return replace(base, **parts)


def from_ratios(ratios, advantages, mask=None):
    """logprobs (with gradient), old_logprobs, advantages and mask that give these token ratios."""
    ratios = torch.tensor(ratios)
    old = torch.full_like(ratios, -1.0)
    logprobs = (old + ratios.log()).requires_grad_()
    mask = torch.ones_like(ratios) if mask is None else torch.tensor(mask)
    return logprobs, old, torch.tensor(advantages).unsqueeze(1) * mask, mask


def test_grpo_loss_by_hand():
    # Sequence 1 (A = 1): 1.1, 1.5 -> 1.1 and the clipped 1.27. Sequence 2 (A = -2): 0.9, 0.5 -> 0.9 and clipped 0.8.
    logprobs, old, advantages, mask = from_ratios([[1.1, 1.5], [0.9, 0.5]], [1.0, -2.0])
    loss, metrics = policy_loss(logprobs, old, advantages, mask, GRPO)
    expected = (-(1.1 + 1.27) / 2 + 2 * (0.9 + 0.8) / 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["clip_fraction/token"] == 0.5
    assert metrics["clip_fraction/high"] == metrics["clip_fraction/low"] == 0.25
    assert metrics["clip_fraction/sequence"] == 1.0
    assert metrics["ratio/outside_fraction"] == 0.5
    assert metrics["ratio/max"] == pytest.approx(1.5)
    assert metrics["ratio/min"] == pytest.approx(0.5)


def test_clipping_counts_only_where_it_removes_the_gradient():
    # Outside of the band on the harmless side: a high ratio with A < 0 and a low one with A > 0 keep their gradient.
    logprobs, old, advantages, mask = from_ratios([[2.0], [0.2]], [-1.0, 1.0])
    loss, metrics = policy_loss(logprobs, old, advantages, mask, GRPO)
    loss.backward()
    assert metrics["clip_fraction/token"] == 0.0
    assert metrics["ratio/outside_fraction"] == 1.0
    assert logprobs.grad.flatten().tolist() == pytest.approx([2.0 / 2, -0.2 / 2])


def test_clipped_elements_have_no_gradient():
    logprobs, old, advantages, mask = from_ratios([[1.5, 1.0], [0.5, 1.0]], [1.0, -1.0])
    policy_loss(logprobs, old, advantages, mask, GRPO)[0].backward()
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(-0.25)], [0.0, pytest.approx(0.25)]]


def test_gspo_ratio_is_the_geometric_mean_over_valid_tokens():
    mask = [[1.0, 1.0, 0.0]]
    logprobs, old, advantages, mask = from_ratios([[1.0002, 1.0004, 7.0]], [1.0], mask)
    loss, metrics = policy_loss(logprobs, old, advantages, mask, GSPO)
    s = math.sqrt(1.0002 * 1.0004)
    assert loss.item() == pytest.approx(-s, rel=1e-6)
    assert metrics["clip_fraction/token"] == 0.0
    loss.backward()  # d s / d l_t = s / |y|
    assert logprobs.grad.flatten().tolist() == pytest.approx([-s / 2, -s / 2, 0.0])


def test_gspo_clips_every_valid_token_of_a_clipped_sequence():
    mask = [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    logprobs, old, advantages, mask = from_ratios([[1.001, 1.001, 1.0], [1.0, 1.0, 1.0]], [1.0, 1.0], mask)
    loss, metrics = policy_loss(logprobs, old, advantages, mask, GSPO)
    loss.backward()
    assert metrics["clip_fraction/token"] == 0.75
    assert metrics["clip_fraction/sequence"] == 0.5
    assert logprobs.grad[0].tolist() == [0.0, 0.0, 0.0]


def test_the_papers_clip_ranges_are_the_defaults():
    assert (GSPO.surrogate["clip_low"], GSPO.surrogate["clip_high"]) == (3e-4, 4e-4)
    assert (GRPO.surrogate["clip_low"], GRPO.surrogate["clip_high"]) == (0.2, 0.27)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ({"name": "sequence_mean"}, ((1 + 2) / 2 + 4) / 2),
        ({"name": "token_mean"}, (1 + 2 + 4) / 3),
        ({"name": "sequence_sum"}, (1 + 2 + 4) / 2),
        ({"name": "constant_length", "length": 10}, (1 + 2 + 4) / 20),
    ],
)
def test_aggregation_by_hand(aggregation, expected):
    config = variant(GRPO, aggregation=aggregation, surrogate={"name": "none"})
    logprobs = torch.tensor([[1.0, 2.0], [4.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, _ = policy_loss(logprobs, logprobs, -torch.ones(2, 2), mask, config)
    assert loss.item() == pytest.approx(expected)


def test_extreme_log_ratios_stay_finite():
    logprobs = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    old = torch.tensor([[0.0, -500.0]])
    for config in (GRPO, GSPO):
        for sign in (1.0, -1.0):
            loss, metrics = policy_loss(logprobs, old, sign * torch.ones(1, 2), torch.ones(1, 2), config)
            assert torch.isfinite(loss)
            assert torch.isfinite(torch.autograd.grad(loss, logprobs)[0]).all()
            assert metrics["ratio/max"] <= math.exp(20) * 1.001


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_kl_penalty_by_hand(estimator, expected):
    config = variant(GRPO, kl=replace(GRPO.kl, estimator=estimator, coefficient=2.0))
    logprobs = torch.tensor([[-1.0]])
    loss, metrics = policy_loss(
        logprobs, logprobs, torch.zeros(1, 1), torch.ones(1, 1), config, ref_logprobs=torch.tensor([[-1.5]])
    )
    assert loss.item() == pytest.approx(2.0 * expected)
    assert metrics["kl/reference"] == pytest.approx(expected)


def test_a_penalty_weighted_by_the_ratio_has_the_gradient_of_the_divergence():
    # ratio x k3 with ratio 2 and log(ref / policy) = 0.5: its derivative is ratio x (k3 + 1 - exp(0.5)) = ratio x -0.5,
    # that of the sampled token's ratio x log(policy / ref); k3 alone would have 1 - exp(0.5).
    kl = replace(GRPO.kl, coefficient=1.0, importance_weighted=True)
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    old = logprobs.detach() - math.log(2)
    loss, metrics = policy_loss(
        logprobs, old, torch.zeros(1, 1), torch.ones(1, 1), variant(GRPO, kl=kl), ref_logprobs=logprobs.detach() + 0.5
    )
    loss.backward()
    k3 = math.exp(0.5) - 0.5 - 1
    assert loss.item() == pytest.approx(2 * k3)
    assert logprobs.grad.item() == pytest.approx(-1.0)
    assert metrics["kl/reference"] == pytest.approx(k3)


def test_a_penalty_in_the_reward_is_not_in_the_loss():
    config = variant(GRPO, kl=replace(GRPO.kl, coefficient=1.0, placement="reward"))
    old = torch.tensor([[-1.0]])
    loss, metrics = policy_loss(old, old, torch.zeros(1, 1), torch.ones(1, 1), config, ref_logprobs=old - 0.5)
    assert loss.item() == 0.0
    assert metrics["kl/reference"] > 0


def test_corrections_multiply_the_policy_loss_and_not_the_penalty():
    # w = exp(l_old - l_roll) = 3 on one token, truncated at 2; the ratio stays 1.
    config = variant(
        GRPO,
        correction={"name": "truncate", "level": "token", "cap": 2.0},
        kl=replace(GRPO.kl, estimator="k1", coefficient=1.0),
    )
    old = torch.tensor([[-1.0]])
    loss, metrics = policy_loss(
        old,
        old,
        torch.ones(1, 1),
        torch.ones(1, 1),
        config,
        rollout_logprobs=old - math.log(3),
        ref_logprobs=old - 0.5,
    )
    assert loss.item() == pytest.approx(-2.0 + 0.5)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(math.log(3))
    assert metrics["mismatch/kl"] == pytest.approx(3 - 1 - math.log(3))
    masked = variant(GRPO, correction={"name": "mask", "level": "sequence", "low": 0.5, "high": 2.0})
    loss, _ = policy_loss(old, old, torch.ones(1, 1), torch.ones(1, 1), masked, rollout_logprobs=old - math.log(3))
    assert loss.item() == 0.0


def test_a_setting_without_a_type_is_an_error():
    with pytest.raises(ValueError, match="annotate its setting bound"):

        @register("ratio", "untyped")
        def untyped(logprobs, old_logprobs, mask, *, bound): ...

    assert "untyped" not in PARTS["ratio"]


def test_a_taken_name_is_an_error():
    with pytest.raises(ValueError, match="already registered"):
        register("surrogate", "clip")(lambda: None)
