"""The typed schema of a run. Values live in YAML alone; here are their names, types and the rules between them."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.algorithms.registry import PARTS, check_settings
from harness.errors import ConfigError, Declined

BUDGET_AXES = ("flops", "device_seconds", "tokens", "queries", "updates")


@dataclass
class KLConfig:
    """Penalty towards the initial policy (NUMERICS: k1, k2, k3)."""

    estimator: str
    coefficient: float
    placement: str


@dataclass
class CriticConfig:
    """PPO's value model: as large as the policy, with an optimizer of its own."""

    learning_rate: float
    value_clip: float
    max_grad_norm: float


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
    kl: KLConfig
    entropy_coefficient: float
    routing_replay: str
    critic: CriticConfig | None
    epochs: int
    minibatches: int
    optimizer: OptimizerConfig
    search_space: dict[str, list[Any]]


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
    seed: int


@dataclass
class ModelConfig:
    """The network: built from an architecture and cold-started, or loaded from a path."""

    name: str
    path: str | None
    architecture: dict[str, Any] | None
    cold_start: ColdStartConfig | None
    experts_implementation: str | None
    micro_batch_sequences: int


@dataclass
class RolloutConfig:
    """Sampling."""

    engine: str
    completions_per_batch: int
    temperature: float
    decode_sequences: int


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
    """What is written beside metrics.jsonl."""

    tensorboard: bool


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
    def minibatch_size(self) -> int:
        """Completions behind one optimizer step."""
        return self.rollout.completions_per_batch // self.algorithm.minibatches

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


# Keys that change where or how often something is written, never a number.
_NOT_NUMBERS = ("sweep", "results", "logger", "checkpoint_every")
# Keys in which the cells of one sweep may differ; all others must be equal for a fair comparison.
CELL_KEYS = ("algorithm", "model", "task", "seed", "plugins")


def config_hash(config: RunConfig) -> str:
    """Eight hexadecimal digits of the SHA-256 over all that affects numbers."""
    numbers = {key: value for key, value in asdict(config).items() if key not in _NOT_NUMBERS}
    return _digest(numbers)[:8]


