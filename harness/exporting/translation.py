"""What the exports to all trainers share."""

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from omegaconf import OmegaConf

from harness.config import AlgorithmConfig, RunConfig
from harness.errors import ConfigError

# From a run to some settings of the other trainer, dotted keys to values. What it defines in another way, without
# changing what is optimized, a translator adds to the list; what it cannot do raises NoEqual.
Translator = Callable[[RunConfig, list[str]], dict[str, Any]]


class NoEqual(ConfigError):
    """A part that the other trainer cannot express.

    Attributes:
        key: of the run's configuration, dotted.
        reason: why, or what would have an equal.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


def translate(run: RunConfig, trainer: str, translators: Sequence[Translator]) -> tuple[dict[str, Any], list[str]]:
    """The settings of all translators, and what is defined in another way there.

    Raises:
        ConfigError: one line for each part that has no equal.
    """
    settings: dict[str, Any] = {}
    differs: list[str] = []
    missing: list[str] = []
    for translator in translators:
        try:
            settings |= translator(run, differs)
        except NoEqual as error:
            missing.append(f"{error.key}={_value(run, error.key)} has no equal in {trainer}: {error.reason}")
    if missing:
        raise ConfigError("\n".join(missing))
    return settings, differs


def lookup(table: Mapping[str, Any], algorithm: AlgorithmConfig, kind: str, given: str = "") -> Any:
    """What a table says about the algorithm's part of that kind; ``given`` says where that table holds.

    Raises:
        NoEqual: where it says nothing.
    """
    name = getattr(algorithm, kind)["name"]
    if name not in table:
        raise NoEqual(f"algorithm.{kind}.name", f"{given}it has {', '.join(table)}")
    return table[name]


def renamed(part: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A part's settings under the names that the other trainer has for them."""
    return {theirs: part[ours] for ours, theirs in names.items()}


def refuse_steps(run: RunConfig) -> None:
    """Step rewards have no equal anywhere.

    Raises:
        NoEqual: where the task has them.
    """
    if run.task.step_verifier is not None:
        raise NoEqual("task.step_verifier", "its rewards are one number a completion; set it to null")


def minibatch(run: RunConfig) -> int:
    """Completions in one optimizer step."""
    return run.rollout.completions_per_batch // run.algorithm.minibatches


def micro_batch(run: RunConfig) -> int:
    """Completions in one backward pass: as many as the run has at most, and a divisor of the optimizer step's."""
    whole = minibatch(run)
    return max(size for size in range(1, min(whole, run.model.micro_batch_sequences) + 1) if whole % size == 0)


def yours(run: RunConfig) -> str:
    """For the comments on top: what was chosen for the model and task that were trained here."""
    return (
        f"set for your model and task, here those of model={run.model.name} and task={run.task.name}: learning rate, "
        "warm-up, lengths, batch sizes"
    )


def page(header: Collection[str], differs: Collection[str], settings: dict[str, Any]) -> str:
    """YAML with comments on top."""
    comments = [*header, *(f"differs: {text}" for text in differs)]
    filled = [textwrap.fill(text, 118, initial_indent="# ", subsequent_indent="#   ") for text in comments]
    return "\n".join([*filled, yaml.safe_dump(settings, sort_keys=False)])


def _value(run: RunConfig, key: str) -> Any:
    value = OmegaConf.select(OmegaConf.create(asdict(run)), key)
    return "null" if value is None else value
