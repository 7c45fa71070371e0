"""Scoring by libraries that parse model output, in a process of its own with bounded time and memory."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("_scoring_worker.py")


class BoundedScorer:
    """A worker process, started with the first answer and again after one that exhausted it.

    It works from any thread, and ends with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def score(self, scorer: str, *arguments: Any) -> float:
        """What the named scorer of the worker says, or 0.0 where it fails or exceeds its bounds."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(pickle.dumps((scorer, arguments)))
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            if not reply:
                self._end(process)
                return 0.0
            return float(reply)

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this folder, with its generic module names, off the worker's import path.
        command = [sys.executable, "-P", str(_WORKER)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        with process:  # closes the pipes and waits
            pass


BOUNDED = BoundedScorer()
