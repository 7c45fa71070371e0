"""TRL: the keys of `trl.GRPOConfig`, as TRL 1.16.0 reads them."""

import math
from typing import Any

from harness.algorithms.divergence import LOG_RATIO_BOUND
from harness.config import RunConfig
from harness.exporting.translation import (
    NoEqual,
    lookup,
    micro_batch,
    minibatch,
    page,
    refuse_steps,
    renamed,
    translate,
    yours,
)
from harness.policy.architecture import is_moe

_CLIP = {"clip_low": "epsilon", "clip_high": "epsilon_high"}
# Surrogate -> its settings.
_SURROGATES: dict[str, dict[str, str]] = {
    "clip": _CLIP,
    "dual_clip": {**_CLIP, "bound": "delta"},
    "masked_clip": {**_CLIP, "divergence": "off_policy_mask_threshold"},
    "none": {},
    "cispo": {"upper": "epsilon_high"},
    "sapo": {"tau_positive": "sapo_temperature_pos", "tau_negative": "sapo_temperature_neg"},
    "vespo": {
        "k_positive": "vespo_k_pos",
        "lambda_positive": "vespo_lambda_pos",
        "k_negative": "vespo_k_neg",
        "lambda_negative": "vespo_lambda_neg",
    },
    "geometric_mean": _CLIP,
}
_CLIPPED = {"sequence_mean": "grpo", "token_mean": "dapo", "sequence_sum": "luspo", "constant_length": "dr_grpo"}
# Surrogate -> aggregation -> loss_type.
_LOSS_TYPES: dict[str, dict[str, str]] = {
    "clip": _CLIPPED,
    "dual_clip": _CLIPPED,
    "masked_clip": _CLIPPED,
    "none": _CLIPPED,
    "cispo": {"token_mean": "cispo"},
    "sapo": {"sequence_mean": "sapo"},
    "vespo": {"token_mean": "vespo"},
    "geometric_mean": {"sequence_mean": "grpo"},
}
# What divides by the tokens of the whole rollout batch.
_BATCH_NORMALIZED = ("dapo", "cispo", "vespo")
_TOKEN_RATIOS = ("vespo", "geometric_mean")  # surrogates that make the sequence's weight of them
_LEVELS = {"token": "token", "sequence": "sequence", "sequence_token": "sequence"}
_CORRECTIONS = {
    "truncate": {"cap": "vllm_importance_sampling_clip_max"},
    "mask": {"low": "vllm_importance_sampling_clip_min", "high": "vllm_importance_sampling_clip_max"},
}
# Why some surrogates cannot be corrected.
_UNCORRECTED = {
    "masked_clip": "the drift of a sequence would be that from the sampler",
    "vespo": "it changes the sequence's weight and does not multiply the loss",
    "geometric_mean": "there is none",
}
_SCALES = {"std": "group", "none": "none", "batch": "batch"}
_GMPO, _GRPO = "trl.experimental.gmpo.GMPO", "trl.GRPO"


def export(run: RunConfig) -> str:
    """YAML that `trl.GRPOConfig` takes.

    Raises:
        ConfigError: naming each part that has no equal.
    """
    settings, differs = translate(run, "TRL", _TRANSLATORS)
    trainer = _GMPO if _own_trainer(run) else _GRPO
    header = [
        f"algorithm={run.algorithm.name} ({run.algorithm.source}) for TRL 1.16.0",
        f"{trainer}Trainer(args={trainer}Config(**yaml.safe_load(open(FILE))), ...)"
        + ("" if _own_trainer(run) else ", or: trl grpo --config FILE"),
        "add: model, data, reward functions, output_dir, the length of the training; without a GPU use_cpu",
        "for one device: on N divide gradient_accumulation_steps or per_device_train_batch_size by N",
        yours(run),
    ]
    return page(header, differs, settings)


def _own_trainer(run: RunConfig) -> bool:
    return run.algorithm.surrogate["name"] == "geometric_mean"


