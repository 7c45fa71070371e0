"""The typed schema of a run. Values live in YAML alone; here are their names and types."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from harness.errors import ConfigError

# Hydra and OmegaConf are imported where they are used: what needs the types alone works without them.
if TYPE_CHECKING:
    from omegaconf import DictConfig

BUDGET_AXES = ("flops", "device_seconds", "tokens", "queries", "updates")


@dataclass
class KLConfig:
    """Penalty towards the initial policy."""

    estimator: str
    coefficient: float
    placement: str
    importance_weighted: bool

    @property
    def in_reward(self) -> bool:
        """Whether it lowers the reward of each token."""
        return self.coefficient > 0 and self.placement == "reward"


@dataclass
class CriticConfig:
    """PPO's value model: as large as the policy, with an optimizer of its own."""

    learning_rate: float
    value_clip: float
    max_grad_norm: float


@dataclass
class DynamicSamplingConfig:
    """Sampling again for prompts whose completions all earn the same (DAPO)."""

    max_batches: int


@dataclass
class OptimizerConfig:
    """AdamW on the policy."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    warmup_updates: int


@dataclass
class AlgorithmConfig:
    """An algorithm: a choice of parts (`name` and settings of a registered function) and of an update schedule."""

    name: str
    source: str
    completions_per_prompt: int
    advantage: dict[str, Any]
    ratio: dict[str, Any]
    surrogate: dict[str, Any]
    aggregation: dict[str, Any]
    correction: dict[str, Any]
    selection: dict[str, Any]
    shaping: dict[str, Any]
    dynamic_sampling: DynamicSamplingConfig | None
    kl: KLConfig
    entropy_coefficient: float
    old_logprobs: str
    routing_replay: str
    critic: CriticConfig | None
    epochs: int
    minibatches: int
    optimizer: OptimizerConfig
    search_space: dict[str, list[Any]]

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that follow one rollout batch."""
        return self.epochs * self.minibatches


@dataclass
class RewardModelConfig:
    """Errors put on the training reward, as a learned reward model makes them; the true reward is logged beside it."""

    label_noise: float
    length_bias: float


@dataclass
class TaskConfig:
    """Prompts and verifiable rewards."""

    name: str
    source: str
    dataset: str | None
    parameters: dict[str, Any]
    path: str | None
    prompt: str
    answer: str
    answer_pattern: str | None
    verifier: str
    step_verifier: str | None
    reward_model: RewardModelConfig
    worked_solution: str | None
    max_prompt_tokens: int
    max_completion_tokens: int


@dataclass
class ColdStartConfig:
    """The supervised start of an embedded model."""

    task: TaskConfig
    noise: float
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    router_penalty: float
    seed: int


@dataclass
class ModelConfig:
    """The network: built from an architecture and cold-started, or loaded from a path."""

    name: str
    path: str | None
    architecture: dict[str, Any] | None
    cold_start: ColdStartConfig | None
    experts_implementation: str | None
    activation_checkpointing: bool
    micro_batch_sequences: int


@dataclass
class RolloutConfig:
    """Sampling."""

    engine: str
    completions_per_batch: int
    temperature: float
    decode_sequences: int
    cuda_graphs: bool


@dataclass
class BudgetConfig:
    """Where a run stops."""

    axis: str
    limits: dict[str, float]

    @property
    def limit(self) -> float:
        """The limit on the chosen axis, in that axis's unit."""
        return self.limits[self.axis]


@dataclass
class EvaluationConfig:
    """Downstream evaluation with lm-eval."""

    tasks: list[str]
    task_path: str | None
    fractions: list[float]
    limit: int
    batch_size: int
    samples: int


@dataclass
class LoggerConfig:
    """Where else the rows of metrics.jsonl are shown."""

    loggers: list[str]
    project: str
    entity: str | None
    mode: str


@dataclass
class TuningConfig:
    """Equal trials for every algorithm, the best of which the comparison takes; `trial` is null in the comparison."""

    trials: int
    overrides: list[str]
    trial: int | None


@dataclass
class RunConfig:
    """Everything that one run is made of."""

    algorithm: AlgorithmConfig
    model: ModelConfig
    task: TaskConfig
    rollout: RolloutConfig
    budget: BudgetConfig
    evaluation: EvaluationConfig
    logger: LoggerConfig
    tuning: TuningConfig | None
    seed: int
    sweep: str
    results: str
    device: str
    threads: int
    checkpoint_every: int
    plugins: list[str]

    @property
    def prompts_per_batch(self) -> int:
        """Prompts in one rollout batch."""
        return self.rollout.completions_per_batch // self.algorithm.completions_per_prompt

    @property
    def run_name(self) -> str:
        """`algorithm-model-task-sSEED-HASH8`."""
        return f"{self.label}-{config_hash(self)}"

    @property
    def label(self) -> str:
        """The cell of a sweep: `algorithm-model-task-sSEED`."""
        return f"{self.algorithm.name}-{self.model.name}-{self.task.name}-s{self.seed}"

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.results) / self.sweep / self.run_name


