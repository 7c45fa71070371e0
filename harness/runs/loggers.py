"""Loggers beside metrics.jsonl."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from harness.config import LoggerConfig
from harness.errors import ConfigError
from harness.runs.directory import RunDirectory


class TensorBoard:
    """Event files below the run directory."""

    def __init__(self, directory: RunDirectory) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError("logger.tensorboard=true: install the extra, pip install 'levelfield[tensorboard]'")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory.path / "tensorboard"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one rollout batch's metrics."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


def open_loggers(config: LoggerConfig, directory: RunDirectory) -> list[TensorBoard]:
    """The loggers that the configuration asks for.

    Raises:
        ConfigError: if one's package is not installed.
    """
    return [TensorBoard(directory)] if config.tensorboard else []
