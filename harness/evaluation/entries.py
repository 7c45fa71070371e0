"""What local lm-eval tasks ask, read from their YAML without lm-eval, whose import takes seconds."""

from collections.abc import Mapping
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from harness.config import EvaluationConfig, TaskConfig
from harness.entries import conf_dir, entry_files
from harness.errors import ConfigError

LOCAL_TASKS = Path(__file__).parent / "tasks"
_HELD_OUT = "harness.evaluation.problems.held_out"  # the function that makes held-out problems of an entry in conf/task
_NOT_READ = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval passes over


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where PyYAML was built with it
    """Takes lm-eval's tags, such as `!function`, as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)


def local_tasks(config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """The lm-eval tasks of the harness and of the user's folder, by name, each with what it includes.

    Raises:
        ConfigError: for a file that is no YAML, which lm-eval would silently leave out, or for one with the name of
            another, where that is one of ours or asked for.
    """
    tasks: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for file in _files(config):
        try:
            task = _with_includes(file)
        except RecursionError as error:
            raise ConfigError(f"evaluation.task_path: {file} includes itself: take it out of its `include`") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"evaluation.task_path: {file} cannot be read as the YAML of an lm-eval task ({reason}): mend it, or "
                "take it out of that folder"
            ) from error
        name = task.get("group", task.get("task"))
        if not isinstance(name, str):
            continue  # what others include
        other = files.setdefault(name, file)
        if (name in config.tasks or other.parent == LOCAL_TASKS) and not other.samefile(file):
            raise ConfigError(
                f"evaluation.task_path={config.task_path}: {file} has the name of {other}, {name}, and lm-eval would "
                "take one of them alone: give it another name"
            )
        tasks.setdefault(name, task)
    return tasks


def held_out_entries(config: EvaluationConfig) -> dict[str, str]:
    """Of the evaluation's tasks, those that ask the held-out problems of an entry in conf/task, and its name. Raises as
    :func:`local_tasks`."""
    held_out = {name: task for name, task in _asked(config).items() if task.get("custom_dataset") == _HELD_OUT}
    return {name: str(_dataset_kwargs(task).get("task")) for name, task in held_out.items()}


def data_files(config: EvaluationConfig) -> list[Path]:
    """The files on this machine that the evaluation's local tasks give to `datasets`. Raises as :func:`local_tasks`."""
    given = [_dataset_kwargs(task) for task in _asked(config).values()]
    patterns = [
        Path(str(each.get("data_dir") or ""), name) for each in given for name in _names(each.get("data_files", []))
    ]
    return [Path(found) for pattern in patterns for found in sorted(glob(str(pattern), recursive=True))]


def task_files(task: str) -> list[Path]:
    """The files that an entry of conf/task is made of.

    Raises:
        ConfigError: where there is none of that name.
    """
    try:
        return entry_files("task", task)
    except FileNotFoundError as error:
        raise ConfigError(
            f"evaluation.tasks: dataset_kwargs.task={task} of one of them: no such entry comes with the harness, and "
            "those of a --config-dir cannot be named there; name one of "
            f"{', '.join(sorted(file.stem for file in (conf_dir() / 'task').glob('*.yaml')))}"
        ) from error


@cache  # cells of a plan ask for the same ones
def entry(task: str) -> TaskConfig:
    """An entry of conf/task, composed. Not by Hydra, which may be at work on the run itself. Raises as
    :func:`task_files`."""
    values = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, task_files(task))))
    assert isinstance(values, dict)
    values.pop("defaults", None)
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), values))
    assert isinstance(found, TaskConfig)
    return found


def _asked(config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """The local tasks that are asked for, by their name or by a group or tag that they are in."""
    tasks, asked, names = local_tasks(config), {}, list(config.tasks)
    for name in names:  # which grows by the members of groups and tags
        if name in asked:
            continue
        asked[name] = own = tasks.get(name, {})
        for member in own["task"] if "group" in own and isinstance(own.get("task"), list) else []:
            called = str(member.get("task")) if isinstance(member, dict) else str(member)
            if isinstance(member, dict):  # a task of the group's own, or one that it changes
                tasks[called] = tasks.get(called, {}) | member
            names.append(called)
        names += [other for other, task in tasks.items() if name in _names(task.get("tag", []))]
    return asked


def _files(config: EvaluationConfig) -> list[Path]:
    folders = [LOCAL_TASKS, *([Path(config.task_path)] if config.task_path else [])]
    found = (file for folder in folders for file in sorted(folder.rglob("*.yaml")))
    return [file for file in found if file.is_file() and not _NOT_READ.intersection(file.parts)]


def _with_includes(file: Path) -> dict[str, Any]:
    content = _read(file, file.stat().st_mtime_ns)
    included = content.get("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _with_includes(file.parent / str(name))
    return merged | content


@cache  # cells of a plan read the same ones
def _read(file: Path, changed: int) -> dict[str, Any]:
    """A task's YAML as of when it was changed; empty for a value or list, which lm-eval reads over."""
    with file.open("rb") as opened:
        content = yaml.load(opened, _Loader)
    return content if isinstance(content, dict) else {}


def _dataset_kwargs(task: Mapping[str, Any]) -> dict[str, Any]:
    given = task.get("dataset_kwargs")
    return given if isinstance(given, dict) else {}


def _names(given: Any) -> list[str]:
    """One name, several, or those of each split: paths and patterns of `data_files`, or tags."""
    parts = list(given.values()) if isinstance(given, dict) else given
    return [name for part in parts for name in _names(part)] if isinstance(parts, list) else [str(parts)]