def equal_part(config: RunConfig) -> dict[str, Any]:
    """What must be the same in all cells of a sweep: budget, rollout, evaluation, device, threads."""
    hidden = (*_NOT_NUMBERS, *CELL_KEYS)
    return {key: value for key, value in asdict(config).items() if key not in hidden}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def conf_dir() -> Path:
    """The folder of the YAML entries: inside an installed wheel, or beside the package in a clone."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None) -> RunConfig:
    """Compose and validate a run's configuration without the command line.

    Args:
        overrides: Hydra overrides, e.g. ``["algorithm=gspo", "seed=1"]``.
        config_dir: a folder of further YAML entries, as with `--config-dir`.

    Raises:
        ConfigError: for a key, value or combination that cannot run.
    """
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return validate(hydra.compose("config", overrides=[*search, *overrides]))
    except HydraException as error:
        raise ConfigError(str(error)) from error


def validate(config: DictConfig) -> RunConfig:
    """Turn a composed configuration into the typed one.

    Raises:
        ConfigError: naming the key, what was wrong and what to change.
        Declined: where the algorithm cannot apply to this model or task.
    """
    return check(typed(config))


def typed(config: DictConfig) -> RunConfig:
    """The first half of :func:`validate`: names, types and missing values, before the rules of :func:`check`."""
    values = OmegaConf.create({key: config._get_node(key) for key in config if key not in ("hydra", "experiment")})
    _check_keys(values, RunConfig, "")
    missing = sorted(OmegaConf.missing_keys(values))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give one, e.g. {missing[0]}=…")
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(run, RunConfig)
    return run


def check(run: RunConfig) -> RunConfig:
    """Resolve what depends on the machine and enforce the rules between values."""
    from harness.evaluation import check_evaluation  # it imports this module for the types

    for plugin in run.plugins:
        _import_plugin(plugin)
    run.device = resolve_device(run.device)
    if run.budget.axis == "auto":
        run.budget.axis = "flops" if run.device == "cpu" else "device_seconds"
    _check_budget(run.budget)
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
    check_evaluation(run.evaluation)
    return run


def save(run: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(run))), encoding="utf-8")


def load(path: Path) -> RunConfig:
    """Read back what :func:`save` wrote, validated again."""
    return validate(OmegaConf.create(path.read_text(encoding="utf-8")))


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


def _check_keys(values: DictConfig, schema: type, prefix: str) -> None:
    """Refuse keys that the dataclass does not know, and report those that are absent."""
    types = get_type_hints(schema)
    for key in values:
        _require(key in types, f"{prefix}{key}: no such key; the keys here are {', '.join(types)}")
    for key, annotation in types.items():
        _require(key in list(values), f"{prefix}{key} is absent: add it to the YAML entry")
        nested = next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)
        child = values._get_node(key)
        if nested and isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _check_keys(child, nested, f"{prefix}{key}.")


def _import_plugin(plugin: str) -> None:
    try:
        import_module(plugin)
    except ImportError as error:
        raise ConfigError(f"plugins: cannot import {plugin} ({error}); is its folder on PYTHONPATH?") from error


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
        **({"algorithm.critic.learning_rate": algorithm.critic.learning_rate} if algorithm.critic else {}),
    }
    for key, value in positive.items():
        _require(math.isfinite(value) and value > 0, f"{key}={value}: must be a finite number above 0")
    _require(run.seed >= 0, f"seed={run.seed}: must not be negative")
    for fraction in run.evaluation.fractions:
        _require(0 <= fraction <= 1, f"evaluation.fractions has {fraction}: fractions of the budget lie in 0 to 1")
    _require(run.rollout.engine == "embedded", f"rollout.engine={run.rollout.engine}: the only engine is embedded")
    for key, name in (("sweep", run.sweep), ("algorithm.name", algorithm.name), ("model.name", run.model.name)):
        _require(
            bool(re.fullmatch(r"[A-Za-z0-9_.]+(/[A-Za-z0-9_.]+)*" if key == "sweep" else r"[A-Za-z0-9_.]+", name))
            and ".." not in name,
            f"{key}={name}: use letters, digits, '_' and '.', since it names a folder",
        )


def _check_parts(algorithm: AlgorithmConfig) -> None:
    for module in ("advantages", "correction", "objective"):  # importing them registers the parts that come with us
        import_module(f"harness.algorithms.{module}")
    for kind in PARTS:
        check_settings(kind, getattr(algorithm, kind))
    kl = algorithm.kl
    _require(
        kl.estimator in ("k1", "k2", "k3"), f"algorithm.kl.estimator={kl.estimator}: choose k1, k2 or k3"
    )
    _require(
        kl.placement in ("loss", "reward"), f"algorithm.kl.placement={kl.placement}: choose loss or reward"
    )
    _require(kl.coefficient >= 0, f"algorithm.kl.coefficient={kl.coefficient}: must not be negative; 0 is off")
    _require(
        algorithm.routing_replay in ("disabled", "R2"),
        f"algorithm.routing_replay={algorithm.routing_replay}: choose disabled or R2",
    )
    needs_critic = getattr(PARTS["advantage"][algorithm.advantage["name"]], "needs_critic", False)
    _require(
        not needs_critic or algorithm.critic is not None,
        f"algorithm.advantage.name={algorithm.advantage['name']} needs a critic: set algorithm.critic (see conf/algorithm/ppo.yaml)",
    )
    _require(
        needs_critic or algorithm.critic is None,
        f"algorithm.critic is set but algorithm.advantage.name={algorithm.advantage['name']} uses none: set it to null",
    )
    _require(
        needs_critic or algorithm.completions_per_prompt > 1,
        "algorithm.completions_per_prompt=1: a group of one has no baseline; use at least 2, or a critic",
    )


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
    surrogate = PARTS["surrogate"][algorithm.surrogate["name"]]
    _require(
        not getattr(surrogate, "clips", False) or algorithm.epochs * algorithm.minibatches > 1,
        "algorithm.epochs x algorithm.minibatches is one optimizer step for each rollout batch: the importance ratio is "
        f"then 1 and the surrogate '{algorithm.surrogate['name']}' never clips; use at least 2",
    )


def _check_task(task: TaskConfig, key: str) -> None:
    from harness.tasks import check_task  # it imports this module for the types

    check_task(task, key)
    for name in ("max_prompt_tokens", "max_completion_tokens"):
        _require(getattr(task, name) > 0, f"{key}.{name}={getattr(task, name)}: must be above 0")


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
        model.path is None or not (os.sep in model.path or model.path.startswith(".")) or Path(model.path).is_dir(),
        f"model.path={model.path}: no such folder; give a Hugging Face model directory",
    )
    if run.algorithm.routing_replay != "disabled" and not is_moe(model):
        raise Declined(
            f"algorithm.routing_replay={run.algorithm.routing_replay} has nothing to replay on the dense model "
            f"'{model.name}': choose a mixture-of-experts model or set algorithm.routing_replay=disabled"
        )


def is_moe(model: ModelConfig) -> bool:
    """Whether the model routes tokens to experts, read from its configuration alone."""
    if model.architecture is not None:
        fields = model.architecture
    else:
        from transformers import AutoConfig

        try:
            fields = AutoConfig.from_pretrained(model.path).to_dict()
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={model.path}: {str(error).splitlines()[0]}") from error
    return any(fields.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
