"""Where the numbers of a run come from: code, packages and machine."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("levelfield", "torch", "transformers", "hydra-core", "lm-eval", "numpy", "pandas", "reasoning-gym")
# What launches, shows, draws and exports may change without making runs incomparable; all other code decides numbers.
_NO_NUMBERS = ("conf", "analysis", "exporting", "runs", "sweep", "export.py", "report.py", "run.py", "status.py")
_HARNESS = Path(__file__).parents[1]


def provenance(device: str) -> dict[str, Any]:
    """What a run was made with.

    Args:
        device: the resolved device, cpu or cuda.

    Returns:
        git_commit and git_dirty (None outside a clone), code, packages, python, platform and device (its model).
    """
    commit, dirty = _git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "code": code_fingerprint(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(device),
    }


@cache
def code_fingerprint() -> str:
    """The :func:`fingerprint` of the code and data files that affect numbers."""
    return fingerprint(sorted(path.name for path in _HARNESS.iterdir() if path.name not in _NO_NUMBERS))


def fingerprint(names: Iterable[str]) -> str:
    """Twelve hexadecimal digits of the SHA-256 over files of the package and folders in it, and their names."""
    digest = hashlib.sha256()
    for path in (found for name in names for found in _files(_HARNESS / name)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_HARNESS).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.suffix != ".pyc"]


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the clone that the harness runs from; None for a wheel, whatever surrounds it."""
    try:
        top = _git("rev-parse", "--show-toplevel")
        # site-packages may lie inside a repository of the user's: only a clone has the package at its top, tracked.
        if Path(top) != _HARNESS.parent or not _git("ls-files", "harness/__init__.py"):
            return None, None
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", "harness", "conf"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=_HARNESS.parent, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return _processor()


def _processor() -> str:
    """The CPU's model name, which platform.processor() does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