def _batch(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    algorithm, size = run.algorithm, micro_batch(run)
    if algorithm.completions_per_prompt < 2:
        raise NoEqual("algorithm.completions_per_prompt", "num_generations is at least 2")
    if algorithm.epochs > 1:
        differs.append("all epochs cut a rollout batch into the same optimizer steps; here each shuffles anew")
    return {
        "num_generations": algorithm.completions_per_prompt,
        "generation_batch_size": run.rollout.completions_per_batch,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": minibatch(run) // size,
        "num_iterations": algorithm.epochs,
        "temperature": run.rollout.temperature,
        "max_completion_length": run.task.max_completion_tokens,
    }


def _reward(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    refuse_steps(run)
    if run.algorithm.shaping["name"] != "none":
        raise NoEqual("algorithm.shaping.name", "there is none; do the same in the reward function and set it to none")
    return {}


def _sampling(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if run.algorithm.dynamic_sampling:
        raise NoEqual(
            "algorithm.dynamic_sampling.max_batches",
            "prompts whose completions all earn the same are not sampled again; set algorithm.dynamic_sampling=null",
        )
    return {}


def _advantage(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    advantage, size = run.algorithm.advantage, run.algorithm.completions_per_prompt
    if advantage["name"] == "leave_one_out":
        differs.append("reward_weights, for one reward function, turn the distance from the mean into the others' one")
        return {"scale_rewards": "none", "reward_weights": [size / max(size - 1, 1)]}
    if advantage["name"] != "group":
        raise NoEqual(
            "algorithm.advantage.name",
            "there is no critic" if run.algorithm.critic else "it has group, leave_one_out",
        )
    scale = advantage["scale"]
    if scale != "none" and advantage["epsilon"] != 1e-4:
        differs.append(f"rewards are divided by their standard deviation + 1e-4; here + {advantage['epsilon']:g}")
    return {"scale_rewards": _SCALES[scale]}


def _ratio(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    algorithm, surrogate = run.algorithm, run.algorithm.surrogate["name"]
    if surrogate == "none":
        return {"importance_sampling_level": "token"}
    if surrogate in _TOKEN_RATIOS:
        return {"importance_sampling_level": lookup({"token": "token"}, algorithm, "ratio", f"with {surrogate} ")}
    level = lookup(_LEVELS, algorithm, "ratio")
    # The ratio of a sequence has the same gradient whichever form it has, where nothing else tells its tokens apart.
    told_apart = algorithm.correction.get("level") == "token" or (
        algorithm.kl.coefficient > 0 and algorithm.kl.importance_weighted
    )
    if algorithm.ratio["name"] == "sequence_token" and told_apart:
        raise NoEqual(
            "algorithm.ratio.name",
            "it has the ratio of the whole sequence, which is the same only where all tokens are weighed alike; set "
            "algorithm.correction.level=sequence and algorithm.kl.importance_weighted=false",
        )
    return {"importance_sampling_level": level}


def _loss(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    surrogate, aggregation = run.algorithm.surrogate, run.algorithm.aggregation
    names = lookup(_SURROGATES, run.algorithm, "surrogate")
    _check_surrogate(run)
    given = f"with the surrogate {surrogate['name']} "
    loss_type = lookup(_LOSS_TYPES[surrogate["name"]], run.algorithm, "aggregation", given)
    longest = run.task.max_completion_tokens
    if aggregation.get("length", longest) != longest:
        raise NoEqual(
            "algorithm.aggregation.length",
            f"its constant is max_completion_length; set it to task.max_completion_tokens={longest}",
        )
    if loss_type in _BATCH_NORMALIZED and run.algorithm.minibatches > 1:
        differs.append(
            "the sum over tokens is divided by the mean tokens of the rollout batch's optimizer steps; here by each "
            "step's own"
        )
    return {"loss_type": loss_type, **renamed(surrogate, names)}


def _check_surrogate(run: RunConfig) -> None:
    surrogate = run.algorithm.surrogate
    if surrogate["name"] == "none" and run.algorithm.steps_per_batch > 1:
        raise NoEqual(
            "algorithm.surrogate.name",
            "the policy gradient is always weighed by the importance ratio, which is 1 only with one optimizer step "
            "for each rollout batch; set algorithm.epochs=1 algorithm.minibatches=1",
        )
    if surrogate["name"] == "cispo" and surrogate["lower"] > 0:
        raise NoEqual("algorithm.surrogate.lower", "the ratio has an upper bound alone; set it to 0")
    if surrogate["name"] == "dual_clip" and surrogate["bound"] < 1 + surrogate["clip_high"]:
        raise NoEqual("algorithm.surrogate.bound", "delta is the same only from 1 + clip_high on")


def _selection(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if run.algorithm.selection["name"] != "none":
        raise NoEqual("algorithm.selection.name", "all tokens are treated alike")
    return {}


def _kl(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    kl = run.algorithm.kl
    if kl.coefficient == 0:
        return {"beta": 0.0}
    if kl.placement != "loss":
        raise NoEqual("algorithm.kl.placement", "the penalty is in the loss")
    if kl.estimator != "k3":
        raise NoEqual("algorithm.kl.estimator", "the penalty is estimated by k3")
    if kl.importance_weighted and _own_trainer(run):
        raise NoEqual("algorithm.kl.importance_weighted", "GMPOTrainer has the plain penalty")
    if kl.importance_weighted and run.algorithm.old_logprobs == "rollout":
        raise NoEqual("algorithm.kl.importance_weighted", "its ratio is to the trainer's own old log-probabilities")
    return {"beta": kl.coefficient, "use_bias_correction_kl": kl.importance_weighted}


def _entropy(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    coefficient = run.algorithm.entropy_coefficient
    if coefficient > 0 and _own_trainer(run):
        raise NoEqual("algorithm.entropy_coefficient", "GMPOTrainer has no entropy bonus")
    if coefficient > 0 and micro_batch(run) < minibatch(run):
        differs.append("the entropy is averaged over the tokens of each micro-batch; here of each optimizer step")
    return {"entropy_coef": coefficient}


def _mismatch(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """Old log-probabilities and the rollout correction, which needs the sampler's own log-probabilities from vLLM."""
    correction, surrogate = run.algorithm.correction, run.algorithm.surrogate["name"]
    if surrogate == "vespo" and run.algorithm.old_logprobs == "rollout":
        # Its weight has the sampler's log-probabilities in the old ones' place, as far as the correction allows.
        return _corrected("token_truncate", {"vllm_importance_sampling_clip_max": math.exp(LOG_RATIO_BOUND)})
    if run.algorithm.old_logprobs != "trainer":
        raise NoEqual("algorithm.old_logprobs", "they are always computed by the trainer; set it to trainer")
    if correction["name"] == "none":
        if surrogate == "masked_clip":
            differs.append("with use_vllm the drift of a sequence is that from the sampler's log-probabilities")
        return {"vllm_importance_sampling_correction": False}
    names = lookup(_CORRECTIONS, run.algorithm, "correction")
    if surrogate in _UNCORRECTED:
        raise NoEqual("algorithm.correction.name", f"with the surrogate {surrogate} {_UNCORRECTED[surrogate]}")
    return _corrected(f"{correction['level']}_{correction['name']}", renamed(correction, names))


def _corrected(mode: str, bounds: dict[str, float]) -> dict[str, Any]:
    return {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        **bounds,
    }


def _experts(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if run.algorithm.routing_replay != "disabled":
        raise NoEqual("algorithm.routing_replay", "experts are chosen anew in every pass")
    # A model's own load-balancing loss is on by default.
    return {"router_aux_loss_coef": 0.0} if is_moe(run.model) else {}


def _dropout(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    return {"disable_dropout": True}


def _optimizer(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    optimizer = run.algorithm.optimizer
    if optimizer.warmup_updates:
        differs.append("the warm-up begins with a learning rate of 0, so it is one optimizer step behind")
    if optimizer.weight_decay:
        differs.append("weight decay leaves out biases and the weights of norms")
    return {
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": optimizer.warmup_updates,
    }


_TRANSLATORS = (
    _batch,
    _reward,
    _sampling,
    _advantage,
    _ratio,
    _loss,
    _selection,
    _kl,
    _entropy,
    _mismatch,
    _experts,
    _dropout,
    _optimizer,
)
