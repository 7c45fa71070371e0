"""What Hydra's launchers call for every job: a single run, or a cell of a sweep in a child process of its own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.cell import run_alone, telling
from harness.config import read
from harness.runs.directory import FINAL, RunDirectory, RunInUse, effective_status
from harness.runs.reading import read_sweep
from harness.sweep.slots import slot
from harness.torch_setup import set_up_environment

# What a cell imports; where one of them is missing, the cell will say so.
_PRELOADED = ["harness.trainer", "harness.policy.kernels.cpu", "harness.evaluation.policy_lm"]
_PRELOADED += ["lm_eval.evaluator", "reasoning_gym", "tensorboard"]
_PATIENCE = 30.0  # seconds that a cell gets to end when it is told to
_AT_WORK = threading.Lock()  # held while a cell is under way
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
    _end_with_command(plan["pid"], plan["host"])
    directory = RunDirectory(folder / plan["cells"][HydraConfig.get().job.num])
    with _AT_WORK:
        while directory.read_status()["status"] not in FINAL:
            config = read(directory.path / "config.yaml")
            _check_wanted(plan)
            with slot(folder / ".slots", config.device, config.threads) as units:
                process = _start(directory, config.device, config.threads, units)
                try:
                    _wait(process, plan)
                except KeyboardInterrupt:
                    _stop(process)
                    _settle(directory, process, "interrupted")
                    raise
                _settle(directory, process, "failed")
            if process.exitcode != RunInUse.exit_code:
                break
            time.sleep(2)  # another command runs this cell: wait for what it leaves


@cache
def _end_with_command(pid: int, host: str) -> None:
    """End this worker when the command is gone, which joblib's workers may not notice: they wait for its next job."""
    command = {"pid": pid, "host": host}
    if pid == os.getpid():  # the basic launcher's cells are the command's own
        return

    def wait() -> None:
        while _is_there(command):
            time.sleep(1)
        with _AT_WORK:  # the cell that is under way is stopped and recorded first
            os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def _start(directory: RunDirectory, device: str, threads: int, units: Sequence[str]) -> BaseProcess:
    set_up_environment(threads)
    _choose_start_method(device)
    on_gpu = device == "cuda"
    process = multiprocessing.Process(
        target=run_alone,
        args=(
            directory.path,
            directory.path / "log.txt",
            {"CUDA_VISIBLE_DEVICES": ",".join(units)} if on_gpu else {},
            () if on_gpu or not hasattr(os, "sched_setaffinity") else units,
        ),
    )
    process.start()
    return process


def _choose_start_method(device: str) -> None:
    """Processes as forks of one that has imported everything, which takes seconds.

    Not on a GPU: CUDA does not survive a fork, should an import have begun with it.
    """
    # For the whole process: in its workers joblib leaves a method that is known there alone.
    multiprocessing.set_start_method("spawn" if device == "cuda" else "forkserver", force=True)
    multiprocessing.set_forkserver_preload(_PRELOADED)


def _wait(process: BaseProcess, plan: Mapping[str, Any]) -> None:
    """Until the cell ends, or nobody waits for it any longer."""
    while process.exitcode is None:
        _check_wanted(plan)
        process.join(timeout=1)


def _check_wanted(plan: Mapping[str, Any]) -> None:
    """
    Raises:
        KeyboardInterrupt: where the command that made the plan is gone; its workers outlive it for a while.
    """
    if not _is_there(plan):
        raise KeyboardInterrupt


def _is_there(command: Mapping[str, Any]) -> bool:
    return effective_status({**command, "status": "running"}) == "running"


def _stop(process: BaseProcess) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.exitcode is None and time.monotonic() < deadline:
        process.terminate()  # again and again: an interruption inside of a finaliser is lost
        process.join(timeout=2)
    process.kill()
    process.join()


def _settle(directory: RunDirectory, process: BaseProcess, status: str) -> None:
    """Say in run.json how a process ended that could not say it itself."""
    run = directory.read_status()
    code = process.exitcode
    assert code is not None
    if code == RunInUse.exit_code or (run.get("pid") == process.pid and run["status"] != "running"):
        return
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        ended += ", perhaps for want of memory"
    with telling(directory), suppress(RunInUse), directory.lock():
        directory.update_status(
            status=status,
            reason=ended,
            traceback=_tail(directory.path / "log.txt"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _tail(log: Path) -> str:
    return log.read_bytes()[-_TAIL:].decode(errors="replace") if log.exists() else ""
