"""verl: a primary configuration on top of its `ppo_trainer.yaml`, as verl 0.9.1 reads it."""

import math
from typing import Any

from harness.config import RunConfig
from harness.exporting.translation import (
    NoEqual,
    lookup,
    micro_batch,
    page,
    refuse_steps,
    renamed,
    translate,
    yours,
)
from harness.exporting.verl_objective import ACTOR, ROLLOUT, aggregation, entropy, kl, loss, mismatch, selection
from harness.policy.architecture import architecture


def export(run: RunConfig) -> str:
    """A YAML file for `python -m verl.trainer.main_ppo --config-dir DIR --config-name FILE`.

    Raises:
        ConfigError: naming each part that has no equal.
    """
    settings, differs = translate(run, "verl", _TRANSLATORS)
    engine: list[Any] = [{"override model_engine": "megatron"}] if _replays(run) else []
    defaults = {"defaults": ["ppo_trainer", *engine, "_self_"]}
    header = [
        f"algorithm={run.algorithm.name} ({run.algorithm.source}) for verl 0.9.1",
        "python -m verl.trainer.main_ppo --config-dir DIR --config-name FILE_WITHOUT_YAML, and further overrides",
        ", ".join(["add: data files, reward function, devices, the length of the training", *_paths(run)]),
        yours(run),
    ]
    return page(header, differs, defaults | _nested(settings))


def _paths(run: RunConfig) -> list[str]:
    """The models that are to be named, where the run's own is none that another trainer could load."""
    critic = ["critic.model.path"] if run.algorithm.critic else []
    return [] if run.model.path else ["actor_rollout_ref.model.path", *critic]


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        branch = tree
        for name in path:
            branch = branch.setdefault(name, {})
        branch[last] = value
    return tree


def _replays(run: RunConfig) -> bool:
    return run.algorithm.routing_replay != "disabled"


