"""One run in one process: prepared, trained, and its end recorded whatever it is."""

import argparse
import errno
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from harness.config import RunConfig, config_hash, load, save
from harness.errors import ConfigError, Diverged
from harness.runs.directory import FINAL, RunDirectory, RunInUse
from harness.runs.provenance import code_fingerprint, provenance
from harness.torch_setup import set_up_torch

EXIT_CODES = {"done": 0, "diverged": 0, "skipped": 0, "failed": 1, "interrupted": 130}


def prepare(config: RunConfig, declined: str | None = None) -> RunDirectory:
    """Write config.yaml and run.json before the run; a run that has ended for good is left as it is.

    Args:
        config: the resolved configuration.
        declined: why the algorithm cannot apply here; the run is then skipped.

    Raises:
        RunInUse: where another process writes this run.
    """
    directory = RunDirectory(config.run_dir)
    with directory.lock():
        run = directory.read_status()
        if run.get("status") in ("done", "diverged"):
            return directory
        save(config, directory.path / "config.yaml")
        identity = {
            "algorithm": config.algorithm.name,
            "model": config.model.name,
            "task": config.task.name,
            "seed": config.seed,
            "label": config.label,
            "hash": config_hash(config),
            "provenance": {**run.get("provenance", {}), "code": code_fingerprint()},
            "budget": run.get("budget") or {"axis": config.budget.axis, "limit": config.budget.limit},
        }
        if declined is not None:
            outcome = {"status": "skipped", "reason": declined, "traceback": None}
        elif run.get("status") in (None, "skipped"):
            outcome = {"status": "planned", "reason": None, "traceback": None}
        else:  # how the last attempt ended stays visible until the next one starts
            outcome = {}
        directory.update_status(**identity, **outcome)
    return directory


def run_cell(directory: RunDirectory) -> str:
    """Train in this process, from the latest checkpoint if there is one, and record how it ended.

    Returns:
        done, diverged, failed or interrupted; done, diverged or skipped at once if that is what it already was.

    Raises:
        RunInUse: where another process writes this run.
    """
    with directory.lock():
        run = directory.read_status()
        if run.get("status") in FINAL:
            return run["status"]
        directory.update_status(
            status="running",
            reason=None,
            traceback=None,
            pid=os.getpid(),
            host=socket.gethostname(),
            started=run.get("started") or _now(),
            finished=None,
        )
        try:
            _train(directory)
            status, reason, trace = "done", None, None
        except Diverged as error:
            status, reason, trace = "diverged", str(error), traceback.format_exc()
        except KeyboardInterrupt:
            status, reason, trace = "interrupted", "stopped from outside", None
        except (Exception, SystemExit) as error:
            status, reason, trace = "failed", _reason(error), traceback.format_exc()
        with suppress(OSError):  # a full disk: the last run.json stays, and this process will be seen to be gone
            directory.update_status(status=status, reason=reason, traceback=trace, finished=_now())
    return status


def interrupt_once(signum: int, frame: FrameType | None) -> None:
    """Signal handler: stop as Ctrl-C does, and let nothing interrupt the stopping."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _train(directory: RunDirectory) -> None:
    config = load(directory.path / "config.yaml")
    recorded = directory.read_status().get("provenance", {})
    if recorded.get("code") != code_fingerprint():
        raise ConfigError(
            f"the code has changed since this run was planned ({recorded.get('code')}, now {code_fingerprint()}): "
            "go back to that code, or choose another sweep=NAME"
        )
    set_up_torch(config.threads)
    directory.update_status(provenance={**recorded, **provenance(config.device)})
    from harness.trainer import train

    train(config, directory)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"the disk is full ({error}): free some space and give the same command again"
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _end_with_parent() -> None:
    """Stop this process when the one that holds the other end of its standard input is gone."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.cell", description="Run one prepared run directory.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="stop when standard input closes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, interrupt_once)
    signal.signal(signal.SIGTERM, interrupt_once)
    if arguments.with_parent:
        _end_with_parent()
    directory = RunDirectory(arguments.run_dir)
    try:
        status = run_cell(directory)
    except RunInUse as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(directory.read_status().get("traceback") or status, file=sys.stderr)
    return EXIT_CODES[status]


if __name__ == "__main__":
    sys.exit(main())
