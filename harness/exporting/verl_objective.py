"""verl's keys for the loss: surrogate, ratio, aggregation, selection, KL penalty and entropy bonus."""

import math
from typing import Any

from harness.config import RunConfig
from harness.exporting.translation import NoEqual, lookup, minibatch, renamed

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_LOSS = f"{ACTOR}.policy_loss"
# Its clipped loss always has the second bound of dual clip; ratios end at e^20, below this one.
_NO_BOUND = 1e9
_CLIP = {"clip_low": f"{ACTOR}.clip_ratio_low", "clip_high": f"{ACTOR}.clip_ratio_high"}
# Surrogate -> its settings.
_SURROGATES: dict[str, dict[str, str]] = {
    "clip": _CLIP,
    "dual_clip": {**_CLIP, "bound": f"{ACTOR}.clip_ratio_c"},
    "none": {},
    "cispo": {},
    "sapo": {"tau_positive": f"{ACTOR}.tau_pos", "tau_negative": f"{ACTOR}.tau_neg"},
    "geometric_mean": _CLIP,
    "clip_selected": _CLIP,
    "kl_selected": {"coefficient": f"{_LOSS}.ppo_kl_coef"},
    "squared_log_ratio": {"coefficient": f"{_LOSS}.dro_beta"},
    "ratio_mask": {},
    "divergence_mask": {
        "low": f"{ACTOR}.clip_ratio_low",
        "high": f"{ACTOR}.clip_ratio_high",
        "cap": f"{ACTOR}.clip_ratio_c",
    },
}
_ANY = ("token", "sequence", "sequence_token")
# Surrogate -> ratio -> loss_mode.
_LOSS_MODES: dict[str, dict[str, str]] = {
    "clip": {"token": "vanilla", "sequence": "gspo", "sequence_token": "gspo"},
    "dual_clip": {"token": "vanilla"},
    "none": dict.fromkeys(_ANY, "gpg"),
    "cispo": {"token": "cispo"},
    "sapo": {"token": "sapo"},
    "geometric_mean": {"token": "geo_mean"},
    "clip_selected": {"token": "clip_cov"},
    "kl_selected": {"token": "kl_cov"},
    "divergence_mask": {"token": "dppo"},
    "squared_log_ratio": dict.fromkeys(_ANY, "dro"),
    "ratio_mask": {"token": "bypass_mode"},
}
# Surrogate -> a setting, and what it must be above.
_ABOVE = {"dual_clip": ("bound", 1), "squared_log_ratio": ("coefficient", 0)}
_AGGREGATIONS = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant_length": "seq-mean-token-sum-norm",
}
_WHOLE_BATCH = ("geo_mean", "clip_cov", "kl_cov")  # losses that look at a micro-batch as a whole
_SEQUENCE_MEAN = ("geometric_mean", "sapo")  # surrogates that are aggregated in one way alone
_PICKS = {"clip_selected": "random", "kl_selected": "largest"}  # which tokens of high covariance are selected
_KL = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