def _batch(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    algorithm, prompts = run.algorithm, run.prompts_per_batch
    if prompts % algorithm.minibatches:
        raise NoEqual(
            "algorithm.minibatches",
            f"it counts the prompts of an optimizer step, and a rollout batch has {prompts}; make it a divisor",
        )
    size = micro_batch(run)
    reference = {"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": size} if algorithm.kl.coefficient else {}
    return {
        "data.train_batch_size": prompts,
        "data.max_prompt_length": run.task.max_prompt_tokens,
        "data.max_response_length": run.task.max_completion_tokens,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": algorithm.completions_per_prompt,
        f"{ROLLOUT}.temperature": run.rollout.temperature,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": size,
        f"{ACTOR}.ppo_mini_batch_size": prompts // algorithm.minibatches,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": size,
        f"{ACTOR}.ppo_epochs": algorithm.epochs,
        f"{ACTOR}.shuffle": True,
        **reference,
    }


def _model(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    """The checkpoint, whose dropout would be on while it learns, as it never is here."""
    if run.model.path is None:
        return {}
    fields = architecture(run.model).items()
    dropout = {name: 0.0 for name, value in fields if "drop" in name and isinstance(value, float) and value > 0}
    settings: dict[str, Any] = {}
    for network in ("actor_rollout_ref.model", *(["critic.model"] if run.algorithm.critic else [])):
        settings[f"{network}.path"] = run.model.path
        if dropout:
            settings[f"{network}.override_config"] = dropout
    return settings


def _reward(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    shaping = run.algorithm.shaping
    refuse_steps(run)
    if shaping["name"] == "none":
        return {}
    names = lookup({"overlong": {"buffer": "len", "penalty": "penalty_factor"}}, run.algorithm, "shaping")
    differs.append("the penalty is for a reward function that gives 0 to 1, as verifiers do here")
    arguments = "reward.reward_kwargs"
    return {
        "reward.reward_manager.name": "dapo",
        f"{arguments}.max_resp_len": run.task.max_completion_tokens,
        f"{arguments}.overlong_buffer_cfg": {"enable": True, "log": False, **renamed(shaping, names)},
    }


def _sampling(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if run.algorithm.dynamic_sampling is None:
        return {}
    most = run.algorithm.dynamic_sampling.max_batches
    differs.append(f"prompts are sampled until the batch is full, without a limit; here {most} rollout batches at most")
    return {
        "algorithm.filter_groups.enable": True,
        # Before the shaping, which would tell apart completions that are equally right.
        "algorithm.filter_groups.metric": "reward" if run.algorithm.shaping["name"] == "none" else "acc",
    }


def _advantage(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    return lookup(_ADVANTAGES, run.algorithm, "advantage")(run, differs)


def _group(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    advantage = run.algorithm.advantage
    if advantage["scale"] == "batch":
        raise NoEqual("algorithm.advantage.scale", "it has std, of the group, and none")
    if advantage["scale"] == "std" and advantage["epsilon"] != 1e-6:
        differs.append(f"rewards are divided by their standard deviation + 1e-6; here + {advantage['epsilon']:g}")
    return {"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": advantage["scale"] == "std"}


def _return(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if run.algorithm.completions_per_prompt > 1 or run.algorithm.kl.in_reward:
        raise NoEqual(
            "algorithm.advantage.name",
            "the reward itself is the advantage only of a group of one, without a KL penalty in it; set "
            "algorithm.completions_per_prompt=1",
        )
    return {"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": False}


def _gae(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    advantage, critic = run.algorithm.advantage, run.algorithm.critic
    assert critic is not None  # validated
    if not advantage["whiten"]:
        raise NoEqual("algorithm.advantage.whiten", "advantages from a critic are always whitened")
    return {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": advantage["gamma"],
        "algorithm.lam": advantage["lam"],
        "critic.cliprange_value": critic.value_clip,
        "critic.loss_agg_mode": "token-mean",
        "critic.ppo_micro_batch_size_per_gpu": micro_batch(run),
        **_adamw(run, "critic.optim", critic.learning_rate, critic.max_grad_norm),
    }


def _active_group(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    raise NoEqual(
        "algorithm.advantage.name",
        "its gpg counts completions that earned something, not those of groups whose rewards differ",
    )


_ADVANTAGES = {
    "active_group": _active_group,
    "group": _group,
    "leave_one_out": lambda run, differs: {"algorithm.adv_estimator": "rloo"},
    "optimal_baseline": lambda run, differs: {"algorithm.adv_estimator": "opo"},
    "whitened_return": lambda run, differs: {"algorithm.adv_estimator": "reinforce_plus_plus", "algorithm.gamma": 1.0},
    "whitened_group": lambda run, differs: {"algorithm.adv_estimator": "reinforce_plus_plus_baseline"},
    "reward": _return,
    "gae": _gae,
}


def _replay(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    if not _replays(run):
        return {}
    mode = run.algorithm.routing_replay
    settings = {f"{ACTOR}.megatron.router_replay.mode": mode}
    return {**settings, f"{ROLLOUT}.enable_rollout_routing_replay": True} if mode == "R3" else settings


def _optimizer(run: RunConfig, differs: list[str]) -> dict[str, Any]:
    optimizer = run.algorithm.optimizer
    if optimizer.warmup_updates:
        differs.append(
            "the learning rate rises from one rollout batch to the next, from 0 in the first: lr_warmup_steps "
            f"{_warmup_batches(run)} for {optimizer.warmup_updates} optimizer steps"
        )
    if optimizer.weight_decay and _replays(run):
        differs.append("weight decay leaves out biases and the weights of norms")
    return _adamw(run, f"{ACTOR}.optim", optimizer.learning_rate, optimizer.max_grad_norm)


def _adamw(run: RunConfig, prefix: str, learning_rate: float, max_grad_norm: float) -> dict[str, Any]:
    optimizer = run.algorithm.optimizer
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": max_grad_norm,
        "lr_warmup_steps": _warmup_batches(run),
    }
    betas = {"adam_beta1": optimizer.beta1, "adam_beta2": optimizer.beta2, "adam_eps": optimizer.epsilon}
    if _replays(run):  # the optimizer is Megatron's, whose own names these are
        settings |= {"lr_decay_style": "constant", "override_optimizer_config": betas}
    else:
        settings |= {
            "lr_scheduler_type": "constant",
            "betas": [optimizer.beta1, optimizer.beta2],
            "override_optimizer_config": {"eps": optimizer.epsilon},
        }
    return {f"{prefix}.{key}": value for key, value in settings.items()}


def _warmup_batches(run: RunConfig) -> int:
    return math.ceil(run.algorithm.optimizer.warmup_updates / run.algorithm.steps_per_batch)


_TRANSLATORS = (
    _batch,
    _model,
    _reward,
    _sampling,
    _advantage,
    loss,
    aggregation,
    selection,
    kl,
    entropy,
    mismatch,
    _replay,
    _optimizer,
)
