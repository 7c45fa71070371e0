"""A side of a comparison in a process of its own: its threads, its caches and its memory are nobody else's."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from harness.benchmark.measure import Measure
from harness.machine import cores


class Worker:
    """Measures in another process, on one CPU core. It ends with :meth:`close` or with this process."""

    def __init__(self, prepare: Callable[..., Measure], **settings: Any) -> None:
        """Returns once the side is ready to be measured.

        Args:
            prepare: a function of a module, called in that process; it returns what measures once.
            settings: its keyword arguments.

        Raises:
            RuntimeError: with the traceback of a side that failed.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # All sides share one core, of which only one is at work at a time. The last: interrupts favour the first.
        arguments = (theirs, prepare, cores()[-1], settings)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self) -> Mapping[str, float]:
        """One measurement."""
        self._connection.send(None)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()

    def _answer(self) -> Mapping[str, float]:
        try:
            answer, failure = self._connection.recv()
        except EOFError:
            self._process.join()
            failure = f"a side of the benchmark ended with exit code {self._process.exitcode}"
        if failure:
            raise RuntimeError(failure)
        return answer


@contextmanager
def workers(sides: Mapping[str, tuple[Callable[..., Measure], Mapping[str, Any]]]) -> Iterator[dict[str, Worker]]:
    """A worker for each side, by name, from what prepares it and its settings."""
    started: dict[str, Worker] = {}
    try:
        for name, (prepare, settings) in sides.items():
            started[name] = Worker(prepare, **settings)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def _serve(connection: Connection, prepare: Callable[..., Measure], core: int, settings: Mapping[str, Any]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [core])
    import torch

    torch.set_num_threads(1)
    try:
        measure = prepare(**settings)
        connection.send(({}, None))
        while True:
            connection.recv()
            connection.send((dict(measure()), None))
    except EOFError:
        return
    except BaseException:
        connection.send((None, traceback.format_exc()))
