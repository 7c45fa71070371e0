"""What Hydra's launchers call for every job: a single run, or a cell of a sweep in a child process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness.runs.directory import FINAL, RunDirectory, RunInUse, effective_status
from harness.runs.reading import read_sweep
from harness.sweep.slots import bind, slot

_TAIL = 4000  # bytes of log.txt that stand in for the traceback of a process that could not leave one


def run_or_launch(job: DictConfig) -> None:
    """The task function of `harness.run`; workers import it from here by name."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        launch_cell(job)
    else:
        from harness.sweep.single import run_single

        run_single(job)


def launch_cell(job: DictConfig) -> None:
    """Run the cell that the frozen plan has at this job's number, in a process of its own.

    What the job's configuration says by now is not looked at, so that an edit during the sweep changes nothing. A cell
    that fails raises nothing, so that the others go on.
    """
    folder = Path(job.results) / job.sweep
    plan = read_sweep(folder)
    directory = RunDirectory(folder / plan["cells"][HydraConfig.get().job.num])
    config = OmegaConf.load(directory.path / "config.yaml")
    while directory.read_status()["status"] not in FINAL:
        with slot(folder / ".slots", config.device, config.threads) as units:
            process = _start(directory, config.device, config.threads, units)
            try:
                _wait(process, plan)
            except KeyboardInterrupt:
                _stop(process)
                _settle(directory, process, "interrupted")
                raise
            _settle(directory, process, "failed")
        if process.returncode != RunInUse.exit_code:
            break
        time.sleep(2)  # another command runs this cell: wait for what it leaves


def _start(directory: RunDirectory, device: str, threads: int, units: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": ",".join(units)} if device == "cuda" else {}),
    }
    with open(directory.path / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.cell", str(directory.path), "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through this process, once
        )
    if device == "cpu":
        bind(process.pid, units)
    return process


def _wait(process: subprocess.Popen[bytes], plan: Mapping[str, Any]) -> None:
    """Until the cell ends.

    Raises:
        KeyboardInterrupt: also where the command that made the plan is gone: its workers outlive it for a while.
    """
    while True:
        try:
            process.wait(timeout=1)
            return
        except subprocess.TimeoutExpired:
            if effective_status({**plan, "status": "running"}) != "running":
                raise KeyboardInterrupt from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _settle(directory: RunDirectory, process: subprocess.Popen[bytes], status: str) -> None:
    """Say in run.json how a process ended that could not say it itself."""
    run = directory.read_status()
    if process.returncode == RunInUse.exit_code or (run.get("pid") == process.pid and run["status"] != "running"):
        return
    code = process.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        ended += ", perhaps for want of memory"
    with suppress(RunInUse), directory.lock():
        directory.update_status(
            status=status,
            reason=ended,
            traceback=_tail(directory.path / "log.txt"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _tail(log: Path) -> str:
    return log.read_bytes()[-_TAIL:].decode(errors="replace")
