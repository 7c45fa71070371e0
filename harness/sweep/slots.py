"""How many cells a machine holds at once, and which cores or GPU each of them has to itself."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from harness import machine


def parallel_cells(device: str, threads: int) -> int:
    """Cells that run at once on this machine: one for every `threads` CPU cores, or one for every GPU."""
    if device == "auto":
        from harness.validation import resolve_device

        device = resolve_device(device)
    return len(_slots(device, threads))


@contextmanager
def slot(folder: Path, device: str, threads: int) -> Iterator[Sequence[str]]:
    """Hold a free slot of this machine for the block; wait until there is one.

    Args:
        folder: where the sweep keeps its lock files.
        device: cpu or cuda.
        threads: CPU cores of a slot.

    Yields:
        The numbers of its CPU cores, or of its GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for units in _slots(device, threads):
            # Named by the units themselves: jobs of one machine may each be allowed other cores.
            with open(folder / f"{socket.gethostname()}-{device}-{'-'.join(units)}", "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield units
                return
        time.sleep(0.2)


def _slots(device: str, threads: int) -> list[list[str]]:
    if device == "cuda":
        return [[gpu] for gpu in _gpus()]
    cores = [str(core) for core in machine.cores()]
    count = max(1, len(cores) // threads)
    return [cores[i * threads : (i + 1) * threads] for i in range(count)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


OmegaConf.register_new_resolver("parallel_cells", parallel_cells, replace=True)
