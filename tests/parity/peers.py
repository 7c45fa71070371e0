"""The losses, advantages and weights of the real TRL and verl, called as their own trainers call them.

Both are imported at the first call, since that takes seconds; where one is not installed its tests are skipped.
A loss here is a function of :class:`~tests.parity.inputs.Inputs` that returns (scalar, metrics).
"""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parity.inputs import Inputs, Rollouts

Loss = Callable[[Inputs], tuple[Tensor, dict[str, float]]]


# Options that TRL's trainers take over from their configuration under the same name.
VERBATIM = (
    "beta",
    "importance_sampling_level",
    "loss_type",
    "mask_truncated_completions",
    "max_completion_length",
    "multi_objective_aggregation",
    "normalize_advantages",
    "num_generations",
    "num_iterations",
    "off_policy_mask_threshold",
    "pad_to_multiple_of",
    "reward_clip_range",
    "scale_rewards",
    "top_entropy_quantile",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
)


def trl() -> Any:
    """TRL's trainers."""
    if find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install -c constraints.txt -e '.[parity]'")
    import trl

    return trl


def verl() -> Any:
    """verl's numeric core."""
    if find_spec("verl") is None:
        pytest.skip("verl is not installed: pip install -c constraints.txt --no-deps verl, beside '.[parity]'")
    from verl.trainer.ppo import core_algos

    return core_algos


def one_process() -> SimpleNamespace:
    """What a trainer asks of its accelerator, where there is one process."""

    def same(value: Any, reduction: str | None = None) -> Any:
        return value

    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=same,
        reduce=same,
        gather_for_metrics=same,
    )


def trl_trainer(name: str, logprobs: Tensor, entropies: Tensor | None = None, **options: Any) -> Any:
    """A TRL trainer without its model and data.

    Args:
        name: the trainer's name, e.g. `GRPO`.
        logprobs: [B, T], what a forward pass of its model would give.
        entropies: [B, T], likewise; zeros if None.
        options: of the trainer's own configuration class, whose defaults and checks hold.
    """
    package = trl()
    if name == "GMPO":
        from trl.experimental import gmpo as package
    trainer_class = getattr(package, f"{name}Trainer")
    with warnings.catch_warnings():  # of transformers about its own deprecated options
        warnings.simplefilter("ignore", FutureWarning)
        arguments = getattr(package, f"{name}Config")(output_dir="unused", report_to="none", bf16=False, **options)

    class WithoutModel(trainer_class):
        _tokenizer = SimpleNamespace(pad_token_id=0)

        def __init__(self) -> None:
            for option in VERBATIM:
                if hasattr(arguments, option):
                    setattr(self, option, getattr(arguments, option))
            self.args, self.accelerator = arguments, one_process()
            self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
            self.epsilon_low = arguments.epsilon
            self.epsilon_high = arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high
            self.current_gradient_accumulation_steps = arguments.steps_per_generation = 1
            self.aux_loss_enabled = self.use_adaptive_entropy = False
            self.entropy_coef = getattr(arguments, "entropy_coef", 0.0)
            self._entropy_bonus_enabled = self.entropy_coef != 0
            self._metrics = {"train": defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor, None]:
            return logprobs, torch.zeros_like(logprobs) if entropies is None else entropies, None

    return WithoutModel()


