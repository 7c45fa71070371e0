"""The rules between the values of a configuration: what cannot run stops here, before any compute."""

import math
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.algorithms.registry import PARTS, check_settings, load_parts
from harness.config import (
    BUDGET_AXES,
    AlgorithmConfig,
    BudgetConfig,
    LoggerConfig,
    RunConfig,
    TaskConfig,
)
from harness.errors import ConfigError, Declined
from harness.evaluation import check_evaluation
from harness.evaluation.entries import entry, held_out_entries
from harness.policy.architecture import architecture, check_architecture, is_moe
from harness.runs.loggers import LOGGERS
from harness.tasks import check_task

# torch takes seeds below 2^64, but reports hold them as float64 too, which rounds whole numbers from 2^53 on.
_LARGEST_SEED = 2**53 - 1
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check(run: RunConfig) -> RunConfig:
    """Resolve what depends on the machine and enforce the rules between values."""
    load_parts()  # before plugins, so that a plugin with a part of the same name is what is refused
    for plugin in run.plugins:
        _import_plugin(plugin)
    run.device = resolve_device(run.device)
    if run.budget.axis == "auto":
        run.budget.axis = "flops" if run.device == "cpu" else "device_seconds"
    _check_budget(run.budget)
    _check_loggers(run.logger)
    _check_ranges(run)
    _check_parts(run.algorithm)
    _check_batch(run)
    _check_task(run.task, "task")
    if run.model.cold_start:
        _check_task(run.model.cold_start.task, "model.cold_start.task")
        _require(
            bool(run.model.cold_start.task.worked_solution),
            "model.cold_start.task.worked_solution is null: name a writer of worked solutions",
        )
    _check_model(run)
    _check_token_credit(run)
    check_evaluation(run.evaluation)
    _check_held_out(run)
    return run


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device}: choose auto, cpu or cuda")
    if device == "cpu":
        return device
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device=cuda: this machine has no CUDA device; use device=auto or device=cpu")
    return "cuda" if available else "cpu"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _import_plugin(plugin: str) -> None:
    try:
        import_module(plugin)
    except ImportError as error:
        raise ConfigError(f"plugins: cannot import {plugin} ({error}); is its folder on PYTHONPATH?") from error
    except Exception as error:  # of a part that cannot be registered, or whatever its code does
        raise ConfigError(f"plugins: {plugin}: {type(error).__name__}: {error}") from error


def _check_budget(budget: BudgetConfig) -> None:
    _require(
        budget.axis in BUDGET_AXES,
        f"budget.axis={budget.axis}: choose auto or one of {', '.join(BUDGET_AXES)}",
    )
    for axis, limit in budget.limits.items():
        _require(axis in BUDGET_AXES, f"budget.limits.{axis}: no such axis; the axes are {', '.join(BUDGET_AXES)}")
        _require(
            math.isfinite(limit) and limit > 0,
            f"budget.limits.{axis}={limit}: a budget must be a finite number above 0",
        )
    _require(budget.axis in budget.limits, f"budget.limits.{budget.axis} is absent: give the limit of the chosen axis")


def _check_loggers(logger: LoggerConfig) -> None:
    for name in logger.loggers:
        _require(name in LOGGERS, f"logger.loggers has {name}: choose from {', '.join(LOGGERS)}")
        spec = find_spec(name)
        # A folder of that name in the working directory, as wandb makes one, is found too, but has no origin.
        _require(
            spec is not None and spec.origin is not None,
            f"logger.loggers has {name}, which is not installed: pip install {name}, or leave it out",
        )
    _require(logger.mode in ("offline", "online"), f"logger.mode={logger.mode}: choose offline or online")
    _require(
        bool(re.fullmatch(r"[A-Za-z0-9_.-]+", logger.project)),
        f"logger.project={logger.project}: use letters, digits, '_', '.' and '-'",
    )


