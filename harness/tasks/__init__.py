"""Prompts and verifiable rewards."""

import random

from harness.config import TaskConfig
from harness.errors import ConfigError
from harness.tasks.problem import Problem
from harness.tasks.sources import finite_problems, generated_problem, generator
from harness.tasks.stream import PromptStream
from harness.tasks.verifiers import VERIFIERS, check_verifier
from harness.tasks.worked_solutions import WORKED_SOLUTIONS

__all__ = ["VERIFIERS", "WORKED_SOLUTIONS", "Problem", "PromptStream", "check_task"]

# What each source must be told, and what it has no use for.
_SOURCES = {"reasoning_gym": ("dataset", "path"), "json_lines": ("path", "dataset"), "huggingface": ("dataset", "path")}


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
    if task.worked_solution is not None and task.worked_solution not in WORKED_SOLUTIONS:
        raise ConfigError(
            f"{key}.worked_solution={task.worked_solution}: no such writer; there are {', '.join(WORKED_SOLUTIONS)}"
        )
    _check_worked_solution(task, _first_problem(task, key), key)


def _first_problem(task: TaskConfig, key: str) -> Problem:
    if task.source != "reasoning_gym":
        return finite_problems(task, key)[0]
    make = generator(task, key)
    try:
        entry = make(seed=0, size=1)[0]
    except Exception as error:  # the data sets assert, compare and index what they are given
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}.parameters: '{task.dataset}' refuses them: {reason}") from error
    return generated_problem(task, entry, key)


def _check_worked_solution(task: TaskConfig, problem: Problem, key: str) -> None:
    if task.worked_solution is None:
        return
    try:
        WORKED_SOLUTIONS[task.worked_solution](problem.fields, random.Random(0), 0.0)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{key}.worked_solution={task.worked_solution} does not fit these problems "
            f"({type(error).__name__}: {error}); their fields are {', '.join(problem.fields)}"
        ) from error
