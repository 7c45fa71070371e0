"""Exports are held against the other trainers themselves: their configuration classes, losses and advantages."""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.algorithms.objective import policy_loss
from harness.algorithms.registry import part
from harness.config import RunConfig, compose
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.export import main
from harness.exporting import trl, verl
from tests.parity import peers
from tests.parity.comparison import assert_same, differentiate
from tests.parity.inputs import Inputs, batches, rollouts

ENTRIES = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml") if path.stem != "base")
MIXTURE = "model=tiny_moe"  # on which every algorithm can run
GROUPS = ["algorithm.completions_per_prompt=8"]
PLAIN_GRADIENT = ["algorithm.surrogate.name=none", "~algorithm.surrogate.clip_low", "~algorithm.surrogate.clip_high"]


@cache
def run_of(name: str, *overrides: str) -> RunConfig:
    return compose([f"algorithm={name}", MIXTURE, *overrides])


def exported(module: Any, run: RunConfig) -> dict[str, Any] | None:
    """The settings, or None where parts have no equal and each is named with its value and a reason."""
    try:
        return yaml.safe_load(module.export(run))
    except ConfigError as error:
        for line in str(error).splitlines():
            assert re.fullmatch(r"(algorithm|task)\.[\w.]+=\S+ has no equal in (TRL|verl): .{10,}", line), line
        return None


def refused(module: Any, *overrides: str, name: str = "grpo") -> str:
    with pytest.raises(ConfigError) as error:
        module.export(run_of(name, *overrides))
    return str(error.value)


def our_loss(run: RunConfig) -> peers.Loss:
    algorithm = run.algorithm

    def loss(inputs: Inputs) -> tuple[torch.Tensor, dict[str, float]]:
        sampled = algorithm.old_logprobs == "rollout"
        return policy_loss(
            inputs.logprobs,
            inputs.rollout_logprobs if sampled else inputs.old_logprobs,
            inputs.advantages,
            inputs.mask,
            algorithm,
            rollout_logprobs=inputs.rollout_logprobs if algorithm.correction["name"] != "none" else None,
            ref_logprobs=inputs.ref_logprobs if algorithm.kl.coefficient else None,
        )

    return loss


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_prints_yaml_with_what_differs_on_top(capsys):
    assert main(["algorithm=gspo", "to=trl", "algorithm.surrogate.clip_low=1e-3"]) == 0
    printed = capsys.readouterr().out
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert comments[0].startswith("# algorithm=gspo (arXiv 2507.18071) for TRL")
    assert any("standard deviation + 1e-4; here + 1e-06" in line for line in comments)
    settings = yaml.safe_load(printed)
    assert settings["importance_sampling_level"] == "sequence"
    assert settings["epsilon"] == 1e-3


