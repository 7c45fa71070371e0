"""Where TRL and verl differ from the harness, each shown to be exactly as docs/PARITY.md describes it."""

import math

import pytest
import torch

from harness.algorithms.divergence import kl_divergence
from harness.algorithms.registry import part
from harness.algorithms.shaping import overlong
from harness.algorithms.value import explained_variance
from tests.parity.comparison import (
    GRPO_CLIP,
    GSPO_CLIP,
    GSPO_TOKEN,
    TOKEN_MEAN,
    VANILLA,
    VERL_GSPO,
    differentiate,
    harness_loss,
)
from tests.parity.inputs import Rollouts, batches, rollouts, sequences
from tests.parity.peers import (
    trl_loss,
    trl_scores,
    verl,
    verl_advantages,
    verl_explained_variance,
    verl_loss,
    verl_overlong,
    verl_weights,
)

GRPO = harness_loss("grpo")
GSPO = harness_loss("gspo")
TRL_GRPO = trl_loss(loss_type="grpo", **GRPO_CLIP)


def value(loss, inputs):
    return loss(inputs)[0].item()


def outcome(rewards, group_ids=None):
    """Completions of one token with these rewards, in one group unless told otherwise."""
    rewards = torch.as_tensor(rewards).unsqueeze(1)
    ones = torch.ones_like(rewards)
    index = torch.zeros(len(rewards), dtype=torch.long) if group_ids is None else torch.tensor(group_ids)
    return Rollouts(rewards, ones.bool(), index, ones, ones)


def advantages(config, batch):
    function, settings = part("advantage", config)
    return function(batch.rewards, batch.ends, batch.group_ids, batch.mask, batch.values, **settings)[0]


# Advantages


def test_trl_adds_more_to_the_standard_deviation():
    batch = outcome([1.0, 0.0, 0.0])
    std = math.sqrt(1 / 3)
    inputs = sequences([[0.0]] * 3, [0.0] * 3)
    theirs = trl_scores("GRPO", inputs, batch.rewards.squeeze(1), num_generations=3, per_device_train_batch_size=3)
    assert theirs["advantages"][0].item() == pytest.approx(2 / 3 / (std + 1e-4), rel=1e-6)
    ours = advantages({"name": "group", "scale": "std", "epsilon": 1e-6}, batch)
    assert ours[0].item() == pytest.approx(2 / 3 / (std + 1e-6), rel=1e-6)


def test_verl_magnifies_rounding_where_all_rewards_are_equal():
    batch = outcome(torch.full((7,), 0.7, dtype=torch.float32))
    for name in ("grpo", "grpo_vectorized"):
        assert verl_advantages(name, batch)[0].abs().max() > 0.01
    assert advantages({"name": "group", "scale": "std", "epsilon": 1e-6}, batch).abs().max() == 0


def test_verl_scales_gpg_by_the_rewards_that_are_not_zero():
    # Two groups: one right and one wrong answer, and two wrong ones. Half of the groups say something.
    batch = outcome([1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1])
    assert advantages({"name": "active_group"}, batch).flatten().tolist() == [1, -1, 0, 0]
    assert verl_advantages("gpg", batch)[0].flatten().tolist() == [2, -2, 0, 0]


def test_trl_refuses_groups_of_one():
    inputs = sequences([[0.0]], [0.0])
    with pytest.raises(ValueError, match="at least 2 generations"):
        trl_scores("GRPO", inputs, torch.ones(1), num_generations=1, per_device_train_batch_size=1)
    assert advantages({"name": "group", "scale": "none", "epsilon": 1e-6}, outcome([1.0])).item() == 1
    assert verl_advantages("grpo", outcome([1.0]), norm_adv_by_std_in_grpo=False)[0].item() == 1


def test_verls_two_versions_of_rloo_disagree_about_a_group_of_one():
    batch = outcome([1.0])
    assert advantages({"name": "leave_one_out"}, batch).item() == verl_advantages("rloo", batch)[0].item() == 1
    assert verl_advantages("rloo_vectorized", batch)[0].item() == 0


def test_verl_always_whitens_the_advantages_of_gae():
    for batch in rollouts(dense=True):
        theirs = verl_advantages("gae", batch, gamma=1.0, lam=0.95)[0] * batch.mask
        plain, whitened = (
            advantages({"name": "gae", "gamma": 1.0, "lam": 0.95, "whiten": whiten}, batch) for whiten in (False, True)
        )
        assert torch.allclose(theirs, whitened, atol=1e-6) and not torch.allclose(theirs, plain, atol=1e-6)


