"""Where problems come from: a generator without end (reasoning-gym), or the rows of a file or hub data set."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from harness.config import TaskConfig
from harness.errors import ConfigError
from harness.tasks.problem import Given, Problem, check_text, make_problem
from harness.tasks.verifiers import check_answer


def generator(task: TaskConfig, key: str) -> Callable[..., Any]:
    """A maker of reasoning-gym data sets with the task's parameters, called with `seed` and `size`.

    Raises:
        ConfigError: for an unknown data set or a parameter that it does not take.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.dataset not in DATASETS:
        raise ConfigError(f"{key}.dataset={task.dataset}: reasoning-gym has {', '.join(sorted(DATASETS))}")
    known = [field.name for field in dataclass_fields(DATASETS[task.dataset][1]) if field.name not in ("seed", "size")]
    for name in task.parameters:
        if name not in known:
            raise ConfigError(
                f"{key}.parameters.{name}: '{task.dataset}' has no such parameter; it takes {', '.join(known)}"
            )
    return partial(reasoning_gym.create_dataset, task.dataset, **task.parameters)


def generated_problem(task: TaskConfig, entry: Mapping[str, Any], key: str) -> Problem:
    """A reasoning-gym entry as a problem; its metadata are fields beside `question` and `answer`.

    Some data sets have no answer, since they judge in other ways.
    """
    metadata = entry["metadata"]
    fields = {
        **metadata,
        "question": entry["question"],
        "answer": entry["answer"],
        "metadata": metadata,
        "source_dataset": task.dataset,
        "source_parameters": task.parameters,
    }
    return make_problem(task, fields, key, Formatter())


def finite_problems(task: TaskConfig, key: str) -> list[Problem]:
    """All problems of a JSON lines file or a `datasets` data set, in its order.

    Raises:
        ConfigError: for a source that cannot be read, or a row that does not fit the templates or the verifier (with
            its line number).
    """
    read, place = (_json_lines, f"{task.path}, line") if task.source == "json_lines" else (_hub_rows, "row")
    problems = []
    for number, row in read(task, key):
        try:
            problem = make_problem(task, row, key, Given())
            check_text(problem, task, key)
            check_answer(problem, task, key)
        except ConfigError as error:
            raise ConfigError(f"{error} ({place} {number})") from error
        problems.append(problem)
    if not problems:
        raise ConfigError(f"{key}: {task.path or task.dataset} holds no problem")
    return problems


def _json_lines(task: TaskConfig, key: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    try:
        lines = Path(str(task.path)).read_text(encoding="utf-8-sig").split("\n")  # some editors put a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.path={task.path}: {error}; give a file of JSON lines in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{key}.path: {task.path}, line {number} is not JSON: {error}") from error
        except ValueError as error:  # Python's limit, against numbers that take long to read
            raise ConfigError(
                f"{key}.path: {task.path}, line {number} has an integer of more than {sys.get_int_max_str_digits()} "
                "digits: put it in quotes, or leave the line out"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(f"{key}.path: {task.path}, line {number} is not a JSON object")
        rows.append((number, row))
    return rows


def _hub_rows(task: TaskConfig, key: str) -> list[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(task.dataset, **task.parameters)
    except Exception as error:  # what the hub, the network and the file readers raise has no common base
        raise ConfigError(f"{key}.dataset={task.dataset}: {type(error).__name__}: {error}") from error
    if not isinstance(rows, datasets.Dataset):
        raise ConfigError(f"{key}.parameters.split is absent: name one of the splits, e.g. split: train")
    return list(enumerate(rows, start=1))