def _check_ranges(run: RunConfig) -> None:
    algorithm, optimizer = run.algorithm, run.algorithm.optimizer
    positive: Mapping[str, float] = {
        "threads": run.threads,
        "checkpoint_every": run.checkpoint_every,
        "algorithm.completions_per_prompt": algorithm.completions_per_prompt,
        "algorithm.epochs": algorithm.epochs,
        "algorithm.minibatches": algorithm.minibatches,
        "algorithm.optimizer.learning_rate": optimizer.learning_rate,
        "algorithm.optimizer.max_grad_norm": optimizer.max_grad_norm,
        "rollout.completions_per_batch": run.rollout.completions_per_batch,
        "rollout.temperature": run.rollout.temperature,
        "rollout.decode_sequences": run.rollout.decode_sequences,
        "model.micro_batch_sequences": run.model.micro_batch_sequences,
        "evaluation.limit": run.evaluation.limit,
        "evaluation.batch_size": run.evaluation.batch_size,
    }
    if algorithm.critic:
        for setting in ("learning_rate", "max_grad_norm", "value_clip"):
            positive = {**positive, f"algorithm.critic.{setting}": getattr(algorithm.critic, setting)}
    not_negative: Mapping[str, float] = {
        "algorithm.kl.coefficient": algorithm.kl.coefficient,
        "algorithm.entropy_coefficient": algorithm.entropy_coefficient,
        "algorithm.optimizer.epsilon": optimizer.epsilon,
        "algorithm.optimizer.weight_decay": optimizer.weight_decay,
        "algorithm.optimizer.warmup_updates": optimizer.warmup_updates,
        "evaluation.samples": run.evaluation.samples,
    }
    seeds, start = {"seed": run.seed}, run.model.cold_start
    if start:
        seeds["model.cold_start.seed"] = start.seed
        for setting in ("steps", "batch_size", "learning_rate"):
            positive = {**positive, f"model.cold_start.{setting}": getattr(start, setting)}
        for setting in ("warmup_steps", "weight_decay", "router_penalty"):
            not_negative = {**not_negative, f"model.cold_start.{setting}": getattr(start, setting)}
        _require(0 <= start.noise <= 1, f"model.cold_start.noise={start.noise}: must be a probability, from 0 to 1")
    for key, value in positive.items():
        _require(math.isfinite(value) and value > 0, f"{key}={value}: must be a finite number above 0")
    for key, value in not_negative.items():
        message = f"{key}={value}: must not be negative" if value < 0 else f"{key}={value}: must be a finite number"
        _require(math.isfinite(value) and value >= 0, message)
    for key, seed in seeds.items():
        _require(
            0 <= seed <= _LARGEST_SEED,
            f"{key}={seed}: must be from 0 to {_LARGEST_SEED}, so that reports tell it exactly",
        )
    for setting in ("beta1", "beta2"):
        value = getattr(optimizer, setting)
        _require(0 <= value < 1, f"algorithm.optimizer.{setting}={value}: must be at least 0 and below 1")
    results = Path(run.results).absolute()
    folder = next(path for path in (results, *results.parents) if path.exists())
    _require(folder.is_dir(), f"results={run.results}: {folder} is a file; name a folder")
    tasks = run.evaluation.tasks
    for task in tasks:
        _require(tasks.count(task) == 1, f"evaluation.tasks has {task} more than once: name each once")
    for fraction in run.evaluation.fractions:
        _require(0 <= fraction <= 1, f"evaluation.fractions has {fraction}: fractions of the budget lie in 0 to 1")
    fractions = run.evaluation.fractions
    _require(
        not fractions or 1 in fractions,
        f"evaluation.fractions={fractions}: runs are compared at the end of their budget; add 1.0, or leave all out",
    )
    _require(run.rollout.engine == "embedded", f"rollout.engine={run.rollout.engine}: the only engine is embedded")
    allowed = r"[A-Za-z0-9_.]+"
    for key, name, pattern, letters in (
        ("sweep", run.sweep, f"{allowed}(/{allowed})*", "letters, digits, '_' and '.'"),
        ("algorithm.name", algorithm.name, allowed, "letters, digits, '_' and '.'"),
        ("model.name", run.model.name, allowed, "letters, digits, '_' and '.'"),
        ("task.name", run.task.name, r"[A-Za-z0-9_.-]+", "letters, digits, '_', '.' and '-'"),
    ):
        _require(
            bool(re.fullmatch(pattern, name)) and ".." not in name,
            f"{key}={name}: use {letters}, since it names a folder",
        )


