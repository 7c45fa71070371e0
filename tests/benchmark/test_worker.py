"""Sides in processes of their own."""

import os

import pytest
import torch

from harness.benchmark.memory import peak_memory, reset_peak_memory
from harness.benchmark.worker import Worker, workers


def counting(start):
    """A side that says where it runs and how often it was asked."""
    calls = iter(range(start, 100))
    return lambda: {
        "calls": next(calls),
        "process": os.getpid(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def failing():
    raise ValueError("no such luck")


def dying():
    return lambda: os._exit(3)


def test_sides_have_a_process_and_one_thread_on_one_core_each():
    with workers({"a": (counting, {"start": 0}), "b": (counting, {"start": 10})}) as sides:
        first, second, third = sides["a"](), sides["b"](), sides["a"]()
    assert [first["calls"], second["calls"], third["calls"]] == [0, 10, 1]
    assert len({os.getpid(), first["process"], second["process"]}) == 3 and first["process"] == third["process"]
    assert (first["cores"], first["threads"]) == (1, 1)
    for side in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(int(side["process"]), 0)


def test_what_a_side_raises_reaches_the_benchmark():
    with pytest.raises(RuntimeError, match="no such luck"):
        Worker(failing)


def test_a_side_that_dies_is_told():
    worker = Worker(dying)
    with pytest.raises(RuntimeError, match="exit code 3"):
        worker()
    worker.close()


def test_peak_memory_is_what_was_held_since_the_reset():
    freed = torch.ones(64 * 2**20, dtype=torch.uint8)
    del freed
    held = reset_peak_memory()
    assert peak_memory() - held < 16 * 2**20
    freed = torch.ones(32 * 2**20, dtype=torch.uint8)
    del freed
    assert 30 * 2**20 < peak_memory() - held < 48 * 2**20
