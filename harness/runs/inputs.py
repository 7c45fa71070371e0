"""What a run reads beside the code and its configuration, and whether it is still what it was."""

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.evaluation.entries import data_files, held_out_entries, task_files
from harness.runs.provenance import fingerprint

# What transformers reads of a model's folder: weights, configurations, tokenizer and chat template.
_OF_A_MODEL = (".bin", ".jinja", ".json", ".model", ".safetensors", ".txt")

# What lm-eval reads of a folder of tasks: them, what they include (often NAME_yaml) and their functions.
_OF_TASKS = ("yaml", ".yml", ".py")


def inputs_fingerprint(config: RunConfig) -> dict[str, str]:
    """The :func:`fingerprint` of each file that a run reads beside the code and its configuration, by name.

    These are its plugins, its model's folder, its task's file, the entries whose problems its evaluation asks, and
    lm-eval tasks of the user's with their functions and data files. What a plugin imports in its turn is not among
    them, nor is a model or a data set that is known by its name.
    """
    specs = {plugin: find_spec(plugin) for plugin in config.plugins}
    sources = {plugin: Path(spec.origin) for plugin, spec in specs.items() if spec and spec.origin}
    places = {plugin: path.parent if path.name == "__init__.py" else path for plugin, path in sources.items()}
    entries = {file for task in held_out_entries(config.evaluation).values() for file in task_files(task)}
    places |= {f"conf/task/{file.name}": file for file in sorted(entries)}
    places |= {config.task.path: Path(config.task.path)} if config.task.path else {}
    places |= {str(path): path for path in data_files(config.evaluation)}
    digests = {name: fingerprint([place.name], place.parent) for name, place in places.items()}
    if config.evaluation.task_path:
        digests[config.evaluation.task_path] = _tasks_fingerprint(
            Path(config.evaluation.task_path), Path(config.results).resolve()
        )
    if config.model.path and Path(config.model.path).is_dir():
        digests[config.model.path] = _model_fingerprint(Path(config.model.path))
    return digests


def _tasks_fingerprint(folder: Path, results: Path) -> str:
    """Of a folder of lm-eval tasks, without the results that may lie below it: sweeps write YAML there."""
    found = [file for file in sorted(folder.rglob("*")) if file.name.endswith(_OF_TASKS) and file.is_file()]
    if folder.resolve() in results.parents:
        found = [file for file in found if results not in file.resolve().parents]
    return fingerprint([str(file.relative_to(folder.parent)) for file in found], folder.parent)


def _model_fingerprint(folder: Path) -> str:
    found = [file for file in sorted(folder.iterdir()) if file.suffix in _OF_A_MODEL and file.is_file()]
    return _of_files(folder, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found))


@lru_cache(maxsize=16)  # the cells of a plan share their models, whose weights take seconds to read
def _of_files(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    return fingerprint([name for name, *_ in files], folder)


def changed_input(recorded: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """`NAME (old, now new)` of the first input that is not as it was; None where all that both have are.

    Args:
        recorded: the provenance of a run.
        inputs: of :func:`inputs_fingerprint`.
    """
    known = recorded.get("inputs", {})
    changed = (name for name, digest in inputs.items() if known.get(name, digest) != digest)
    return next((f"{name} ({known[name]}, now {inputs[name]})" for name in changed), None)