def trl_loss(name: str = "GRPO", micro_batches: int = 1, entropies: Tensor | None = None, **options: Any) -> Loss:
    """TRL's loss: the `_compute_loss` of the trainer of that name; with `use_vllm`, corrected by its own weights.

    Args:
        name: the trainer's name.
        micro_batches: how many of them make an optimizer batch; the inputs are one of them.
        entropies: [B, T], of the model's distributions, for an entropy bonus.
        options: of the trainer's configuration.
    """

    def loss(inputs: Inputs) -> tuple[Tensor, dict[str, float]]:
        trainer = trl_trainer(name, inputs.logprobs, entropies, **options)
        trainer.current_gradient_accumulation_steps = micro_batches
        tokens = torch.zeros_like(inputs.mask, dtype=torch.long)
        constant = bool((inputs.advantages == inputs.advantages[:, :1] * inputs.mask).all())
        batch = {
            "prompt_ids": tokens[:, :1],
            "prompt_mask": tokens[:, :1],
            "completion_ids": tokens,
            "completion_mask": inputs.mask,
            "advantages": inputs.advantages[:, 0] if constant else inputs.advantages,
            "old_per_token_logps": inputs.old_logprobs,
            "old_logps": (inputs.old_logprobs * inputs.mask).sum(1),
            "ref_per_token_logps": inputs.ref_logprobs,
            "num_items_in_batch": inputs.mask.sum(),
        }
        if options.get("use_vllm"):
            batch["importance_sampling_ratio"] = trl_weights(inputs, **options)
        value = trainer._compute_loss(trainer.model, batch)
        return value, {key: values[-1] for key, values in trainer._metrics["train"].items()}

    return loss


def trl_scores(name: str, inputs: Inputs, rewards: Tensor, **options: Any) -> dict[str, Tensor]:
    """What TRL's trainer makes of finished completions: `advantages` [B] and, with `use_vllm`, the rollout correction.

    Args:
        name: the trainer's name.
        inputs: the completions; rows may not have holes, since TRL pads on the right.
        rewards: [B], completions of one prompt side by side.
        options: of the trainer's configuration.
    """
    lengths = inputs.mask.sum(1).long().tolist()
    completions = [[1] * length for length in lengths]
    sampled = [row[:length].tolist() for row, length in zip(inputs.rollout_logprobs, lengths, strict=True)]
    trainer = trl_trainer(name, inputs.old_logprobs, **options)
    trainer.ref_model = SimpleNamespace()
    trainer._get_per_token_logps_and_entropies = lambda model, *batch, **options: (
        (inputs.ref_logprobs if model is trainer.ref_model else inputs.old_logprobs),
        None,
        None,
    )
    generated = ([[1]] * len(rewards), completions)
    texts = [""] * len(rewards)
    trainer._generate = lambda prompts: (
        (*generated, None, texts, sampled, {}, None, None) if name == "GRPO" else (*generated, texts)
    )
    trainer._calculate_rewards = lambda *batch: rewards.unsqueeze(1)
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["reward"]
    trainer.environment_factories = trainer.environments = trainer.tools = None
    trainer._is_vlm = trainer.log_multimodal = False
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    return trainer._generate_and_score_completions([{"prompt": ""}] * len(rewards))


def trl_weights(inputs: Inputs, **options: Any) -> Tensor:
    """TRL's correction of the rollout's mismatch, [B, T] or [B, 1]."""
    # Its padding is on the right: sequences are pressed together for it and laid out again, and a group has two.
    order = (1 - inputs.mask).argsort(dim=1, stable=True)
    width = int(inputs.mask.sum(1).max())
    packed = Inputs(*(tensor.gather(1, order)[:, :width].repeat(2, 1) for tensor in inputs))
    options |= {"num_generations": 2, "per_device_train_batch_size": 2}
    weights = trl_scores("GRPO", packed, torch.zeros(len(packed.mask)), **options)["importance_sampling_ratio"]
    weights = weights[: len(inputs.mask)]
    if weights.shape[1] == 1:
        return weights
    return torch.ones_like(inputs.mask).scatter(1, order[:, :width], weights.double())


def verl_config(loss_scale_factor: int | None = None, policy: dict[str, Any] | None = None, **options: Any) -> Any:
    """verl's actor configuration."""
    verl()
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_scale_factor=loss_scale_factor,
        policy_loss=PolicyLossConfig(**policy or {}),
        **options,
    )
    if loss_scale_factor:
        config.global_batch_info["loss_scale_factor"] = loss_scale_factor
    return config


