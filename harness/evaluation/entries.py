"""Whose problems local lm-eval tasks ask, read from their YAML without lm-eval, whose import takes seconds."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from harness.config import EvaluationConfig, TaskConfig, conf_dir
from harness.errors import ConfigError

LOCAL_TASKS = Path(__file__).parent / "tasks"
_HELD_OUT = "harness.evaluation.problems.held_out"  # the function that makes held-out problems of an entry in conf/task


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where PyYAML was built with it
    """Takes lm-eval's tags, such as `!function`, as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)


def held_out_entries(config: EvaluationConfig) -> dict[str, str]:
    """Of the evaluation's tasks, those that ask the held-out problems of an entry in conf/task, and its name."""
    folders = [LOCAL_TASKS, *([Path(config.task_path)] if config.task_path else [])]
    found = {}
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        if _read(file).get("task") in config.tasks:
            task = _with_includes(file)
            if task.get("custom_dataset") == _HELD_OUT:
                found[str(task["task"])] = str(task["dataset_kwargs"]["task"])
    return found


def entry_path(task: str) -> Path:
    """Where an entry of conf/task lies."""
    return conf_dir() / "task" / f"{task}.yaml"


def entry(task: str) -> TaskConfig:
    """An entry of conf/task.

    Raises:
        ConfigError: where there is none of that name.
    """
    path = entry_path(task)
    if not path.exists():
        raise ConfigError(
            f"evaluation.tasks: dataset_kwargs.task={task} of one of them: there is no {path}; name another"
        )
    return TaskConfig(**OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore


def _with_includes(file: Path) -> dict[str, Any]:
    content = _read(file)
    included = content.get("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _with_includes(file.parent / name)
    return merged | content


def _read(file: Path) -> dict[str, Any]:
    """A task's YAML; empty for what is none, of which lm-eval has more to say."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
