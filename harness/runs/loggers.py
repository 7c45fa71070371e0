"""Loggers beside metrics.jsonl. Each is a context manager that gives a function to log with, and imports its package
only once it is opened."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from harness.config import RunConfig
from harness.runs.directory import RunDirectory

# Takes values by name, and the number of rollout batches that they come after.
Log = Callable[[Mapping[str, Any], int], None]


@contextmanager
def open_loggers(config: RunConfig, directory: RunDirectory, steps: int) -> Iterator[Log]:
    """Log with every logger of the configuration until the block ends; what is not a finite number is left out.

    Args:
        config: which loggers, and the run that they show.
        directory: of the run.
        steps: behind the run; 0 where it begins. What a logger was given after them comes again.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(LOGGERS[name](config, directory, steps)) for name in config.logger.loggers]

        def log(values: Mapping[str, Any], step: int) -> None:
            finite = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
            for one in logs:
                one(finite, step)

        yield log


@contextmanager
def _tensorboard(config: RunConfig, directory: RunDirectory, steps: int) -> Iterator[Log]:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    # Hides what was logged after the state that the run continues from.
    purge_step = steps + 1 if steps else 0
    with SummaryWriter(str(directory.path / "tensorboard"), purge_step=purge_step) as writer:

        def log(values: Mapping[str, Any], step: int) -> None:
            # One event for all: add_scalar makes one for each value, and takes more than ten times as long.
            tagged = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            writer.file_writer.add_summary(Summary(value=tagged), step)
            writer.flush()  # a state that is saved later counts on it

        yield log


@contextmanager
def _wandb(config: RunConfig, directory: RunDirectory, steps: int) -> Iterator[Log]:
    # Its error reports go over the network in offline mode too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # A run name can be longer than the 64 characters of an id, and other sweeps can have it too.
    identity = sha256(f"{config.sweep}/{config.run_name}".encode()).hexdigest()[:16]
    with wandb.init(
        project=config.logger.project,
        entity=config.logger.entity,
        mode=config.logger.mode,
        dir=str(directory.path),
        id=identity,
        resume="allow" if steps else None,
        name=config.run_name,
        group=config.sweep,
        config=asdict(config),
    ) as run:
        # wandb's own step cannot go back, but an evaluation may be of an earlier step than the latest row.
        run.define_metric("*", step_metric="step")
        yield lambda values, step: run.log({**values, "step": step})


@contextmanager
def _trackio(config: RunConfig, directory: RunDirectory, steps: int) -> Iterator[Log]:
    import trackio

    run = trackio.init(
        project=config.logger.project,
        name=config.run_name,
        group=config.sweep,
        config=asdict(config),
        resume="allow" if steps else "never",
        embed=False,
        # Threads of this process that would do their work inside of charged phases.
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    try:
        yield lambda values, step: run.log(dict(values), step=step)
    finally:
        run.finish()


# By the name of the package that each needs.
LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
