"""What a number was measured on: the code's commit, package versions, processor, cores, memory. Needs no library."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_HARNESS = Path(__file__).parent


def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the clone that the harness runs from; None for a wheel, whatever surrounds it."""
    try:
        top = _git("rev-parse", "--show-toplevel")
        # site-packages may lie inside a repository of the user's: only a clone has the package at its top, tracked.
        if Path(top) != _HARNESS.parent or not _git("ls-files", "harness/__init__.py"):
            return None, None
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", "harness", "conf"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def cache_dir() -> Path:
    """`$LEVELFIELD_CACHE`, or `levelfield` below the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "levelfield"
    return Path(os.environ.get("LEVELFIELD_CACHE", default))


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    return {name: found for name in packages if (found := _version(name))}


def device_name(device: str) -> str:
    """The model of the GPU or of the processor.

    Args:
        device: cpu or cuda.
    """
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return _processor()


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=_HARNESS.parent, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's model name, which platform.processor() does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