# Keys that change where or how often something is written, or say where a setting is from; never a number.
NOT_NUMBERS = ("sweep", "results", "logger", "tuning", "checkpoint_every")
CITATION = "algorithm.source"  # no number either
# Keys in which the cells of one sweep may differ; the others must be equal for a fair comparison.
CELL_KEYS = ("algorithm", "model", "task", "seed", "plugins")
EQUAL_KEYS = tuple(field.name for field in fields(RunConfig) if field.name not in (*NOT_NUMBERS, *CELL_KEYS))


def config_hash(config: RunConfig) -> str:
    """Eight hexadecimal digits of the SHA-256 over all that affects numbers, which a citation does not."""
    numbers = {key: value for key, value in asdict(config).items() if key not in NOT_NUMBERS}
    del numbers["algorithm"]["source"]
    return _digest(numbers)[:8]


def equal_part(config: RunConfig) -> dict[str, Any]:
    """What must be the same in all cells of a sweep: budget, rollout, evaluation, device, threads."""
    values = asdict(config)
    return {key: values[key] for key in EQUAL_KEYS}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def compose(overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None) -> RunConfig:
    """Compose and validate a run's configuration without the command line.

    Args:
        overrides: Hydra overrides, e.g. ``["algorithm=gspo", "seed=1"]``.
        config_dir: a folder of further YAML entries, as with `--config-dir`.

    Raises:
        ConfigError: for a key, value or combination that cannot run.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from harness.entries import check_choices, check_names, conf_dir  # they import this module for the schema
    from harness.refusals import REFUSED, refusal

    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        check_names(config_dir)
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra.compose("config", overrides=[*search, *overrides], return_hydra_config=True)
            check_choices(config.hydra)
            return validate(config)
    except REFUSED as error:
        raise refusal(error) from error


def validate(config: "DictConfig") -> RunConfig:
    """Turn a composed configuration into the typed one, with the settings that tuning has found.

    Raises:
        ConfigError: naming the key, what was wrong and what to change.
        Declined: where the algorithm cannot apply to this model or task.
    """
    from harness.sweep.tuning import tuned  # they import this module for the types
    from harness.validation import check

    return check(tuned(typed(config)))


def typed(config: "DictConfig") -> RunConfig:
    """The first half of :func:`validate`: names, types and missing values, before the rules of :func:`check`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = OmegaConf.create({key: config._get_node(key) for key in config if key not in ("hydra", "experiment")})
    _check_keys(values, RunConfig, "")
    missing = sorted(OmegaConf.missing_keys(values))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give one, e.g. {missing[0]}=…")
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"expected a list: give {error.full_key}=[…]"
        raise ConfigError(f"{error.full_key!r}: {reason}") from error
    assert isinstance(run, RunConfig)
    return run


def save(run: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, crash-safe."""
    from omegaconf import OmegaConf

    from harness.runs.directory import replace_file

    text = OmegaConf.to_yaml(OmegaConf.create(asdict(run)))
    replace_file(path, lambda file: file.write(text.encode()))


def read(path: Path) -> "DictConfig":
    """What :func:`save` wrote, as it stands there.

    Raises:
        ConfigError: where the file is lost or damaged, saying what to do.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from harness.runs.directory import RERUN

    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is lost: {RERUN}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({str(error).splitlines()[0]}): {RERUN}") from error
    for key in (field.name for field in fields(RunConfig)):
        if key not in config:
            raise ConfigError(f"{path} is damaged (it has no {key}): {RERUN}")
    assert isinstance(config, DictConfig)
    return config


def load(path: Path) -> RunConfig:
    """Read back what :func:`save` wrote, validated again. Raises as :func:`read` and :func:`typed`."""
    from harness.validation import check

    return check(typed(read(path)))


def _check_keys(values: "DictConfig", schema: Any, prefix: str) -> None:
    """Refuse keys that the dataclass does not know, and report those that are absent."""
    from omegaconf import DictConfig

    types = get_type_hints(schema)
    for key in map(str, values):
        if key not in types:
            raise ConfigError(f"{prefix}{key}: no such key; the keys here are {', '.join(types)}")
    for key, annotation in types.items():
        if key not in list(values):
            base = "; base is no algorithm: glob(*,exclude=base)" if (prefix, key) == ("algorithm.", "name") else ""
            raise ConfigError(
                f"{prefix}{key} is absent: add it to the YAML entry, or to its defaults an entry that has it{base}"
            )
        nested = next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)
        child = values._get_node(key)
        if nested and isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _check_keys(child, nested, f"{prefix}{key}.")
