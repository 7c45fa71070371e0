"""Where the numbers of a run come from: code, packages and machine."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.evaluation.entries import entry_path, held_out_entries
from harness.machine import device_name, git_state, package_versions

_PACKAGES = ("levelfield", "torch", "transformers", "hydra-core", "lm-eval", "numpy", "pandas", "reasoning-gym")
# What launches, shows, draws and exports may change without making runs incomparable; all other code decides numbers.
_NO_NUMBERS = (
    ("conf", "analysis", "benchmark", "exporting", "runs", "sweep")
    + ("export.py", "report.py", "run.py", "status.py")
)  # fmt: skip
_HARNESS = Path(__file__).parents[1]


def provenance(device: str) -> dict[str, Any]:
    """What a run was made with.

    Args:
        device: the resolved device, cpu or cuda.

    Returns:
        git_commit and git_dirty (None outside a clone), code, packages, python, platform and device (its model).
    """
    commit, dirty = git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "code": code_fingerprint(),
        "packages": package_versions(_PACKAGES),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
    }


@cache
def code_fingerprint() -> str:
    """The :func:`fingerprint` of the code and data files that affect numbers."""
    return fingerprint(sorted(path.name for path in _HARNESS.iterdir() if path.name not in _NO_NUMBERS))


def fingerprint(names: Iterable[str]) -> str:
    """Twelve hexadecimal digits of the SHA-256 over files of the package and folders in it, and their names."""
    return _digest(_HARNESS, (found for name in names for found in _files(_HARNESS / name)))


def inputs_fingerprint(config: RunConfig) -> dict[str, str]:
    """As :func:`fingerprint`, of each of the files that a run reads beside the code and its configuration, by name.

    These are its plugins, its task's file, the entries whose problems its evaluation asks, and lm-eval tasks of the
    user's. What a plugin imports in its turn is not among them, nor is a data set that is known by its name.
    """
    specs = {plugin: find_spec(plugin) for plugin in config.plugins}
    sources = {plugin: Path(spec.origin) for plugin, spec in specs.items() if spec and spec.origin}
    places = {plugin: path.parent if path.name == "__init__.py" else path for plugin, path in sources.items()}
    places |= {f"conf/task/{task}.yaml": entry_path(task) for task in held_out_entries(config.evaluation).values()}
    places |= {path: Path(path) for path in (config.task.path, config.evaluation.task_path) if path}
    return {name: _digest(place.parent, _files(place)) for name, place in places.items()}


def changed_input(recorded: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """`NAME (old, now new)` of the first input that is not as it was; None where all that both have are.

    Args:
        recorded: the provenance of a run.
        inputs: of :func:`inputs_fingerprint`.
    """
    known = recorded.get("inputs", {})
    changed = (name for name, digest in inputs.items() if known.get(name, digest) != digest)
    return next((f"{name} ({known[name]}, now {inputs[name]})" for name in changed), None)


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.parent.name != "__pycache__"]