def test_verl_cannot_whiten_a_single_token():
    batch = outcome([1.0])
    with pytest.raises(ValueError, match="sum of the mask is one"):
        verl_advantages("gae", batch, gamma=1.0, lam=1.0)
    assert advantages({"name": "gae", "gamma": 1.0, "lam": 1.0, "whiten": True}, batch).item() == 0


# Ratios


def test_trl_does_not_bound_log_ratios():
    inputs = sequences([[25.0]], [-1.0])
    theirs, gradient, _ = differentiate(TRL_GRPO, inputs)
    assert theirs.item() == pytest.approx(math.exp(25)) and gradient.item() == pytest.approx(math.exp(25))
    ours, gradient, _ = differentiate(GRPO, inputs)
    assert ours.item() == pytest.approx(math.exp(20)) and gradient.item() == 0


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_verl_does_not_bound_the_log_ratios_of_the_covariance_methods(mode):
    inputs = sequences([[25.0]], [-1.0])
    policy = {"clip_cov_lb": 1e8, "clip_cov_ub": 1e9, "ppo_kl_coef": 0.0}
    assert value(verl_loss(mode, policy=policy), inputs) == pytest.approx(math.exp(25))
    assert value(harness_loss(mode, surrogate={"coefficient": 0.0} if mode == "kl_cov" else {}), inputs) < math.exp(21)
    if mode == "kl_cov":  # whose penalty is of the whole log-ratio in both
        change = {"selection": {"fraction": 1.0}}
        penalties = [
            value(theirs, sequences([[25.0]], [0.0]))
            for theirs in (
                verl_loss(mode, policy={"kl_cov_ratio": 1.0, "ppo_kl_coef": 1.0}),
                harness_loss(mode, **change),
            )
        ]
        assert penalties == pytest.approx([25.0, 25.0])


def test_trl_bounds_the_sequences_ratio_of_vespo_from_below_at_1e_8():
    inputs = sequences([[-10.0, -9.0]], [1.0])
    loss = -inputs.logprobs.sum() / 2  # of a weight of 1

    def weight(log_ratio):
        return math.exp(2 * log_ratio + 3 * (1 - math.exp(log_ratio)))

    theirs = trl_loss(loss_type="vespo", vespo_k_pos=2.0, vespo_lambda_pos=3.0)
    assert value(theirs, inputs) == pytest.approx(loss.item() * weight(math.log(1e-8)), rel=1e-6)
    assert value(harness_loss("vespo"), inputs) == pytest.approx(loss.item() * weight(-19), rel=1e-6)


def test_trl_rloo_clips_one_ratio_for_the_whole_answer():
    inputs = sequences([[0.05, 0.05]], [1.0])
    theirs, gradient, _ = differentiate(trl_loss("RLOO", beta=0.0), inputs)
    assert theirs.item() == pytest.approx(-math.exp(0.1))
    assert gradient.flatten().tolist() == pytest.approx([-math.exp(0.1)] * 2)
    clipped = sequences([[0.15, 0.15]], [1.0])
    assert differentiate(trl_loss("RLOO", beta=0.0), clipped)[1].abs().max() == 0
    # Here there is no ratio; on the policy that sampled both have the same gradient.
    for batch in (inputs, clipped):
        assert differentiate(harness_loss("rloo"), batch)[1].flatten().tolist() == pytest.approx([-1, -1])
    same = inputs._replace(logprobs=inputs.old_logprobs)
    assert differentiate(trl_loss("RLOO", beta=0.0), same)[1].flatten().tolist() == pytest.approx([-1, -1])


def test_verl_bounds_the_sequence_log_ratio_at_ten():
    inputs = sequences([[14.0, 16.0]], [-1.0])
    theirs, gradient, _ = differentiate(verl_loss("gspo", "seq-mean-token-mean", **VERL_GSPO), inputs)
    assert theirs.item() == pytest.approx(math.exp(10)) and gradient.abs().max() == 0
    ours, gradient, _ = differentiate(GSPO, inputs)
    assert ours.item() == pytest.approx(math.exp(15))
    assert gradient.flatten().tolist() == pytest.approx([math.exp(15) / 2] * 2)