def loss(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """The surrogate of the importance ratio."""
    algorithm, surrogate = run.algorithm, run.algorithm.surrogate
    names = lookup(_SURROGATES, algorithm, "surrogate")
    mode = lookup(_LOSS_MODES[surrogate["name"]], algorithm, "ratio", f"with the surrogate {surrogate['name']} ")
    if surrogate["name"] in _ABOVE:
        setting, least = _ABOVE[surrogate["name"]]
        if surrogate[setting] <= least:
            raise NoEqual(f"algorithm.surrogate.{setting}", f"it is above {least}")
    if mode == "dppo":
        mode += f"_{surrogate['divergence']}"
    if mode == "gspo" and algorithm.ratio["name"] == "sequence":
        _check_sequence_token(run, differs)
    settings = {f"{_LOSS}.loss_mode": mode, **renamed(surrogate, names)}
    if mode == "vanilla":
        settings.setdefault(f"{ACTOR}.clip_ratio_c", _NO_BOUND)
    if mode == "bypass_mode":
        settings[f"{_LOSS}.rollout_correction"] = _ratio_mask(run)
    if mode == "cispo":  # its bounds are distances from 1
        settings |= {_CLIP["clip_low"]: 1 - surrogate["lower"], _CLIP["clip_high"]: surrogate["upper"] - 1}
    if mode in _WHOLE_BATCH:
        differs.append(
            "the loss looks at one micro-batch at a time: ppo_micro_batch_size_per_gpu is that of the whole optimizer "
            "step on one device"
        )
        settings[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] = minibatch(run)
    return settings


def _ratio_mask(run: RunConfig) -> dict[str, Any]:
    """Its weighted policy gradient has a constant ratio in the loss and the same gradient."""
    surrogate = run.algorithm.surrogate
    if run.algorithm.correction["name"] != "none":
        raise NoEqual("algorithm.correction.name", "with the surrogate ratio_mask there is none")
    band = _band("algorithm.surrogate.lower", surrogate["lower"], surrogate["upper"])
    return {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": band}


def _check_sequence_token(run: RunConfig, differs: list[str]) -> None:
    """Its sequence ratio carries each token's own gradient (GSPO-token)."""
    if run.algorithm.correction.get("level") == "token":
        raise NoEqual(
            "algorithm.ratio.name",
            "its ratio of the sequence has each token's own gradient, which is the same only where tokens are not "
            "weighed one by one; set algorithm.correction.level=sequence or algorithm.ratio.name=sequence_token",
        )
    differs.append(
        "the ratio of the sequence has each token's own gradient (GSPO-token); all tokens of a completion have one "
        "advantage, so the gradient is the same"
    )


def aggregation(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """From the losses of tokens to that of an optimizer step."""
    part, surrogate = run.algorithm.aggregation, run.algorithm.surrogate["name"]
    mode = lookup(_AGGREGATIONS, run.algorithm, "aggregation")
    if part["name"] != "sequence_mean" and surrogate in _SEQUENCE_MEAN:
        raise NoEqual("algorithm.aggregation.name", f"its {surrogate} loss is always aggregated by sequence_mean")
    length = {f"{ACTOR}.loss_scale_factor": part["length"]} if "length" in part else {}
    return {f"{ACTOR}.loss_agg_mode": mode, **length}


def selection(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """Tokens of high covariance (Clip-Cov, KL-Cov)."""
    part, surrogate = run.algorithm.selection, run.algorithm.surrogate["name"]
    if part["name"] == "none":
        return {}
    pick = lookup({"high_covariance": _PICKS}, run.algorithm, "selection").get(surrogate)
    if part["pick"] != pick:
        raise NoEqual("algorithm.selection.pick", f"with the surrogate {surrogate} it has {pick}")
    differs.append(
        "tokens are selected by their current log-probabilities"
        + (" among those that are not clipped" if surrogate == "clip_selected" else "")
        + "; here by the old ones"
    )
    low, high = part["low"], part["high"]
    if surrogate == "clip_selected":
        return {
            f"{_LOSS}.clip_cov_ratio": part["fraction"],
            f"{_LOSS}.clip_cov_lb": -math.inf if low is None else low,
            f"{_LOSS}.clip_cov_ub": math.inf if high is None else high,
        }
    if low is not None or high is not None:
        bound = "high" if low is None else "low"
        raise NoEqual(f"algorithm.selection.{bound}", "the largest covariances have no bounds; set it to null")
    return {f"{_LOSS}.kl_cov_ratio": part["fraction"]}


def kl(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """The penalty towards the reference policy."""
    penalty = run.algorithm.kl
    in_loss = penalty.coefficient > 0 and penalty.placement == "loss"
    settings: dict[str, Any] = {f"{ACTOR}.use_kl_loss": in_loss, "algorithm.use_kl_in_reward": penalty.in_reward}
    if penalty.coefficient > 0 and penalty.estimator == "k3":
        differs.append("a token's KL estimate is at most 10 nats")
    if in_loss and penalty.importance_weighted:
        raise NoEqual("algorithm.kl.importance_weighted", "the penalty is not multiplied by a ratio; set it to false")
    if in_loss:
        settings |= {f"{ACTOR}.kl_loss_type": _KL[penalty.estimator], f"{ACTOR}.kl_loss_coef": penalty.coefficient}
    if penalty.in_reward:
        settings |= {
            "algorithm.kl_penalty": _KL[penalty.estimator],
            "algorithm.kl_ctrl.type": "fixed",
            "algorithm.kl_ctrl.kl_coef": penalty.coefficient,
        }
    return settings


def entropy(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """The bonus on the mean token entropy."""
    coefficient, name = run.algorithm.entropy_coefficient, run.algorithm.aggregation["name"]
    if coefficient > 0 and name != "token_mean":
        raise NoEqual(
            "algorithm.entropy_coefficient",
            f"the entropy is aggregated as the loss is, by {name}, not over all tokens; set it to 0, or "
            "algorithm.aggregation.name=token_mean",
        )
    return {f"{ACTOR}.entropy_coeff": coefficient}


def mismatch(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """Old log-probabilities and the rollout correction."""
    correction, prefix = run.algorithm.correction, "algorithm.rollout_correction"
    bypass = run.algorithm.old_logprobs == "rollout"
    sampled = {f"{ROLLOUT}.calculate_log_probs": True}
    # Only its newer trainer keeps the loss as it is where the sampler's log-probabilities are the old ones.
    settings = {f"{prefix}.bypass_mode": bypass, **({"trainer.use_v1": True, **sampled} if bypass else {})}
    if correction["name"] == "none":
        return {f"{prefix}.rollout_is": None, **settings}
    if run.algorithm.surrogate["name"] == "geometric_mean":
        raise NoEqual("algorithm.correction.name", "its geo_mean loss averages the weights of a sequence's tokens")
    threshold = lookup(_THRESHOLDS, run.algorithm, "correction")(correction)
    return {
        f"{prefix}.rollout_is": correction["level"],
        f"{prefix}.rollout_is_threshold": threshold,
        **settings,
        **sampled,
    }


def _band(key: str, low: float, high: float) -> str:
    if low <= 0:
        raise NoEqual(key, "the lower bound is above 0")
    return f"{low}_{high}"


_THRESHOLDS = {
    "truncate": lambda correction: correction["cap"],
    "mask": lambda correction: _band("algorithm.correction.low", correction["low"], correction["high"]),
}
