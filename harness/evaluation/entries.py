"""Whose problems local lm-eval tasks ask, read from their YAML without lm-eval, whose import takes seconds."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from harness.config import EvaluationConfig, TaskConfig
from harness.entries import conf_dir
from harness.errors import ConfigError

LOCAL_TASKS = Path(__file__).parent / "tasks"
_HELD_OUT = "harness.evaluation.problems.held_out"  # the function that makes held-out problems of an entry in conf/task


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where PyYAML was built with it
    """Takes lm-eval's tags, such as `!function`, as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)


def held_out_entries(config: EvaluationConfig) -> dict[str, str]:
    """Of the evaluation's tasks, those that ask the held-out problems of an entry in conf/task, and its name."""
    return {
        str(task["task"]): str(task["dataset_kwargs"]["task"])
        for task in _asked(config)
        if task.get("custom_dataset") == _HELD_OUT
    }


def data_files(config: EvaluationConfig) -> list[Path]:
    """Of the evaluation's tasks, the local files that their data are read from."""
    named = _texts([(task.get("dataset_kwargs") or {}).get("data_files") for task in _asked(config)])
    return [Path(name) for name in named if Path(name).is_file()]


def check_task_folder(config: EvaluationConfig) -> None:
    """
    Raises:
        ConfigError: for a file of the user's that lm-eval passes over because it cannot be read, or a task that it
            would take in place of one of ours.
    """
    folder = Path(config.task_path) if config.task_path else None
    if folder is None or folder.samefile(LOCAL_TASKS):
        return
    for file in sorted(folder.rglob("*.yaml")):
        _parse(file)
    for name in _by_name(folder).keys() & _by_name(LOCAL_TASKS).keys():
        raise ConfigError(
            f"evaluation.task_path: {_by_name(folder)[name]} has the name of a task of ours, {name}; give it another"
        )


def entry_paths(task: str) -> list[Path]:
    """Where an entry of conf/task lies, and before it those that it builds on. Raises as :func:`entry`."""
    return list(dict.fromkeys(path for path, _ in _layers(task)))


def entry(task: str) -> TaskConfig:
    """An entry of conf/task.

    Raises:
        ConfigError: where there is none of that name.
    """
    layers = (layer for _, layer in _layers(task))
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), *layers))
    assert isinstance(found, TaskConfig)
    return found


def _layers(task: str) -> list[tuple[Path, DictConfig]]:
    """The entries that one is made of, each over those before it, as Hydra would; Hydra itself takes 0.2 s for it."""
    path = conf_dir() / "task" / f"{task}.yaml"
    if not path.exists():
        raise ConfigError(
            f"evaluation.tasks: dataset_kwargs.task={task} of one of them: there is no {path}; name an entry that is "
            "there, which those of --config-dir are not"
        )
    own = OmegaConf.load(path)
    assert isinstance(own, DictConfig)
    below = own.pop("defaults", ["_self_"])
    return [layer for name in below for layer in ([(path, own)] if name == "_self_" else _layers(name))]


def _asked(config: EvaluationConfig) -> list[dict[str, Any]]:
    """The YAML of those tasks that are local."""
    folders = [LOCAL_TASKS, *([Path(config.task_path)] if config.task_path else [])]
    files = [files[name] for files in map(_by_name, folders) for name in files if name in config.tasks]
    return [_with_includes(file) for file in files]


def _by_name(folder: Path) -> dict[str, Path]:
    """The files that lie in a folder, by the name of the task that each is."""
    named = {file: _read(file).get("task") for file in sorted(folder.rglob("*.yaml"))}
    return {name: file for file, name in named.items() if isinstance(name, str)}


def _texts(value: Any) -> list[str]:
    """The texts in lists and dicts of whatever depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _with_includes(file: Path) -> dict[str, Any]:
    content = _read(file)
    included = content.get("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _with_includes(file.parent / name)
    return merged | content


def _read(file: Path) -> dict[str, Any]:
    """A task's YAML; empty for what is none, which lm-eval passes over, too."""
    try:
        content = _parse(file)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def _parse(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"evaluation.task_path: {file} cannot be read: {' '.join(str(error).split())}") from error