def test_verl_gspo_is_the_sequence_token_form():
    # Within the band; a sequence's tokens have the advantages 1 and 3.
    inputs = sequences([[1e-4, 1e-4]], [1.0])
    inputs = inputs._replace(advantages=torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    theirs = differentiate(verl_loss("gspo", "seq-mean-token-mean", **VERL_GSPO), inputs)
    form = differentiate(harness_loss("gspo", **GSPO_TOKEN), inputs)
    sequence = differentiate(GSPO, inputs)
    s = math.exp(1e-4)
    assert theirs[0].item() == pytest.approx(-2 * s) == sequence[0].item()
    assert theirs[1].flatten().tolist() == pytest.approx([-s / 2, -3 * s / 2]) == form[1].flatten().tolist()
    assert sequence[1].flatten().tolist() == pytest.approx([-s, -s])


def test_trls_default_loss_type_makes_long_sequences_count_more_in_gspo():
    # Sequence log-ratios 0, so that the loss is the advantages' mean: over tokens 3 to 1, or over sequences.
    inputs = sequences([[0.0] * 3] * 2, [1.0, -1.0], lengths=[3, 1])
    theirs = trl_loss(importance_sampling_level="sequence", **GSPO_CLIP)
    assert value(theirs, inputs) == pytest.approx(-0.5)
    assert value(harness_loss("gspo", **TOKEN_MEAN), inputs) == pytest.approx(-0.5)
    assert value(GSPO, inputs) == pytest.approx(0.0)


# Surrogates


def test_verl_vanilla_always_has_a_dual_clip():
    inputs = sequences([[math.log(8)]], [-1.0])
    band = {key: setting for key, setting in VANILLA.items() if key != "clip_ratio_c"}
    theirs, gradient, _ = differentiate(verl_loss("vanilla", "token-mean", **band), inputs)
    assert theirs.item() == pytest.approx(3) and gradient.item() == 0
    ours, gradient, _ = differentiate(GRPO, inputs)
    assert ours.item() == pytest.approx(8) and gradient.item() == pytest.approx(8)


def test_trls_bound_of_cispo_is_on_the_ratio_and_verls_are_distances_from_one():
    # -A l times the weight; log-probabilities are -1 - the log-ratio where that is positive.
    for ratio, ours, in_trl, in_verl in ((0.5, 0.5, 0.28, 0.8), (1.1, 1.1, 0.28, 1.1), (8.0, 5.0, 0.28, 1.28)):
        inputs = sequences([[math.log(ratio)]], [1.0])
        weights = [
            value(loss, inputs) / -inputs.logprobs.item()
            for loss in (
                harness_loss("cispo"),
                trl_loss(loss_type="cispo", epsilon=0.2, epsilon_high=0.28),
                verl_loss("cispo", clip_ratio_low=0.2, clip_ratio_high=0.28),
            )
        ]
        assert weights == pytest.approx([ours, in_trl, in_verl])


def test_verls_cap_of_dppo_is_that_of_the_dual_clip():
    # Its code falls back on 20, but its configuration always has clip_ratio_c, whose default is 3.
    inputs = sequences([[math.log(12)]], [-1.0])
    wide = {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0}
    assert value(verl_loss("dppo_tv", **wide), inputs) == pytest.approx(3 * inputs.logprobs.item())
    ours = harness_loss("dppo_tv", surrogate={"low": 1.0, "high": 1.0}, **TOKEN_MEAN)
    assert value(ours, inputs) == pytest.approx(12 * inputs.logprobs.item())


def covariances():
    """Three tokens; token 1 has the largest covariance by the old policy, token 0 by the trained one."""
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    inputs = sequences([[0.0] * 3], [0.0])
    return inputs._replace(
        advantages=zeros + torch.tensor([1.0, 1.0, -1.0]),
        old_logprobs=zeros + torch.tensor([-2.1, -2.0, -2.05]),
        logprobs=zeros + torch.tensor([-2.0, -2.2, -2.05]),
    )


def test_verl_takes_covariances_with_the_trained_policy():
    inputs = covariances()
    penalised = [
        differentiate(verl_loss("kl_cov", policy={"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}), inputs)[1],
        differentiate(harness_loss("kl_cov"), inputs)[1],
    ]
    plain = -torch.exp(inputs.logprobs - inputs.old_logprobs) * inputs.advantages / 3
    assert (penalised[0] - plain).flatten().tolist() == pytest.approx([1 / 3, 0, 0])
    assert (penalised[1] - plain).flatten().tolist() == pytest.approx([0, -1 / 3, 0])


def test_verl_pushes_on_rounding_in_kl_cov():
    inputs = covariances()
    inputs = inputs._replace(logprobs=inputs.old_logprobs + 1e-7)
    plain = -torch.exp(inputs.logprobs - inputs.old_logprobs) * inputs.advantages / 3
    pushed = differentiate(verl_loss("kl_cov", policy={"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}), inputs)[1] - plain
    assert pushed.abs().sum().item() == pytest.approx(1 / 3)
    assert (differentiate(harness_loss("kl_cov"), inputs)[1] - plain).abs().max() < 1e-12


def test_verl_selects_in_every_micro_batch():
    inputs = covariances()
    policy = {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}
    plain = -torch.exp(inputs.logprobs - inputs.old_logprobs) * inputs.advantages
    micro = [type(inputs)(*(tensor[:, [token]] for tensor in inputs)) for token in range(2)]
    penalties = [
        differentiate(verl_loss("kl_cov", policy=policy), part_of)[1].item() - plain[0, token].item()
        for token, part_of in enumerate(micro)
    ]
    assert penalties == pytest.approx([1, -1])  # in the batch of three only one of them was chosen


def test_verl_draws_the_tokens_of_clip_cov_anew_each_time():
    generator = torch.Generator().manual_seed(0)
    inputs = sequences([[0.0] * 200], [1.0])
    advantages = torch.randn(1, 200, generator=generator).sign().double()
    inputs = inputs._replace(advantages=advantages, old_logprobs=inputs.logprobs + 1.5 * advantages)
    inputs = inputs._replace(logprobs=inputs.old_logprobs.clone())
    theirs = verl_loss("clip_cov", policy={"clip_cov_ratio": 0.1})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [differentiate(theirs, inputs)[1] == 0 for _ in range(2)]
    assert [int(tokens.sum()) for tokens in drawn] == [20, 20] and not drawn[0].equal(drawn[1])
    ours = [differentiate(harness_loss("clip_cov", selection={"fraction": 0.1}), inputs)[1] == 0 for _ in range(2)]
    assert [int(tokens.sum()) for tokens in ours] == [20, 20] and ours[0].equal(ours[1])


def test_verl_keeps_the_loss_of_clipped_tokens_out_of_the_selection_of_clip_cov():
    # The second token's covariance is 2.25 and its ratio is outside of the band, so that it has no gradient anyway.
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    old_logprobs = zeros + torch.tensor([-5.0, -2.0, -5.0])
    inputs = sequences([[0.0] * 3], [0.0])._replace(
        advantages=zeros + torch.tensor([-1.0, 2.0, -1.0]),
        old_logprobs=old_logprobs,
        logprobs=old_logprobs + torch.tensor([0.0, 0.5, 0.0]),
    )
    band = {"clip_low": 0.2, "clip_high": 0.2}
    select = {"fraction": 1.0, "low": 3.0, "high": 100.0}
    theirs, their_gradient, _ = differentiate(
        verl_loss("clip_cov", policy={"clip_cov_ratio": 1.0, "clip_cov_lb": 3.0, "clip_cov_ub": 100.0}), inputs
    )
    ours, our_gradient, _ = differentiate(harness_loss("clip_cov", surrogate=band, selection=select), inputs)
    assert theirs.item() == pytest.approx((1 - 2 * 1.2 + 1) / 3) and ours.item() == pytest.approx((1 + 1) / 3)
    assert our_gradient.flatten().tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    assert torch.allclose(our_gradient, their_gradient)


# Aggregation


def test_verl_averages_sapo_over_sequences_whatever_it_is_told():
    for inputs in batches():
        assert value(verl_loss("sapo", "token-mean"), inputs) == value(verl_loss("sapo", "seq-mean-token-mean"), inputs)


def test_trl_averages_the_means_of_micro_batches():
    inputs = sequences([[0.0] * 3] * 2, [1.0, -1.0], lengths=[3, 1])
    micro = [type(inputs)(*(tensor[[row]] for tensor in inputs)) for row in range(2)]
    theirs = trl_loss(loss_type="bnpo", micro_batches=2, **GRPO_CLIP)
    assert sum(value(theirs, part_of) for part_of in micro) == pytest.approx((-1 + 1) / 2)
    assert value(trl_loss(loss_type="bnpo", **GRPO_CLIP), inputs) == pytest.approx((-3 + 1) / 4)
    assert value(harness_loss("grpo", **TOKEN_MEAN), inputs) == pytest.approx((-3 + 1) / 4)


def test_verl_leaves_sequences_without_a_valid_token_out_of_the_mean():
    inputs = sequences([[0.0], [0.0]], [1.0, 0.0], lengths=[1, 0])
    assert value(verl_loss("vanilla", "seq-mean-token-mean", **VANILLA), inputs) == pytest.approx(-1)
    assert value(GRPO, inputs) == value(TRL_GRPO, inputs) == pytest.approx(-0.5)


def test_verl_divides_by_the_padded_width_unless_told_a_length():
    inputs = sequences([[0.0] * 4] * 2, [1.0, 1.0], lengths=[3, 1])
    constant = harness_loss("grpo", aggregation={"name": "constant_length", "length": 10})
    assert value(constant, inputs) == pytest.approx(-4 / 20)
    assert value(verl_loss("vanilla", "seq-mean-token-sum-norm", **VANILLA), inputs) == pytest.approx(-4 / 8)


def test_verls_token_sum_is_the_token_mean_times_the_tokens():
    for inputs in batches():
        theirs = value(verl_loss("vanilla", "token-sum", **VANILLA), inputs)
        ours = value(harness_loss("grpo", **TOKEN_MEAN), inputs)
        assert theirs == pytest.approx(ours * inputs.mask.sum().item(), rel=1e-5)


def test_verl_aggregates_the_entropy_bonus_as_it_does_the_loss():
    # The harness and TRL take the mean over tokens, whatever the loss is averaged over.
    entropies, mask = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    theirs = verl().agg_loss(entropies, mask, "seq-mean-token-mean")
    assert theirs.item() == pytest.approx((1 + 5) / 2)
    options = {"loss_type": "grpo", "entropy_coef": 1.0, **GRPO_CLIP}
    inputs = sequences([[0.0] * 3] * 2, [0.0, 0.0], lengths=[3, 1])
    assert value(trl_loss(entropies=entropies, **options), inputs) == pytest.approx(-(3 * 1 + 5) / 4)


# Divergence from the reference


def test_trl_multiplies_the_divergence_by_the_ratio_unless_told_not_to():
    inputs = sequences([[math.log(1.5)]], [0.0])
    inputs = inputs._replace(ref_logprobs=inputs.logprobs - 1)
    k3 = math.exp(-1) + 1 - 1
    slope = 1 - math.exp(-1)
    theirs, gradient, _ = differentiate(trl_loss(loss_type="grpo", beta=0.1, **GRPO_CLIP), inputs)
    assert theirs.item() == pytest.approx(0.1 * 1.5 * k3)
    assert gradient.item() == pytest.approx(0.1 * 1.5 * (slope + k3))
    ours, gradient, _ = differentiate(harness_loss("grpo_kl", kl={"coefficient": 0.1}), inputs)
    assert ours.item() == pytest.approx(0.1 * k3) and gradient.item() == pytest.approx(0.1 * slope)
    weighted = harness_loss("grpo_kl", kl={"coefficient": 0.1, "importance_weighted": True})
    assert value(weighted, inputs) == pytest.approx(theirs.item())


def test_verl_bounds_k3_at_ten():
    logprobs = torch.tensor([-6.0], dtype=torch.float64, requires_grad=True)
    theirs = verl().kl_penalty(logprobs, torch.zeros(1), "k3")
    assert theirs.item() == 10 and torch.autograd.grad(theirs.sum(), logprobs)[0].item() == 0
    ours = kl_divergence(logprobs, torch.zeros(1), "k3")
    assert ours.item() == pytest.approx(math.exp(6) - 7)
    assert torch.autograd.grad(ours.sum(), logprobs)[0].item() == pytest.approx(1 - math.exp(6))


def test_verl_does_not_bound_k1_and_k2():
    logprobs, reference = torch.tensor([-25.0]), torch.zeros(1)
    assert [verl().kl_penalty(logprobs, reference, name).item() for name in ("k1", "k2")] == [-25.0, 312.5]
    assert [kl_divergence(logprobs, reference, name).item() for name in ("k1", "k2")] == [-20.0, 200.0]


def test_verl_offers_the_gradient_of_k2_under_the_value_of_another():
    logprobs = torch.tensor([-1.0, -0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, -2.0], dtype=torch.float64)
    theirs = verl().kl_penalty(logprobs, reference, "k3+")
    assert torch.allclose(theirs, kl_divergence(logprobs, reference, "k3"))
    gradients = [
        torch.autograd.grad(divergence.sum(), logprobs)[0]
        for divergence in (theirs, kl_divergence(logprobs, reference, "k2"), kl_divergence(logprobs, reference, "k3"))
    ]
    assert torch.allclose(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])


# Correction of the rollout's mismatch


def test_verls_rejection_takes_tokens_out_of_the_mean():
    verl()
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    inputs = sequences([[0.0, 0.0]], [1.0])
    inputs = inputs._replace(rollout_logprobs=inputs.old_logprobs - torch.tensor([[0.0, 3.0]], dtype=torch.float64))
    log_ratio = inputs.old_logprobs - inputs.rollout_logprobs
    kept, _ = compute_rollout_rejection_mask(log_ratio, inputs.mask, "token_k1", "0.5_2.0")
    assert kept.tolist() == [[1, 0]]
    rejected = value(verl_loss("vanilla", "token-mean", **VANILLA), inputs._replace(mask=kept))
    masked = harness_loss("grpo", correction={"name": "mask", "level": "token", "low": 0.5, "high": 2.0}, **TOKEN_MEAN)
    assert rejected == pytest.approx(-1) and value(masked, inputs) == pytest.approx(-0.5)


def test_verl_divides_by_zero_where_no_weight_is_inside_the_band():
    inputs = sequences([[0.0]], [1.0])
    inputs = inputs._replace(rollout_logprobs=inputs.old_logprobs - 3)
    with pytest.raises(ZeroDivisionError):
        verl_weights(inputs, "token", "0.5_2.0")
    masked = harness_loss("grpo", correction={"name": "mask", "level": "token", "low": 0.5, "high": 2.0})
    assert value(masked, inputs) == 0


def test_trl_multiplies_the_mismatch_into_the_sequences_ratio_of_vespo():
    inputs = sequences([[0.1]], [1.0])
    inputs = inputs._replace(rollout_logprobs=inputs.old_logprobs - 0.2)
    mode = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 9}
    logprob = -inputs.logprobs.item()

    def weight(log_ratio):
        return math.exp(2 * log_ratio + 3 * (1 - math.exp(log_ratio)))

    theirs = trl_loss(loss_type="vespo", vespo_k_pos=2.0, vespo_lambda_pos=3.0, **mode)
    assert value(theirs, inputs) == pytest.approx(weight(0.3) * logprob)
    corrected = harness_loss("vespo", correction={"name": "truncate", "level": "token", "cap": 9.0})
    assert value(corrected, inputs) == pytest.approx(math.exp(0.2) * weight(0.1) * logprob)
    # What old_logprobs: rollout does.
    assert value(harness_loss("vespo"), inputs._replace(old_logprobs=inputs.rollout_logprobs)) == pytest.approx(
        weight(0.3) * logprob
    )


def test_trl_does_not_correct_gmpo_and_verl_does_by_the_geometric_mean():
    inputs = sequences([[0.0, 0.0]], [1.0])
    mismatch = torch.tensor([[0.0, math.log(4)]], dtype=torch.float64)
    inputs = inputs._replace(rollout_logprobs=inputs.old_logprobs - mismatch)
    ours = harness_loss("gmpo", correction={"name": "truncate", "level": "token", "cap": 9.0})
    assert value(ours, inputs) == pytest.approx(-(1 + 4) / 2)
    assert value(verl_loss("geo_mean", rollout_is="token", rollout_is_threshold=9.0), inputs) == pytest.approx(-2)
    mode = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 9}
    assert value(trl_loss("GMPO", **mode), inputs) == pytest.approx(-1)


# Metrics, critic, shaping


def test_tokens_capped_by_a_dual_clip_are_counted_in_different_places():
    inputs = sequences([[math.log(8)]], [-1.0])
    ours = harness_loss("dual_clip_ppo")(inputs)[1]
    assert ours["clip_fraction/token"] == ours["clip_fraction/high"] == 1
    theirs = verl_loss("vanilla")(inputs)[1]
    assert (theirs["actor/pg_clipfrac"], theirs["actor/pg_clipfrac_lower"]) == (0, pytest.approx(1))
    assert trl_loss(loss_type="grpo", delta=3.0)(inputs)[1]["clip_ratio/region_mean"] == 0


def test_every_clip_fraction_of_cispo_is_another():
    # A ratio above the band with either sign of A, one below it, one inside.
    inputs = sequences([[2.0], [2.0], [-2.0], [0.0]], [1.0, -1.0, 1.0, 1.0])
    ours = harness_loss("cispo", surrogate={"lower": 0.8, "upper": 1.2})(inputs)[1]
    assert ours["clip_fraction/token"] == 0 and ours["ratio/outside_fraction"] == 3 / 4
    theirs = verl_loss("cispo", clip_ratio_low=0.2, clip_ratio_high=0.2)(inputs)[1]
    assert theirs["actor/pg_clipfrac"] == pytest.approx(3 / 4)
    assert trl_loss(loss_type="cispo", epsilon_high=1.2)(inputs)[1]["cispo_clip_ratio"] == pytest.approx(1 / 4)


def test_verl_counts_gmpos_tokens_outside_the_band_by_the_sign_of_the_advantage():
    # Above the band with A > 0 (clipped), above with A < 0 and below with A > 0 (not clipped), inside.
    inputs = sequences([[1.0], [1.0], [-1.0], [0.0]], [1.0, -1.0, 1.0, 1.0])
    ours = harness_loss("gmpo")(inputs)[1]
    assert ours["clip_fraction/token"] == 1 / 4 and ours["ratio/outside_fraction"] == 3 / 4
    theirs = verl_loss("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4)(inputs)[1]
    assert theirs["actor/pg_clipfrac"] == pytest.approx(2 / 4)
    assert theirs["actor/pg_clipfrac_lower"] == pytest.approx(1 / 4)


def test_verls_divergence_from_the_old_policy_is_k1():
    inputs = sequences([[0.3, -0.1]], [1.0])
    assert verl_loss("vanilla")(inputs)[1]["actor/ppo_kl"] == pytest.approx(-0.1)
    k3 = (math.exp(0.3) - 1.3 + math.exp(-0.1) - 0.9) / 2
    assert GRPO(inputs)[1]["kl/policy_old"] == pytest.approx(k3)


def test_a_clipped_sequence_counts_once_in_trl_and_by_its_tokens_in_verl():
    inputs = sequences([[0.1] * 3] * 2, [1.0, 0.0], lengths=[3, 1])
    ours = GSPO(inputs)[1]
    assert ours["clip_fraction/token"] == 3 / 4 and ours["clip_fraction/sequence"] == 1 / 2
    theirs = trl_loss(loss_type="grpo", importance_sampling_level="sequence", **GSPO_CLIP)(inputs)[1]
    assert theirs["clip_ratio/region_mean"] == pytest.approx(1 / 2)
    assert verl_loss("gspo", "seq-mean-token-mean", **VERL_GSPO)(inputs)[1]["actor/pg_clipfrac"] == pytest.approx(3 / 4)


def test_verls_explained_variance_never_divides_by_zero():
    values, returns = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.001, 0.003]])
    mask = torch.ones(1, 2)
    error, variance = 0.5 * (0.999 - 1.997) ** 2, 0.5 * 0.002**2
    assert verl_explained_variance(values, returns, mask) == pytest.approx(1 - error / (variance + 1e-5), rel=1e-4)
    assert explained_variance(values, returns, mask).item() == pytest.approx(1 - error / variance, rel=1e-4)
    constant = torch.ones(1, 2)
    assert explained_variance(values, constant, mask).item() == 0
    assert verl_explained_variance(values, constant, mask) == pytest.approx(1 - 0.5 / 1e-5, rel=1e-4)


def test_verls_overlong_penalty_goes_on_growing():
    lengths = torch.tensor([16, 18])
    assert verl_overlong(lengths, 16, 4, 1.0).tolist() == pytest.approx([0, -0.5])
    assert overlong(torch.ones(2), lengths, 16, buffer=4, penalty=1.0).tolist() == pytest.approx([0, 0])