def test_the_command_takes_entries_from_outside(tmp_path, capsys):
    entry = tmp_path / "algorithm" / "mine.yaml"
    entry.parent.mkdir()
    entry.write_text("defaults: [grpo, _self_]\nname: mine\nsource: here\nsurrogate: {clip_high: 0.5}\n")
    assert main(["algorithm=mine", "--config-dir", str(tmp_path), "to=trl"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["epsilon_high"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=grpo_routing_replay", MIXTURE, "to=trl"], r"algorithm\.routing_replay=R2 has no equal in TRL: "),
        (["algorithm=grpo_routing_replay", "to=verl"], r"algorithm\.routing_replay=R2 .* dense model"),
        (["algorithm=gspo"], r"to=: name one trainer, to=trl or to=verl"),
        (["algorithm=gspo", "to=openrlhf"], r"to=openrlhf: name one trainer"),
        (["algorithm=gspo", "to=trl", "to=verl"], r"to=trl,verl: name one trainer"),
        (["algorithm=gpso", "to=trl"], r"algorithm/gpso"),
        (["algorithm=gspo", "to=trl", "algorithm.minibatches=3"], r"algorithm\.minibatches=3"),
    ],
)
def test_what_cannot_be_exported_ends_with_status_2_and_the_reason(arguments, message, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err)


def test_all_parts_without_an_equal_are_named_at_once():
    lines = refused(trl, name="ppo").splitlines()
    assert [line.split("=")[0] for line in lines] == ["algorithm.completions_per_prompt", "algorithm.advantage.name"]


EXPORTED = {
    trl: """cispo dr_grpo gmpo grpo grpo_icepop grpo_kl grpo_tis grpo_two_sided gspo gspo_token lite_ppo luspo minirl
    rloo sapo vespo""",
    verl: """cispo clip_cov dapo dppo_kl dppo_tv dr_grpo dro dual_clip_ppo gmpo grpo grpo_icepop grpo_kl
    grpo_kl_in_reward grpo_rollout_routing_replay grpo_routing_replay grpo_tis grpo_two_sided gspo gspo_rollout_logprobs
    gspo_token intellect3 kl_cov luspo minirl opo ppo reinforce reinforce_plus_plus reinforce_plus_plus_baseline rloo
    sapo""",
}


@pytest.mark.parametrize("module", EXPORTED)
def test_entries_that_have_an_equal(module):
    """Other entries may have none, and say why."""
    assert [name for name in EXPORTED[module].split() if exported(module, run_of(name)) is None] == []


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_class(run: RunConfig) -> str:
    return "GMPO" if "trl.experimental.gmpo.GMPOConfig" in trl.export(run) else "GRPO"


def grpo_config(settings: dict[str, Any], run: RunConfig) -> Any:
    """TRL's own configuration class, which checks what it is given, on a machine without a GPU."""
    package = peers.trl()
    if trl_class(run) == "GMPO":
        package = pytest.importorskip("trl.experimental.gmpo")
    config_class = getattr(package, f"{trl_class(run)}Config")
    return config_class(**settings, output_dir="unused", report_to="none", use_cpu=True, bf16=False)


# What says how many completions are learned from; a batch of the comparison has its own number.
BATCH_SIZES = (
    "num_generations",
    "generation_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
)


def assert_trl_agrees(run: RunConfig) -> None:
    settings = yaml.safe_load(trl.export(run))
    options = {key: value for key, value in settings.items() if key not in BATCH_SIZES}
    ours, theirs = our_loss(run), peers.trl_loss(trl_class(run), **options)
    for inputs in inputs_for(run, per_token=False):
        if run.algorithm.steps_per_batch > 1:
            assert_same(ours, theirs, inputs)
        else:  # the ratio is 1, and the loss means nothing but its gradient
            fresh = inputs._replace(old_logprobs=inputs.logprobs)
            torch.testing.assert_close(differentiate(ours, fresh)[1], differentiate(theirs, fresh)[1])


def inputs_for(run: RunConfig, per_token: bool) -> Iterator[Inputs]:
    """Batches whose log-ratios no trainer bounds in its own way, and whose probabilities are below 1."""
    bound = 0.5 if run.algorithm.surrogate["name"] == "vespo" else 5.0
    for inputs in islice(batches(bound, per_token), 1, None, 3):
        yield inputs._replace(rollout_logprobs=inputs.rollout_logprobs.clamp(max=-1e-3))


@pytest.mark.parametrize("name", ENTRIES)
def test_trl_computes_the_same_loss_from_what_an_entry_becomes(name):
    run = run_of(name)
    settings = exported(trl, run)
    if settings is not None:
        grpo_config(settings, run)
        assert_trl_agrees(run)


TEMPERATURES = ["algorithm=sapo", "algorithm.surrogate.tau_positive=1.5", "algorithm.surrogate.tau_negative=2.5"]
TRL_LOSSES = {
    "temperatures": TEMPERATURES,
    "gamma weights": [
        "algorithm=vespo",
        "algorithm.surrogate.k_positive=1.1",
        "algorithm.surrogate.lambda_positive=1.2",
        "algorithm.surrogate.k_negative=1.3",
        "algorithm.surrogate.lambda_negative=1.4",
    ],
    "gspo by tokens": ["algorithm=gspo", "algorithm.aggregation.name=token_mean"],
    "sums of sequences": ["algorithm=grpo", "algorithm.aggregation.name=sequence_sum"],
    "constant length": [
        "algorithm=grpo",
        "algorithm.aggregation.name=constant_length",
        "+algorithm.aggregation.length=40",
    ],
    "weights of sequences": ["algorithm=cispo", "algorithm.ratio.name=sequence"],
    "sequence-token": ["algorithm=gspo", "algorithm.ratio.name=sequence_token"],
    "penalty": ["algorithm=grpo", "algorithm.kl.coefficient=0.1"],
    "weighted penalty": ["algorithm=grpo", "algorithm.kl.coefficient=0.1", "algorithm.kl.importance_weighted=true"],
    "masked sequences": ["algorithm=deepseek_v3_2", "algorithm.old_logprobs=trainer"],
    "plain gradient of one step": ["algorithm=reinforce", "algorithm.advantage.name=leave_one_out", *GROUPS],
    "truncated": [
        "algorithm=grpo",
        "algorithm.correction.name=truncate",
        "+algorithm.correction.level=sequence",
        "+algorithm.correction.cap=1.1",
    ],
    "masked": [
        "algorithm=gspo",
        "algorithm.correction.name=mask",
        "+algorithm.correction.level=token",
        "+algorithm.correction.low=0.7",
        "+algorithm.correction.high=1.5",
    ],
}


@pytest.mark.parametrize("overrides", TRL_LOSSES.values(), ids=TRL_LOSSES)
def test_trl_computes_the_same_loss_from_other_parts(overrides):
    assert_trl_agrees(compose(overrides))


def test_trl_makes_as_many_optimizer_steps_of_as_many_completions():
    run = run_of(
        "grpo", "rollout.completions_per_batch=96", "algorithm.minibatches=4", "algorithm.epochs=2",
        "algorithm.completions_per_prompt=6", "model.micro_batch_sequences=10",
    )  # fmt: skip
    config = grpo_config(yaml.safe_load(trl.export(run)), run)
    assert config.num_generations == 6
    assert config.generation_batch_size == 96
    # Of the 24 completions of an optimizer step at most 10 are in a backward pass: three times 8.
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 3)
    assert config.steps_per_generation / config.gradient_accumulation_steps * config.num_iterations == 8


