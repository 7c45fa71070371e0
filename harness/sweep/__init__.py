"""Sweeps: plan and freeze the cells, let a Hydra launcher run each in a process of its own, watch, and sum up."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.sweep import slots  # noqa: F401  (registers the resolver that conf/hydra/launcher/parallel.yaml uses)


class SweepCallback(Callback):
    """What Hydra calls before it launches a sweep; carried into every worker, so it keeps no state."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plan, freeze and print the cells and begin to watch them; on a bad plan exit with status 2."""
        from harness.sweep import session

        session.start(config)
