"""Where the numbers of a run come from: code, packages and machine."""

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from harness.machine import device_name, git_state, package_versions

_PACKAGES = ("levelfield", "torch", "transformers", "hydra-core", "lm-eval", "numpy", "pandas", "reasoning-gym")
# What launches, shows, draws and exports may change without making runs incomparable; all other code decides numbers.
_NO_NUMBERS = (
    ("conf", "analysis", "benchmark", "exporting", "runs", "sweep")
    + ("export.py", "report.py", "run.py", "status.py")
)  # fmt: skip
_HARNESS = Path(__file__).parents[1]
_CHUNK = 1 << 20  # bytes


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


def fingerprint(names: Iterable[str], folder: Path | None = None) -> str:
    """Twelve hexadecimal digits of the SHA-256 over files and folders, and their names, in a folder: the package's."""
    root, digest = folder or _HARNESS, hashlib.sha256()
    for path in (found for name in names for found in _files(root / name)):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:  # not at once: weights may be larger than the memory
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.parent.name != "__pycache__"]
