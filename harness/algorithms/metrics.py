"""Metrics that add up: a mean is kept as total and count, so that it is divided once and never a mean of means."""

from torch import Tensor


class Metrics:
    """Totals, maxima and minima gathered over micro-batches and optimizer steps.

    Tensors stay on their device until :meth:`compute`, so that gathering never waits for the device.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._maxima: dict[str, Tensor] = {}
        self._minima: dict[str, Tensor] = {}

    def mean(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a mean: ``total`` over ``count`` elements."""
        old_total, old_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + _detach(total), old_count + _detach(count))

    def maximum(self, name: str, value: Tensor) -> None:
        """Add to a maximum."""
        value = value.detach()
        self._maxima[name] = value.maximum(self._maxima[name]) if name in self._maxima else value

    def minimum(self, name: str, value: Tensor) -> None:
        """Add to a minimum."""
        value = value.detach()
        self._minima[name] = value.minimum(self._minima[name]) if name in self._minima else value

    def update(self, other: "Metrics") -> None:
        """Add all of another one."""
        for name, (total, count) in other._means.items():
            self.mean(name, total, count)
        for name, value in other._maxima.items():
            self.maximum(name, value)
        for name, value in other._minima.items():
            self.minimum(name, value)

    def compute(self) -> dict[str, float]:
        """The values as plain numbers; a mean over nothing is left out."""
        means = {name: (float(total), float(count)) for name, (total, count) in self._means.items()}
        result = {name: total / count for name, (total, count) in means.items() if count}
        result |= {name: float(value) for name, value in self._maxima.items()}
        result |= {name: float(value) for name, value in self._minima.items()}
        return result


def _detach(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
