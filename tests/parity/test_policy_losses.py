"""The same loss and the same gradient as TRL and verl, wherever they define the same quantity."""

from typing import Any, NamedTuple

import pytest

from tests.parity.comparison import (
    GRPO_CLIP,
    GSPO_CLIP,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    VANILLA,
    VERL_GSPO,
    assert_same,
    harness_loss,
)
from tests.parity.inputs import batches
from tests.parity.peers import Loss, trl_loss, verl_loss

# TRL does not bound log-ratios, verl bounds some of them: the deviations say what follows beyond.
TRL_BOUND, VERL_GSPO_BOUND, VESPO_BOUND = 19.0, 9.0, 0.5


class Case(NamedTuple):
    """An algorithm of the harness and its equal."""

    entry: str
    peer: Loss
    bound: float = 30.0  # the largest log-ratio of a token up to which both say the same
    per_token: bool = True  # whether they do so for advantages that differ within a sequence
    shifted: bool = False  # whether they do so only where all tokens have one log-ratio
    changes: dict[str, Any] = {}  # of the entry's parts


CONSTANT_LENGTH = {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 40}
REINFORCE = {"policy": {"rollout_correction": {"loss_type": "reinforce"}}}

CASES = {
    # Token ratio, clipped
    "verl-ppo": Case("ppo", verl_loss("vanilla", **VANILLA | {"clip_ratio_high": 0.2})),
    "trl-grpo": Case("grpo", trl_loss(loss_type="grpo", **GRPO_CLIP), TRL_BOUND),
    "verl-grpo": Case("grpo", verl_loss("vanilla", "seq-mean-token-mean", **VANILLA)),
    "trl-dr_grpo": Case("dr_grpo", trl_loss(loss_type="dr_grpo", max_completion_length=40, epsilon=0.2), TRL_BOUND),
    "verl-dr_grpo": Case("dr_grpo", verl_loss("vanilla", **CONSTANT_LENGTH, **VANILLA | {"clip_ratio_high": 0.2})),
    "trl-dapo": Case("dapo", trl_loss(loss_type="dapo", epsilon=0.2, epsilon_high=0.28), TRL_BOUND),
    "trl-bnpo": Case("dapo", trl_loss(loss_type="bnpo", epsilon=0.2, epsilon_high=0.28), TRL_BOUND),
    "verl-dapo": Case("dapo", verl_loss("vanilla", **VANILLA | {"clip_ratio_high": 0.28})),
    "trl-lite_ppo": Case("lite_ppo", trl_loss(loss_type="dapo", epsilon=0.2), TRL_BOUND),
    "verl-lite_ppo": Case("lite_ppo", verl_loss("vanilla", **VANILLA | {"clip_ratio_high": 0.2})),
    "verl-reinforce_plus_plus": Case("reinforce_plus_plus", verl_loss("vanilla", **VANILLA | {"clip_ratio_high": 0.2})),
    "verl-reinforce_plus_plus_baseline": Case(
        "reinforce_plus_plus_baseline", verl_loss("vanilla", **VANILLA | {"clip_ratio_high": 0.2})
    ),
    # A second bound where the advantage is negative, or the sequence left out
    "verl-dual_clip_ppo": Case("dual_clip_ppo", verl_loss("vanilla")),
    "trl-grpo_two_sided": Case("grpo_two_sided", trl_loss(loss_type="grpo", epsilon=0.2, delta=4.0), TRL_BOUND),
    "verl-grpo_two_sided": Case("grpo_two_sided", verl_loss("vanilla", "seq-mean-token-mean", clip_ratio_c=4.0)),
    "trl-deepseek_v3_2": Case(
        "deepseek_v3_2", trl_loss(loss_type="grpo", epsilon=0.2, beta=1e-3, off_policy_mask_threshold=0.5), TRL_BOUND
    ),
    # Sequence ratio
    "trl-gspo": Case("gspo", trl_loss(loss_type="grpo", importance_sampling_level="sequence", **GSPO_CLIP), TRL_BOUND),
    "verl-gspo": Case("gspo", verl_loss("gspo", "seq-mean-token-mean", **VERL_GSPO), VERL_GSPO_BOUND, per_token=False),
    "trl-gspo_token": Case(
        "gspo_token",
        trl_loss(loss_type="grpo", importance_sampling_level="sequence", **GSPO_CLIP),
        TRL_BOUND,
        per_token=False,
    ),
    "verl-gspo_token": Case("gspo_token", verl_loss("gspo", "seq-mean-token-mean", **VERL_GSPO), VERL_GSPO_BOUND),
    "trl-luspo": Case(
        "luspo",
        trl_loss(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
        TRL_BOUND,
    ),
    "verl-luspo": Case(
        "luspo",
        verl_loss("gspo", "seq-mean-token-sum", clip_ratio_low=2e-3, clip_ratio_high=2.5e-3),
        VERL_GSPO_BOUND,
        per_token=False,
    ),
    "trl-gmpo": Case("gmpo", trl_loss("GMPO", epsilon=0.4), TRL_BOUND, per_token=False),
    "verl-gmpo": Case(
        "gmpo", verl_loss("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4), TRL_BOUND, per_token=False
    ),
    "trl-vespo": Case(
        "vespo",
        trl_loss(loss_type="vespo", vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
        VESPO_BOUND,
    ),
    # The ratio as a weight, gated, or bounded by probabilities
    "trl-cispo": Case("cispo", trl_loss(loss_type="cispo", epsilon_high=5.0), TRL_BOUND),
    "verl-cispo": Case("cispo", verl_loss("cispo", clip_ratio_low=1.0, clip_ratio_high=4.0)),
    "verl-cispo-lower": Case(
        "cispo",
        verl_loss("cispo", clip_ratio_low=0.1, clip_ratio_high=0.3),
        changes={"surrogate": {"lower": 0.9, "upper": 1.3}},
    ),
    "trl-sapo": Case("sapo", trl_loss(loss_type="sapo"), TRL_BOUND),
    "verl-sapo": Case("sapo", verl_loss("sapo")),
    "verl-dppo_tv": Case(
        "dppo_tv",
        verl_loss("dppo_tv", clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=20.0, **CONSTANT_LENGTH),
    ),
    "verl-dppo_kl": Case(
        "dppo_kl",
        verl_loss("dppo_kl", clip_ratio_low=0.05, clip_ratio_high=0.05, clip_ratio_c=20.0, **CONSTANT_LENGTH),
    ),
    "verl-dro": Case("dro", verl_loss("dro", policy={"dro_beta": 1.0})),
    # Selected tokens
    "verl-clip_cov": Case(
        "clip_cov",
        verl_loss("clip_cov", clip_ratio_low=1.0, clip_ratio_high=1.0, policy={"clip_cov_ratio": 1.0}),
        shifted=True,
        changes={"selection": {"fraction": 1.0}},  # all tokens of high covariance, so that chance does not matter
    ),
    "verl-clip_cov-none": Case(
        "clip_cov",
        verl_loss("clip_cov", policy={"clip_cov_lb": 1e8, "clip_cov_ub": 1e9}, **VANILLA),
        TRL_BOUND,
        changes={
            "surrogate": {"clip_low": 0.2, "clip_high": 0.27},
            "selection": {"low": 1e8, "high": 1e9},  # no token is selected
        },
    ),
    "verl-kl_cov": Case(
        "kl_cov",
        verl_loss("kl_cov", policy={"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}),
        shifted=True,
        changes={"selection": {"fraction": 0.1}},
    ),
    # No ratio
    "verl-reinforce": Case("reinforce", verl_loss("bypass_mode", "seq-mean-token-sum", **REINFORCE)),
    "verl-rloo": Case("rloo", verl_loss("bypass_mode", "seq-mean-token-sum", **REINFORCE)),
    "verl-opo": Case("opo", verl_loss("bypass_mode", "seq-mean-token-sum", **REINFORCE)),
    "verl-gpg": Case("gpg", verl_loss("gpg")),
    # Penalty towards the reference, in the loss
    "trl-grpo_kl": Case(
        "grpo_kl", trl_loss(loss_type="grpo", beta=0.04, use_bias_correction_kl=False, **GRPO_CLIP), TRL_BOUND
    ),
    "verl-grpo_kl": Case("grpo_kl", verl_loss("vanilla", "seq-mean-token-mean", kl=("k3", 0.04), **VANILLA)),
    "verl-grpo_kl-k1": Case(
        "grpo_kl",
        verl_loss("vanilla", "seq-mean-token-mean", kl=("k1", 0.04), **VANILLA),
        changes={"kl": {"estimator": "k1"}},
    ),
    "verl-grpo_kl-k2": Case(
        "grpo_kl",
        verl_loss("vanilla", "seq-mean-token-mean", kl=("k2", 0.04), **VANILLA),
        changes={"kl": {"estimator": "k2"}},
    ),
    # Correction of the rollout's mismatch
    "trl-minirl": Case(
        "minirl",
        trl_loss(
            loss_type="luspo",
            use_vllm=True,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=5.0,
            **GRPO_CLIP,
        ),
        TRL_BOUND,
    ),
    "verl-minirl": Case(
        "minirl", verl_loss("vanilla", "seq-mean-token-sum", rollout_is="token", rollout_is_threshold=5.0, **VANILLA)
    ),
}
for level in ("token", "sequence"):
    suffix, change = ("", {}) if level == "token" else ("-sequence", {"changes": {"correction": {"level": level}}})
    CASES |= {
        f"trl-grpo_tis{suffix}": Case(
            "grpo_tis",
            trl_loss(
                loss_type="grpo",
                use_vllm=True,
                vllm_importance_sampling_mode=f"{level}_truncate",
                vllm_importance_sampling_clip_max=2.0,
                **GRPO_CLIP,
            ),
            TRL_BOUND,
            **change,
        ),
        f"verl-grpo_tis{suffix}": Case(
            "grpo_tis",
            verl_loss("vanilla", "seq-mean-token-mean", rollout_is=level, rollout_is_threshold=2.0, **VANILLA),
            **change,
        ),
        f"trl-grpo_icepop{suffix}": Case(
            "grpo_icepop",
            trl_loss(
                loss_type="grpo",
                use_vllm=True,
                vllm_importance_sampling_mode=f"{level}_mask",
                vllm_importance_sampling_clip_min=0.5,
                vllm_importance_sampling_clip_max=5.0,
                **GRPO_CLIP,
            ),
            TRL_BOUND,
            **change,
        ),
        f"verl-grpo_icepop{suffix}": Case(
            "grpo_icepop",
            verl_loss("vanilla", "seq-mean-token-mean", rollout_is=level, rollout_is_threshold="0.5_5.0", **VANILLA),
            **change,
        ),
    }


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_same(name):
    case = CASES[name]
    ours = harness_loss(case.entry, **case.changes)
    for inputs in batches(case.bound, case.per_token, case.shifted):
        assert_same(ours, case.peer, inputs)
        if not case.shifted:  # where all covariances are 0, any choice of tokens is as good
            assert_same(ours, case.peer, inputs._replace(advantages=0 * inputs.advantages))


AGGREGATIONS = {
    "seq-mean-token-mean": SEQUENCE_MEAN,
    "seq-mean-token-sum": SEQUENCE_SUM,
    "seq-mean-token-sum-norm": {"aggregation": {"name": "constant_length", "length": 40}},
    "token-mean": {"aggregation": {"name": "token_mean"}},
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", ["cispo", "gpg"])
def test_every_aggregation_of_verl(surrogate, mode):
    scale = {"loss_scale_factor": 40} if mode.endswith("norm") else {}
    theirs = verl_loss(surrogate, mode, **scale, clip_ratio_low=1.0, clip_ratio_high=4.0)
    for inputs in batches():
        assert_same(harness_loss(surrogate, **AGGREGATIONS[mode]), theirs, inputs)
