"""The main memory that a process of this system (Linux) has held, its own alone: children inherit no peak."""

from pathlib import Path


def reset_peak_memory() -> int:
    """Forget this process's peak memory so far; returns the bytes that it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak_memory() -> int:
    """The most bytes of main memory that this process has held since :func:`reset_peak_memory`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)