def test_trl_scales_rewards_to_leave_one_out_advantages():
    pytest.importorskip("trl")
    settings = yaml.safe_load(trl.export(run_of("rloo", "algorithm.completions_per_prompt=4")))
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    (weight,) = settings["reward_weights"]
    # The mean of the others: 1/6, 1/2, 1/3, 1/2.
    expected = torch.tensor([5 / 6, -1 / 2, 1 / 6, -1 / 2])
    ones = torch.ones(4, 1, dtype=torch.float64)
    options = {key: settings[key] for key in ("scale_rewards", "num_generations")}
    scored = peers.trl_scores("GRPO", Inputs(*[ones] * 6), weight * rewards, per_device_train_batch_size=4, **options)
    torch.testing.assert_close(scored["advantages"], expected)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["algorithm.old_logprobs=rollout"], "algorithm.old_logprobs=rollout"),
        (
            ["algorithm=vespo", "algorithm.kl.coefficient=0.1", "algorithm.kl.importance_weighted=true"],
            "algorithm.kl.importance_weighted=True",
        ),
        (["algorithm.kl.coefficient=0.1", "algorithm.kl.placement=reward"], "algorithm.kl.placement=reward"),
        (["algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=k2"], "algorithm.kl.estimator=k2"),
        (
            ["algorithm.aggregation.name=constant_length", "+algorithm.aggregation.length=30"],
            "algorithm.aggregation.length=30",
        ),
        (PLAIN_GRADIENT, "algorithm.surrogate.name=none"),
        (["algorithm.surrogate.name=dual_clip", "+algorithm.surrogate.bound=1.1"], "algorithm.surrogate.bound=1.1"),
        (["+algorithm.dynamic_sampling.max_batches=3"], "algorithm.dynamic_sampling.max_batches=3"),
        (
            ["algorithm.shaping.name=overlong", "+algorithm.shaping.buffer=8", "+algorithm.shaping.penalty=1.0"],
            "algorithm.shaping.name=overlong",
        ),
    ],
)
def test_trl_has_no_equal(overrides, key):
    assert refused(trl, *overrides).startswith(f"{key} has no equal in TRL: ")


