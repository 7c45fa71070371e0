"""The policy loss against values worked out by hand, and its invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.algorithms.objective import aggregation_weights, policy_loss, weighted_policy_loss
from harness.algorithms.registry import register
from harness.config import compose

GRPO = compose(["algorithm=grpo"]).algorithm
GSPO = compose(["algorithm=gspo"]).algorithm
PPO = compose(["algorithm=ppo"]).algorithm


def variant(base, **parts):
    """The algorithm with some of its parts replaced."""
    return compose(["algorithm=grpo"]).algorithm.__class__(**{**vars(base), **parts})


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


@pytest.mark.parametrize("config", [GRPO, GSPO, PPO], ids=lambda config: config.name)
def test_ratio_one_gives_the_plain_policy_gradient(config):
    torch.manual_seed(0)
    old = -torch.rand(4, 6)
    advantages = torch.randn(4, 1).expand(4, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).float()
    gradients = []
    for surrogate in (config.surrogate, {"name": "none"}):
        logprobs = old.clone().requires_grad_()
        policy_loss(logprobs, old, advantages, mask, variant(config, surrogate=surrogate))[0].backward()
        gradients.append(logprobs.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gspo_and_gspo_token_have_the_same_gradient_where_advantages_are_constant():
    torch.manual_seed(0)
    old = -torch.rand(3, 5)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [4]])).float()
    advantages = torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, 5)
    results = []
    for name in ("sequence", "sequence_token"):
        logprobs = (old + 1e-4 * torch.randn(3, 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
        loss, metrics = policy_loss(logprobs, old, advantages, mask, variant(GSPO, ratio={"name": name}))
        loss.backward()
        results.append((loss.detach(), logprobs.grad, metrics["clip_fraction/token"]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_extreme_log_ratios_stay_finite():
    logprobs = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    old = torch.tensor([[0.0, -500.0]])
    for config in (GRPO, GSPO):
        for sign in (1.0, -1.0):
            loss, metrics = policy_loss(logprobs, old, sign * torch.ones(1, 2), torch.ones(1, 2), config)
            assert torch.isfinite(loss)
            assert torch.isfinite(torch.autograd.grad(loss, logprobs)[0]).all()
            assert metrics["ratio/max"] <= math.exp(20) * 1.001


def test_garbage_at_masked_positions_changes_nothing():
    logprobs, old, advantages, mask = from_ratios([[1.1, 1.0], [0.9, 1.0]], [1.0, -1.0], [[1.0, 0.0], [1.0, 0.0]])
    clean, clean_metrics = policy_loss(logprobs, old, advantages, mask, GRPO)
    with torch.no_grad():
        dirty = logprobs.clone()
        dirty[:, 1] = torch.tensor([math.nan, math.inf])
    loss, metrics = policy_loss(dirty, old, advantages, mask, GRPO)
    assert loss.item() == clean.item()
    assert metrics == clean_metrics


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["grpo", "gspo", "ppo"]))
def test_the_loss_does_not_depend_on_the_micro_batches(seed, pieces, name):
    config = {"grpo": GRPO, "gspo": GSPO, "ppo": PPO}[name]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (8, 1), generator=generator)
    mask = (torch.arange(7) < lengths).float()
    old = -torch.rand(8, 7, generator=generator)
    logprobs = (old + 0.3 * torch.randn(8, 7, generator=generator)).requires_grad_()
    advantages = torch.randn(8, 1, generator=generator).expand(8, 7)
    whole, metrics = policy_loss(logprobs, old, advantages, mask, config)
    weights = aggregation_weights(mask, config)
    order = torch.randperm(8, generator=generator)
    total, gathered = torch.zeros(()), None
    for rows in order.chunk(pieces):
        part, part_metrics = weighted_policy_loss(
            logprobs[rows], old[rows], advantages[rows], mask[rows], weights[rows], config
        )
        total = total + part
        if gathered is None:
            gathered = part_metrics
        else:
            gathered.update(part_metrics)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
    assert gathered.compute() == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_kl_penalty_by_hand(estimator, expected):
    config = variant(GRPO, kl=type(GRPO.kl)(estimator=estimator, coefficient=2.0, placement="loss"))
    logprobs = torch.tensor([[-1.0]])
    loss, metrics = policy_loss(
        logprobs, logprobs, torch.zeros(1, 1), torch.ones(1, 1), config, ref_logprobs=torch.tensor([[-1.5]])
    )
    assert loss.item() == pytest.approx(2.0 * expected)
    assert metrics["kl/reference"] == pytest.approx(expected)


def test_corrections_multiply_the_policy_loss_and_not_the_penalty():
    # w = exp(l_old - l_roll) = 3 on one token, truncated at 2; the ratio stays 1.
    config = variant(
        GRPO,
        correction={"name": "truncate", "level": "token", "cap": 2.0},
        kl=type(GRPO.kl)(estimator="k1", coefficient=1.0, placement="loss"),
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


def test_a_taken_name_is_an_error():
    with pytest.raises(ValueError, match="already registered"):
        register("surrogate", "clip")(lambda: None)