def _check_parts(algorithm: AlgorithmConfig) -> None:
    for kind in PARTS:
        check_settings(kind, getattr(algorithm, kind))
    needs_selection = _trait(algorithm, "surrogate", "needs_selection")
    _require(
        needs_selection == (algorithm.selection["name"] != "none"),
        f"algorithm.surrogate.name={algorithm.surrogate['name']} and algorithm.selection.name="
        f"{algorithm.selection['name']}: "
        + (
            "name a selection, whose tokens it treats apart"
            if needs_selection
            else "it treats no token apart; use none"
        ),
    )
    kl = algorithm.kl
    _require(kl.estimator in ("k1", "k2", "k3"), f"algorithm.kl.estimator={kl.estimator}: choose k1, k2 or k3")
    _require(kl.placement in ("loss", "reward"), f"algorithm.kl.placement={kl.placement}: choose loss or reward")
    _require(
        not kl.importance_weighted or (kl.placement == "loss" and _trait(algorithm, "ratio", "token_level")),
        "algorithm.kl.importance_weighted=true takes a penalty in the loss and an importance ratio of each token: set "
        "algorithm.kl.placement=loss and algorithm.ratio.name=token, or importance_weighted to false",
    )
    _require(
        algorithm.routing_replay in ("disabled", "R2", "R3"),
        f"algorithm.routing_replay={algorithm.routing_replay}: choose disabled, R2 or R3",
    )
    _require(
        algorithm.old_logprobs in ("trainer", "rollout"),
        f"algorithm.old_logprobs={algorithm.old_logprobs}: choose trainer or rollout",
    )
    _require(
        algorithm.old_logprobs == "trainer" or algorithm.routing_replay != "R2",
        "algorithm.routing_replay=R2 records in the trainer's pass for old log-probabilities, which "
        "algorithm.old_logprobs=rollout leaves out: use R3, or old_logprobs=trainer",
    )
    _require(
        algorithm.old_logprobs == "trainer" or algorithm.correction["name"] == "none",
        f"algorithm.correction.name={algorithm.correction['name']} compares the rollout's log-probabilities with the "
        "trainer's, which algorithm.old_logprobs=rollout leaves out: set it to trainer, or the correction to none",
    )
    dynamic = algorithm.dynamic_sampling
    _require(
        dynamic is None or dynamic.max_batches > 1,
        "algorithm.dynamic_sampling.max_batches must be at least 2, the first rollout batch included; set "
        "algorithm.dynamic_sampling=null to switch it off",
    )
    needs_critic = _trait(algorithm, "advantage", "needs_critic")
    _require(
        not needs_critic or algorithm.critic is not None,
        f"algorithm.advantage.name={algorithm.advantage['name']} needs a critic: set algorithm.critic (see "
        "conf/algorithm/ppo.yaml)",
    )
    _require(
        needs_critic or algorithm.critic is None,
        f"algorithm.critic is set but algorithm.advantage.name={algorithm.advantage['name']} uses none: set it to null",
    )
    _require(
        algorithm.completions_per_prompt > 1
        or not (_trait(algorithm, "advantage", "needs_group") or algorithm.dynamic_sampling),
        "algorithm.completions_per_prompt=1: a group of one has no baseline; use at least 2, or a critic",
    )


def _trait(algorithm: AlgorithmConfig, kind: str, trait: str) -> bool:
    return getattr(PARTS[kind][getattr(algorithm, kind)["name"]], trait, False)


def _check_batch(run: RunConfig) -> None:
    algorithm, completions = run.algorithm, run.rollout.completions_per_batch
    _require(
        completions % algorithm.completions_per_prompt == 0,
        f"rollout.completions_per_batch={completions} does not divide into groups of "
        f"algorithm.completions_per_prompt={algorithm.completions_per_prompt}: make it a multiple",
    )
    _require(
        completions % algorithm.minibatches == 0,
        f"rollout.completions_per_batch={completions} does not divide into algorithm.minibatches="
        f"{algorithm.minibatches}: make it a multiple",
    )
    _require(
        not _trait(algorithm, "surrogate", "clips") or algorithm.steps_per_batch > 1,
        "algorithm.epochs x algorithm.minibatches is one optimizer step for each rollout batch: the importance ratio "
        f"is then 1 and the surrogate '{algorithm.surrogate['name']}' never clips; use at least 2",
    )
    _require(
        run.rollout.decode_sequences >= algorithm.completions_per_prompt,
        f"rollout.decode_sequences={run.rollout.decode_sequences}: completions of a prompt are decoded together, and "
        f"algorithm.completions_per_prompt={algorithm.completions_per_prompt}; use at least that",
    )
    buffer, room = algorithm.shaping.get("buffer", 0), run.task.max_completion_tokens
    _require(
        buffer <= room,
        f"algorithm.shaping.buffer={buffer}: the penalty would begin before the first token, since completions of task "
        f"'{run.task.name}' are cut at task.max_completion_tokens={room}; use at most that",
    )


def _check_task(task: TaskConfig, key: str) -> None:
    check_task(task, key)
    for name in ("max_prompt_tokens", "max_completion_tokens"):
        _require(getattr(task, name) > 0, f"{key}.{name}={getattr(task, name)}: must be above 0")
    errors = task.reward_model
    _require(
        0 <= errors.label_noise < 0.5,
        f"{key}.reward_model.label_noise={errors.label_noise}: must be a probability of at "
        "least 0 and below 0.5, where nothing is left to learn from; 0 is off",
    )
    _require(
        math.isfinite(errors.length_bias),
        f"{key}.reward_model.length_bias={errors.length_bias}: must be a finite number; 0 is off",
    )
    _require(
        task.step_verifier is None or (errors.label_noise, errors.length_bias) == (0, 0),
        f"{key}.step_verifier={task.step_verifier} judges steps, and {key}.reward_model puts errors on the reward of a "
        "whole answer alone: set step_verifier to null, or label_noise and length_bias to 0",
    )


