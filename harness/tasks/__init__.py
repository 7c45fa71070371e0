"""Prompts and verifiable rewards."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from harness.config import TaskConfig
from harness.errors import ConfigError
from harness.tasks.problem import Problem
from harness.tasks.sources import finite_problems, generated_problem, generator
from harness.tasks.steps import STEP_VERIFIERS
from harness.tasks.stream import PromptStream
from harness.tasks.verifiers import VERIFIERS, check_verifier
from harness.tasks.worked_solutions import WORKED_SOLUTIONS

__all__ = ["STEP_VERIFIERS", "VERIFIERS", "WORKED_SOLUTIONS", "Problem", "PromptStream", "check_task"]

# What each source must be told, and what it has no use for.
_SOURCES = {"reasoning_gym": ("dataset", "path"), "json_lines": ("path", "dataset"), "huggingface": ("dataset", "path")}

# The first problem of each source whose rows were all read once, so that not every cell of a plan reads them again.
_FIRST: dict[tuple[str, int, str], Problem] = {}


def check_task(task: TaskConfig, key: str) -> None:
    """Stop a task that cannot run, before any compute.

    Args:
        task: the configuration.
        key: where it stands in the run's configuration, e.g. `task`.

    Raises:
        ConfigError: naming the key, what was wrong and what to change.
    """
    if task.source not in _SOURCES:
        raise ConfigError(f"{key}.source={task.source}: choose one of {', '.join(_SOURCES)}")
    needed, unused = _SOURCES[task.source]
    if not getattr(task, needed):
        raise ConfigError(f"{key}.{needed} is null: {key}.source={task.source} needs it")
    if getattr(task, unused) is not None:
        raise ConfigError(f"{key}.{unused}={getattr(task, unused)}: {key}.source={task.source} has no use for it")
    check_verifier(task, key)
    problem = _first_problem(task, key)
    if not any(field for _, field, *_ in Formatter().parse(task.prompt)):
        raise ConfigError(
            f"{key}.prompt={task.prompt!r} asks the same of every problem: name a field, such as {{question}}; the "
            f"fields are {', '.join(problem.fields)}"
        )
    _check_fit(task, problem, key)


def _first_problem(task: TaskConfig, key: str) -> Problem:
    if task.source != "reasoning_gym":
        changed = Path(task.path).stat().st_mtime_ns if task.path and Path(task.path).exists() else 0
        source = (repr(task), changed, key)
        if source not in _FIRST:
            _FIRST[source] = finite_problems(task, key)[0]
        return _FIRST[source]
    make = generator(task, key)
    try:
        entry = make(seed=0, size=1)[0]
    except Exception as error:  # the data sets assert, compare and index what they are given
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}.parameters: '{task.dataset}' refuses them: {reason}") from error
    return generated_problem(task, entry, key)


def _check_fit(task: TaskConfig, problem: Problem, key: str) -> None:
    """Try on a problem what else the task names for it."""
    trials: tuple[tuple[str, Mapping[str, Callable[..., Any]], tuple[Any, ...]], ...] = (
        ("worked_solution", WORKED_SOLUTIONS, (problem.fields, random.Random(0), 0.0)),
        ("step_verifier", STEP_VERIFIERS, ("", problem)),
    )
    for setting, functions, arguments in trials:
        name = getattr(task, setting)
        if name is None:
            continue
        if name not in functions:
            raise ConfigError(f"{key}.{setting}={name}: no such {setting}; there are {', '.join(functions)}")
        try:
            functions[name](*arguments)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"{key}.{setting}={name} does not fit these problems ({type(error).__name__}: {error}); their fields "
                f"are {', '.join(problem.fields)}"
            ) from error