def test_settings_of_a_penalty_that_is_off_do_not_matter():
    settings = yaml.safe_load(trl.export(run_of("grpo", "algorithm.kl.estimator=k1", "algorithm.kl.placement=reward")))
    assert settings["beta"] == 0


def test_trl_adds_no_load_balancing_loss_to_a_mixture_of_experts():
    assert yaml.safe_load(trl.export(run_of("grpo")))["router_aux_loss_coef"] == 0
    assert "router_aux_loss_coef" not in yaml.safe_load(trl.export(compose(["algorithm=grpo"])))


def test_dropout_is_off_in_trl_as_it_is_here():
    assert yaml.safe_load(trl.export(run_of("grpo")))["disable_dropout"] is True


# --- verl ------------------------------------------------------------------------------------------------------------


def verl_conf() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    return Path(spec.origin).parent / "trainer" / "config"


@cache
def verl_defaults(*overrides: str) -> DictConfig:
    """verl's own configuration."""
    with hydra.initialize_config_dir(str(verl_conf()), version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def defaults_of(settings: dict[str, Any]) -> DictConfig:
    """verl's own configuration with the engine of an export."""
    engines = [default["override model_engine"] for default in settings["defaults"] if isinstance(default, dict)]
    return verl_defaults(*(f"model_engine={engine}" for engine in engines))


def verl_config(run: RunConfig) -> DictConfig:
    """verl's configuration with what a run becomes on top, as its own command composes it."""
    settings = yaml.safe_load(verl.export(run))
    with open_dict(OmegaConf.create({**defaults_of(settings)})) as config:
        merged = OmegaConf.merge(config, {key: value for key, value in settings.items() if key != "defaults"})
    OmegaConf.set_struct(merged, True)
    return merged


@pytest.mark.parametrize("name", ["gspo", "gspo_routing_replay"])
def test_verls_command_composes_an_exported_file(name, tmp_path):
    run = run_of(name)
    (tmp_path / "exported.yaml").write_text(verl.export(run))
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        composed = hydra.compose("exported", overrides=[f"hydra.searchpath=[file://{verl_conf()}]"])
    assert composed == verl_config(run)
    assert composed != verl_defaults()


def unknown_keys(settings: dict[str, Any], known: Any, prefix: str = "") -> list[str]:
    """Dotted keys that the configuration does not have; below null and {} anything goes."""
    found = []
    for key, value in settings.items():
        if key not in known:
            found.append(prefix + key)
        elif isinstance(value, dict) and known[key]:
            found += unknown_keys(value, known[key], f"{prefix}{key}.")
    return found


# Keys that verl reads though its YAML does not list them: arguments of the reward manager for overlong completions, and
# a part of its dataclass for the policy loss.
UNLISTED = {"defaults", "reward.reward_kwargs", "actor_rollout_ref.actor.policy_loss.rollout_correction"}


@pytest.mark.parametrize("name", ENTRIES)
def test_verl_knows_every_key_of_what_an_entry_becomes(name):
    settings = exported(verl, run_of(name))
    if settings is not None:
        known = OmegaConf.to_container(defaults_of(settings))
        assert set(unknown_keys(settings, known)) <= UNLISTED


def verl_policy_loss(config: DictConfig) -> Any:
    """The loss that verl's actor computes under that configuration."""
    core = peers.verl()
    from verl.utils.config import omega_conf_to_dataclass

    actor, correction = omega_conf_to_dataclass(config.actor_rollout_ref.actor), config.algorithm.rollout_correction
    actor.global_batch_info["loss_scale_factor"] = actor.loss_scale_factor

    def loss(inputs: Inputs) -> tuple[torch.Tensor, dict[str, float]]:
        mask, weights = inputs.mask.bool(), None
        if correction.rollout_is:
            weights = peers.verl_weights(inputs, correction.rollout_is, correction.rollout_is_threshold)
        value, metrics = core.get_policy_loss_fn(actor.policy_loss.loss_mode)(
            old_log_prob=inputs.rollout_logprobs if correction.bypass_mode else inputs.old_logprobs,
            log_prob=inputs.logprobs,
            advantages=inputs.advantages,
            response_mask=mask,
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
            rollout_is_weights=weights,
        )
        if actor.use_kl_loss:
            penalty = core.kl_penalty(inputs.logprobs, inputs.ref_logprobs, actor.kl_loss_type)
            penalty = core.agg_loss(penalty, mask, actor.loss_agg_mode, **actor.global_batch_info)
            value = value + actor.kl_loss_coef * penalty
        return value, metrics

    return loss


def assert_verl_agrees(run: RunConfig, per_token: bool) -> None:
    config = verl_config(run)
    ours, theirs = our_loss(run), verl_policy_loss(config)
    for inputs in inputs_for(run, per_token):
        if config.actor_rollout_ref.actor.policy_loss.loss_mode == "bypass_mode":  # the ratio is a constant there
            torch.testing.assert_close(differentiate(ours, inputs)[1], differentiate(theirs, inputs)[1])
        else:
            assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("name", ENTRIES)
def test_verl_computes_the_same_loss_from_what_an_entry_becomes(name):
    run = run_of(name)
    # Where tokens are selected verl's choice is random, or of a micro-batch's current log-probabilities.
    if exported(verl, run) is not None and run.algorithm.selection["name"] == "none":
        assert_verl_agrees(run, per_token=run.algorithm.critic is not None)


VERL_LOSSES = {
    "temperatures": TEMPERATURES,
    "divergences": ["algorithm=dppo_tv", "algorithm.surrogate.low=0.1", "algorithm.surrogate.high=0.3"],
    "sequence-token": ["algorithm=gspo", "algorithm.ratio.name=sequence_token"],
    "constant length": [
        "algorithm=grpo",
        "algorithm.aggregation.name=constant_length",
        "+algorithm.aggregation.length=33",
    ],
    "sums of sequences": ["algorithm=grpo", "algorithm.aggregation.name=sequence_sum"],
    "k1": ["algorithm=grpo", "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=k1"],
    "k2": ["algorithm=gspo", "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=k2"],
    "k3": ["algorithm=grpo", "algorithm.kl.coefficient=0.1"],
    "plain": ["algorithm=grpo", *PLAIN_GRADIENT],
    "truncated": [
        "algorithm=gspo",
        "algorithm.correction.name=truncate",
        "+algorithm.correction.level=sequence",
        "+algorithm.correction.cap=1.1",
    ],
    "masked": [
        "algorithm=grpo",
        "algorithm.correction.name=mask",
        "+algorithm.correction.level=token",
        "+algorithm.correction.low=0.7",
        "+algorithm.correction.high=1.5",
    ],
}


@pytest.mark.parametrize("overrides", VERL_LOSSES.values(), ids=VERL_LOSSES)
def test_verl_computes_the_same_loss_from_other_parts(overrides):
    run = compose(overrides)
    assert_verl_agrees(run, per_token=run.algorithm.ratio["name"] != "sequence")


IN_REWARD = ("algorithm.kl.coefficient=0.1", "algorithm.kl.placement=reward")
ADVANTAGES = [
    *((name,) for name in ENTRIES),
    *((name, *IN_REWARD) for name in ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo")),
]


@pytest.mark.parametrize("chosen", ADVANTAGES, ids=lambda chosen: "-".join(chosen[:2]))
def test_verl_computes_the_same_advantages(chosen):
    run = run_of(*chosen)
    if exported(verl, run) is None:
        return
    config = verl_config(run).algorithm
    settings = {key: config[key] for key in ("gamma", "lam", "norm_adv_by_std_in_grpo")}
    function, ours = part("advantage", run.algorithm.advantage)
    for batch in rollouts(dense=run.algorithm.critic is not None or config.use_kl_in_reward):
        if run.algorithm.completions_per_prompt == 1:
            batch = batch._replace(group_ids=torch.arange(len(batch.mask)))
        expected = peers.verl_advantages(config.adv_estimator, batch, config=config, **settings)[0] * batch.mask
        advantages = function(batch.rewards, batch.ends, batch.group_ids, batch.mask, batch.values, **ours)[0]
        # Where all returns are equal verl whitens what rounding has left of them.
        torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-4)


def test_verl_selects_as_many_tokens_within_the_same_bounds():
    loss = verl_config(run_of("clip_cov", "algorithm.selection.high=4.0")).actor_rollout_ref.actor.policy_loss
    assert (loss.clip_cov_ratio, loss.clip_cov_lb, loss.clip_cov_ub) == (2e-4, 1.0, 4.0)
    actor = verl_config(run_of("kl_cov", "algorithm.surrogate.coefficient=0.7")).actor_rollout_ref.actor
    assert (actor.policy_loss.kl_cov_ratio, actor.policy_loss.ppo_kl_coef) == (2e-3, 0.7)
    assert actor.ppo_micro_batch_size_per_gpu == 32  # all of an optimizer step, so that they are selected among all


def test_verl_makes_as_many_optimizer_steps_of_as_many_prompts():
    run = run_of(
        "grpo", "rollout.completions_per_batch=96", "algorithm.minibatches=4", "algorithm.epochs=2",
        "algorithm.completions_per_prompt=6", "model.micro_batch_sequences=10",
    )  # fmt: skip
    config = verl_config(run)
    actor = config.actor_rollout_ref.actor
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (16, 6)
    assert config.data.train_batch_size / actor.ppo_mini_batch_size * actor.ppo_epochs == 8
    assert actor.ppo_micro_batch_size_per_gpu == 8


def test_verl_gets_the_critic():
    config = verl_config(run_of("ppo", "algorithm.critic.value_clip=0.3"))
    assert config.algorithm.adv_estimator == "gae"
    assert config.critic.cliprange_value == 0.3
    assert config.critic.loss_agg_mode == "token-mean"
    assert config.critic.optim.lr == 1e-3
    assert config.critic.ppo_mini_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_verl_replays_routes_in_megatron(mode):
    config = verl_config(run_of("gspo", f"algorithm.routing_replay={mode}"))
    assert config.actor_rollout_ref.actor.strategy == "megatron"
    assert config.actor_rollout_ref.actor.megatron.router_replay.mode == mode
    assert config.actor_rollout_ref.rollout.enable_rollout_routing_replay == (mode == "R3")
    assert config.actor_rollout_ref.actor.optim.override_optimizer_config.adam_beta2 == 0.95


def test_verl_takes_the_samplers_logprobs_as_old_ones():
    config = verl_config(run_of("grpo", "algorithm.old_logprobs=rollout"))
    assert config.algorithm.rollout_correction.bypass_mode
    assert config.trainer.use_v1
    assert config.actor_rollout_ref.rollout.calculate_log_probs


def test_verl_penalizes_divergence_in_the_reward():
    overrides = ["algorithm.kl.coefficient=0.1", "algorithm.kl.placement=reward", "algorithm.kl.estimator=k1"]
    config = verl_config(run_of("grpo", *overrides))
    assert config.algorithm.use_kl_in_reward
    assert not config.actor_rollout_ref.actor.use_kl_loss
    assert (config.algorithm.kl_penalty, config.algorithm.kl_ctrl.kl_coef) == ("kl", 0.1)


def test_verl_samples_again_and_shapes_overlong_completions():
    overlong = ["algorithm.shaping.name=overlong", "+algorithm.shaping.buffer=8", "+algorithm.shaping.penalty=0.5"]
    again = "+algorithm.dynamic_sampling.max_batches=3"
    config = verl_config(run_of("grpo", again))
    assert (config.algorithm.filter_groups.enable, config.algorithm.filter_groups.metric) == (True, "reward")
    config = verl_config(run_of("grpo", again, *overlong))
    assert config.algorithm.filter_groups.metric == "acc"  # a penalty does not make a group informative
    assert config.reward.reward_manager.name == "dapo"
    assert config.reward.reward_kwargs.max_resp_len == 40
    assert config.reward.reward_kwargs.overlong_buffer_cfg == {
        "enable": True, "log": False, "len": 8, "penalty_factor": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [
        ("grpo", ["algorithm.minibatches=64"], "algorithm.minibatches=64"),
        ("grpo", ["algorithm.entropy_coefficient=0.01"], "algorithm.entropy_coefficient=0.01"),
        ("clip_cov", ["algorithm.selection.pick=largest"], "algorithm.selection.pick=largest"),
        ("kl_cov", ["algorithm.selection.low=1.0"], "algorithm.selection.low=1.0"),
        ("reinforce", ["algorithm.completions_per_prompt=2"], "algorithm.advantage.name=reward"),
        ("lite_ppo", [], "algorithm.advantage.scale=batch"),
        ("grpo", ["task=chain_sum_steps"], "task.step_verifier=\\w+"),
        (
            "gspo",
            ["algorithm.surrogate.name=dual_clip", "+algorithm.surrogate.bound=3.0"],
            "algorithm.ratio.name=sequence",
        ),
        ("intellect3", ["algorithm.surrogate.lower=0.0"], "algorithm.surrogate.lower=0.0"),
        ("ppo", ["algorithm.advantage.whiten=false"], "algorithm.advantage.whiten=False"),
        (
            "gspo",
            [
                "algorithm.correction.name=truncate",
                "+algorithm.correction.level=token",
                "+algorithm.correction.cap=2.0",
            ],
            "algorithm.ratio.name=sequence",
        ),
        (
            "grpo",
            ["algorithm.kl.coefficient=0.1", "algorithm.kl.importance_weighted=true"],
            "algorithm.kl.importance_weighted=True",
        ),
    ],
)
def test_verl_has_no_equal(name, overrides, key):
    assert re.match(f"{key} has no equal in verl: ", refused(verl, *overrides, name=name))


@pytest.mark.parametrize(("name", "critic"), [("grpo", ""), ("ppo", ", critic.model.path")])
def test_verl_is_told_which_models_are_to_be_named(name, critic):
    header = " ".join(verl.export(compose([f"algorithm={name}"])).replace("#", "").split())
    assert f"the length of the training, actor_rollout_ref.model.path{critic} set for your" in header


def test_verl_starts_policy_and_critic_from_the_runs_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    run = compose(["algorithm=ppo", "model=huggingface", f"model.path={tmp_path}"])
    config = verl_config(run)
    assert config.actor_rollout_ref.model.path == config.critic.model.path == str(tmp_path)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_dropout_of_the_models_configuration_is_off_in_verl(tmp_path, algorithm):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 128, "embd_pdrop": 0.0}')
    config = verl_config(compose([f"algorithm={algorithm}", "model=huggingface", f"model.path={tmp_path}"]))
    off = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    assert config.actor_rollout_ref.model.override_config == off
    assert config.critic.model.override_config == (off if algorithm == "ppo" else {})


def test_verl_averages_the_entropy_over_tokens_where_the_loss_is():
    settings = yaml.safe_load(verl.export(run_of("ppo", "algorithm.entropy_coefficient=0.01")))
    assert settings["actor_rollout_ref"]["actor"]["entropy_coeff"] == 0.01
