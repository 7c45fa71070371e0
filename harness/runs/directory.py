"""A run directory as its one writer sees it: whatever kills the writer, what is on disk stays whole and readable."""

import fcntl
import json
import math
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import ConfigError

# Statuses that running the same command again leaves alone.
FINAL = ("done", "diverged", "skipped")
METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"
_LINES = (METRICS, EVALUATIONS, SAMPLES)
RERUN = "remove its run directory and run the cell again"  # what to do about a run that is damaged


class RunInUse(ConfigError):
    """Another living process writes this run directory."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RunDirectory:
    """Reads and writes `results/SWEEP/RUN/`.

    Every method that writes expects its process to hold :meth:`lock`. Methods that fail for want of disk space raise
    `OSError` and leave what was there before.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def policy_dir(self) -> Path:
        """Where the final policy lies as a Hugging Face model directory."""
        return self.path / "checkpoint" / "policy"

    @property
    def state_path(self) -> Path:
        """The latest resumable state."""
        return self.path / "checkpoint" / "state.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer; the lock ends with the block or with the process, however it dies.

        Raises:
            RunInUse: naming the process that holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunInUse(f"{self.path} is being written by {holder}: wait for it, or stop it first") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def read_status(self) -> dict[str, Any]:
        """The content of run.json; empty where there is none yet. Raises as :func:`read_object`."""
        return read_object(self.path / "run.json", RERUN)

    def update_status(self, **fields: Any) -> None:
        """Merge fields into run.json, atomically."""
        text = json.dumps(_finite({**self.read_status(), **fields}), indent=2, allow_nan=False) + "\n"
        replace_file(self.path / "run.json", partial(_write, text.encode()))

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the lines of rollout batches to metrics.jsonl; numbers that are not finite become null."""
        _append(self.path / METRICS, rows)

    def append_evaluations(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the lines of one evaluation point to evaluations.jsonl."""
        _append(self.path / EVALUATIONS, rows)

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the completions of one evaluation point to samples.jsonl."""
        _append(self.path / SAMPLES, rows)

    def line_counts(self) -> dict[str, int]:
        """How many whole lines each JSON lines file has: what a resumable state remembers of them."""
        return {name: (self.path / name).read_bytes().count(b"\n") for name in _LINES if (self.path / name).exists()}

    def truncate(self, counts: Mapping[str, int]) -> None:
        """Forget the lines that were added after a state, and a torn last line.

        Args:
            counts: of that state, as :meth:`line_counts` gave them; a file it does not name becomes empty.
        """
        for name in _LINES:
            path = self.path / name
            if not path.exists():
                continue
            content = path.read_bytes()
            kept = b"".join(content.splitlines(keepends=True)[: counts.get(name, 0)])
            if kept != content:
                replace_file(path, partial(_write, kept))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the resumable state; a reader finds the old one or the new one, never half of either.

        Args:
            state: tensors, numbers, strings and containers of them: what `torch.load(weights_only=True)` reads back.
        """
        import torch

        # The lines reach the disk before the state that counts on them.
        for name in _LINES:
            with suppress(FileNotFoundError), open(self.path / name, "rb") as file:
                os.fsync(file.fileno())
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.state_path, lambda file: torch.save(dict(state), file))

    def load_state(self) -> dict[str, Any] | None:
        """The state last saved, its tensors on the CPU; None where there is none.

        Raises:
            ConfigError: for a file that is no state.
        """
        import torch

        if not self.state_path.exists():
            return None
        try:
            return torch.load(self.state_path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ConfigError(f"{self.state_path} is damaged: remove it, and the run begins anew") from error

    def check_space(self, bytes_needed: int) -> None:
        """Stop before compute when the run would fill the disk.

        Raises:
            ConfigError: with the bytes that are free and those that are needed.
        """
        folder = self.path.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise ConfigError(
                f"the disk of {folder} has {free / 1e6:.0f} MB free and {bytes_needed / 1e6:.0f} MB are needed: "
                "free some space, or write elsewhere with results=/another/disk"
            )


def read_object(file: Path, mend: str) -> dict[str, Any]:
    """The JSON object that a file holds; empty where there is no file.

    Raises:
        ConfigError: as :func:`parse_object`.
    """
    try:
        return parse_object(file.read_bytes(), str(file), mend)
    except FileNotFoundError:
        return {}


def parse_object(text: bytes, where: str, mend: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: where it is something else, saying where that is and what to do: ``mend``.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is damaged ({error}): {mend}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is damaged (no JSON object): {mend}")
    return found


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds its old content or its new one at every moment, also after a power cut."""
    # One fixed name: the next attempt overwrites what a killed one left behind.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def effective_status(run: Mapping[str, Any]) -> str:
    """The status in run.json, but `interrupted` where the process that called itself running is gone.

    A process on another machine cannot be seen and is believed.
    """
    status = run.get("status", "planned")
    if status != "running" or run.get("host") not in (None, socket.gethostname()):
        return status
    return "running" if _alive(run.get("pid")) else "interrupted"


def _alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
        # A killed process that nobody has waited for yet still has a number: its state is Z.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or no /proc on this system
        return True


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    data = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(data)
            if written != len(data):  # a disk that fills up may take part of a write: ask again for the reason
                file.write(data[written:])
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def _finite(value: Any) -> Any:
    """The same value with null for numbers that JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
