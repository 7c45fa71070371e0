"""One run in one process: prepared, trained, and its end recorded whatever it is."""

import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from harness.config import RunConfig, config_hash, load, save
from harness.errors import ConfigError, Diverged
from harness.runs.directory import FINAL, RunDirectory, RunInUse
from harness.runs.inputs import changed_input, inputs_fingerprint
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
            "provenance": {
                **run.get("provenance", {}),
                "code": code_fingerprint(),
                "inputs": inputs_fingerprint(config),
            },
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
            # Of a ConfigError the message says it all; a traceback would only hide it.
            trace = None if isinstance(error, ConfigError) else traceback.format_exc()
            status, reason = "failed", _reason(error)
        with telling(directory):  # the last run.json stays, and this process will be seen to be gone
            directory.update_status(status=status, reason=reason, traceback=trace, finished=_now())
            if status == "done":
                directory.state_path.unlink(missing_ok=True)  # nothing continues from it: several models large
    return status


@contextmanager
def telling(directory: RunDirectory) -> Iterator[None]:
    """Say on the terminal what a full disk keeps from run.json, and go on."""
    try:
        yield
    except OSError as error:
        print(
            f"{directory.path}: {error}: nothing more can be kept there; free some space and give the same command "
            "again",
            file=sys.stderr,
        )


def _train(directory: RunDirectory) -> None:
    config = load(directory.path / "config.yaml")
    recorded = directory.read_status().get("provenance", {})
    if recorded.get("code") != code_fingerprint():
        raise ConfigError(
            f"the code has changed since this run was planned ({recorded.get('code')}, now {code_fingerprint()}): "
            "go back to that code, or choose another sweep=NAME"
        )
    changed = changed_input(recorded, inputs_fingerprint(config))
    if changed:
        raise ConfigError(
            f"{changed} has changed since this run was planned: put it back, or choose another sweep=NAME"
        )
    made_with = provenance(config.device)
    begun = recorded.get("packages", made_with["packages"])
    if directory.state_path.exists() and begun != made_with["packages"]:
        raise ConfigError(
            f"this run began with other packages ({_differences(begun, made_with['packages'])}): install those again "
            "to continue it, or choose another sweep=NAME"
        )
    set_up_torch(config.threads)
    directory.update_status(provenance={**recorded, **made_with})
    from harness.trainer import train

    train(config, directory)


def _differences(old: dict[str, str], new: dict[str, str]) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name, 'none')}, now {new.get(name, 'none')}" for name in names)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"the disk is full ({error}): free some space and give the same command again"
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_alone(path: Path, log: Path, environment: Mapping[str, str], cores: Sequence[str]) -> None:
    """What a process that was started for one run does: it runs it and exits with a status of :data:`EXIT_CODES`.

    Args:
        path: the run directory, prepared.
        log: what the process prints is appended to this file.
        environment: variables that are only for this process; nothing here has looked at them before.
        cores: the CPU cores to keep to; none for all.
    """
    os.setsid()  # Ctrl-C reaches it through the process that started it, once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _end_with_parent()
    os.environ.update(environment)
    if cores:
        os.sched_setaffinity(0, map(int, cores))
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a process that is killed flushes nothing
    directory = RunDirectory(path)
    try:
        status = run_cell(directory)
    except RunInUse as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    run = directory.read_status()
    print(run.get("traceback") or run.get("reason") or status, file=sys.stderr)
    sys.exit(EXIT_CODES[status])


def _end_with_parent() -> None:
    """Stop this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        while True:  # an interruption inside of a finaliser is lost
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)

    threading.Thread(target=wait, daemon=True).start()