def verl_loss(
    mode: str,
    loss_agg_mode: str = "token-mean",
    rollout_is: str | None = None,
    rollout_is_threshold: float | str = 2.0,
    kl: tuple[str, float] | None = None,
    **options: Any,
) -> Loss:
    """verl's policy loss of that mode.

    Args:
        mode: `actor.policy_loss.loss_mode`.
        loss_agg_mode: `actor.loss_agg_mode`.
        rollout_is: level of the rollout correction, token or sequence.
        rollout_is_threshold: its cap, or `low_high`.
        kl: `actor.kl_loss_type` and `actor.kl_loss_coef`.
        options: of :func:`verl_config`.
    """

    def loss(inputs: Inputs) -> tuple[Tensor, dict[str, float]]:
        core = verl()
        mask = inputs.mask.bool()
        weights = None
        if rollout_is:
            weights = verl_weights(inputs, rollout_is, rollout_is_threshold)
        config = verl_config(loss_agg_mode=loss_agg_mode, **options)
        value, metrics = core.get_policy_loss_fn(mode)(
            old_log_prob=inputs.old_logprobs,
            log_prob=inputs.logprobs,
            advantages=inputs.advantages,
            response_mask=mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        if kl:
            penalty = core.kl_penalty(inputs.logprobs, inputs.ref_logprobs, kl[0])
            value = value + kl[1] * core.agg_loss(penalty, mask, loss_agg_mode, **config.global_batch_info)
        return value, metrics

    return loss


def verl_weights(inputs: Inputs, level: str, threshold: float | str) -> Tensor:
    """verl's correction of the rollout's mismatch, [B, T], 0 where masked."""
    verl()
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    log_ratio = inputs.old_logprobs - inputs.rollout_logprobs
    return compute_rollout_correction_weights(log_ratio, inputs.mask, level, threshold)[0]


def verl_advantages(name: str, batch: Rollouts, **settings: Any) -> tuple[Tensor, Tensor]:
    """verl's advantages and returns of that estimator, [B, T] each; what masked positions hold means nothing."""
    function = verl().get_adv_estimator_fn(name)
    settings = {"index": batch.group_ids.numpy(), "values": batch.values, **settings}
    takes = inspect.signature(function).parameters
    settings = {key: value for key, value in settings.items() if key in takes}
    return function(token_level_rewards=batch.rewards, response_mask=batch.mask, **settings)


def verl_explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Of [B, T] values and returns, from verl's metrics of a whole batch."""
    verl()
    from verl import DataProto
    from verl.trainer.ppo.metric_utils import compute_data_metrics

    same = dict.fromkeys(("token_level_scores", "token_level_rewards", "advantages"), returns)
    tokens = mask.long()
    batch = {**same, "returns": returns, "values": values, "response_mask": tokens, "prompts": tokens[:, :1]}
    batch |= {"responses": tokens, "attention_mask": torch.cat([tokens[:, :1], tokens], 1)}
    return compute_data_metrics(DataProto.from_dict(batch))["critic/vf_explained_var"]


def verl_overlong(lengths: Tensor, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """The rewards that verl's DAPO reward manager gives to right answers of these lengths [B]."""
    verl()
    from verl import DataProto
    from verl.workers.reward_manager.dapo import DAPORewardManager

    manager = DAPORewardManager(
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: "", eos_token="$"),
        num_examine=0,
        compute_score=lambda **answer: 1.0,
        max_resp_len=max_tokens,
        overlong_buffer_cfg=SimpleNamespace(enable=True, len=buffer, penalty_factor=penalty, log=False),
    )
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    prompt = torch.ones(len(lengths), 1, dtype=torch.long)
    batch = DataProto.from_dict(
        {"prompts": prompt, "responses": mask, "attention_mask": torch.cat([prompt, mask], 1)},
        {
            "reward_model": np.array([{"ground_truth": ""}] * len(lengths)),
            "data_source": np.array([""] * len(lengths)),
        },
    )
    return manager(batch).sum(1)
