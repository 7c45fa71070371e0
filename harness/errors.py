"""The errors that the harness raises on purpose; everything else is a bug or the machine."""


class ConfigError(ValueError):
    """A configuration that cannot run: the message names the key, what was wrong and what to change."""


class Declined(ConfigError):
    """A sound algorithm that cannot apply to this cell (routing replay on a dense model).

    A single run stops with the reason; a sweep shows the cell as skipped with it.
    """


class NothingToChoose(Declined):
    """Trials failed, and none is left to choose settings from: the cell is skipped, and that is no success."""


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite. It ends the run, and it is a result.

    Attributes:
        metrics: what was measured in the rollout batch, in the optimizer steps after it too, which changed no weight.
    """

    def __init__(self, reason: str, metrics: dict[str, float]) -> None:
        super().__init__(reason)
        self.metrics = metrics