def _check_held_out(run: RunConfig) -> None:
    """Refuse an evaluation that asks the run's problems in other words: they are held out by their prompt."""
    trained = {"task": run.task}
    if run.model.cold_start:
        trained["model.cold_start.task"] = run.model.cold_start.task
    for name, held_out in held_out_entries(run.evaluation).items():
        asked = entry(held_out)
        for key, task in trained.items():
            same = (task.source, task.dataset, task.path) == (asked.source, asked.dataset, asked.path)
            _require(
                not same or "".join(task.prompt.split()) == "".join(asked.prompt.split()),
                f"{key}.prompt={task.prompt!r}: evaluation.tasks has {name}, which asks problems of the same data set "
                f"by the prompt {asked.prompt!r} of conf/task/{held_out}.yaml, so that those it holds out would be met "
                "in training; use that prompt, or leave this task out of evaluation.tasks",
            )


# What a part with a trait does, and what to use instead.
_WHOLE_SEQUENCE = {
    ("ratio", "sequence_level"): ("has one importance ratio for a whole sequence", "sequence_token"),
    ("surrogate", "sequence_level"): ("has one loss for a whole sequence", "clip"),
    ("surrogate", "sequence_weight"): ("has one weight for a whole sequence, by the sign of its advantage", "clip"),
    ("advantage", "outcome_only"): ("has one advantage for a whole sequence", "group"),
}


def _token_credit(run: RunConfig) -> str | None:
    """What gives the tokens of one completion different advantages; None where all of them have the same."""
    algorithm = run.algorithm
    if run.task.step_verifier is not None:
        return f"the rewards for steps of task '{run.task.name}'"
    if algorithm.critic is not None:
        return "the critic"
    if algorithm.kl.in_reward and _trait(algorithm, "advantage", "to_go"):
        return "the KL penalty in the reward"
    return None


def _check_token_credit(run: RunConfig) -> None:
    """Refuse advantages that differ along a sequence where they would be spread over all of it again."""
    cause = _token_credit(run)
    if cause is None:
        return
    for (kind, trait), (what, instead) in _WHOLE_SEQUENCE.items():
        if _trait(run.algorithm, kind, trait):
            key = f"algorithm.{kind}.name"
            message = (
                f"{key}={getattr(run.algorithm, kind)['name']} {what}, in which {cause} would tell its tokens apart in "
                f"vain: use {key}={instead}"
            )
            if run.task.step_verifier is not None:
                raise Declined(f"{message}, or task.step_verifier=null")
            raise ConfigError(message)


def _check_model(run: RunConfig) -> None:
    model = run.model
    _require(
        (model.path is None) != (model.architecture is None),
        "model.path and model.architecture: give exactly one, a checkpoint or an architecture to build",
    )
    _require(
        (model.architecture is None) == (model.cold_start is None),
        "model.cold_start: an embedded architecture needs one and a checkpoint takes none",
    )
    _require(
        model.path is None or Path(model.path).is_dir() or bool(_HUB_NAME.fullmatch(model.path)),
        f"model.path={model.path}: no such folder; give a Hugging Face model directory or a hub name",
    )
    _require(
        model.path is None or not Path(model.path).is_dir() or (Path(model.path) / "config.json").exists(),
        f"model.path={model.path}: that folder has no config.json; give a Hugging Face model directory",
    )
    if model.architecture is not None:
        check_architecture(model)
    _check_positions_of(architecture(model), run)
    if run.algorithm.routing_replay != "disabled" and not is_moe(model):
        raise Declined(
            f"algorithm.routing_replay={run.algorithm.routing_replay} has nothing to replay on the dense model "
            f"'{model.name}': choose a mixture-of-experts model or set algorithm.routing_replay=disabled"
        )


def _check_positions_of(fields: Mapping[str, Any], run: RunConfig) -> None:
    limit, model = "max_position_embeddings", f"model.name={run.model.name}"
    check_positions(run.task, fields.get(limit), model, limit)
    rope = fields.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":  # where beyond it the longest sequence turns all positions of a micro-batch
        limit = f"original_{limit}"
        check_positions(run.task, rope.get(limit) or fields.get(limit), model, limit)


def check_positions(task: TaskConfig, room: int | None, model: str, limit: str) -> None:
    """Refuse sequences that are longer than a model has positions for.

    Args:
        task: says how long its prompts and completions may be.
        room: the positions; None where there is no limit.
        model: what the message calls it.
        limit: the field that says how many positions there are.
    """
    asked = task.max_prompt_tokens + task.max_completion_tokens - 1  # nobody reads on from the last one
    _require(
        room is None or asked <= room,
        f"task.max_prompt_tokens={task.max_prompt_tokens} and task.max_completion_tokens={task.max_completion_tokens} "
        f"make sequences of up to {asked} tokens where {model} has {room} positions ({limit}): lower one of the two",
    )
