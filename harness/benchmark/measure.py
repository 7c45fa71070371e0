"""Repeated measurements: taken in turn, summed up by median and range, compared in pairs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Measure = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Spread:
    """One quantity, measured repeatedly."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """What is quoted."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def __truediv__(self, other: "Spread") -> "Spread":
        """The ratio within each repetition, whose two sides met the same state of the machine."""
        return Spread(tuple(ours / theirs for ours, theirs in zip(self.values, other.values, strict=True)))

    def __add__(self, other: "Spread") -> "Spread":
        """The sum within each repetition."""
        return Spread(tuple(one + another for one, another in zip(self.values, other.values, strict=True)))

    def __mul__(self, factor: float) -> "Spread":
        """In another unit."""
        return Spread(tuple(value * factor for value in self.values))


def interleave(sides: Mapping[str, Measure], repetitions: int) -> dict[str, dict[str, Spread]]:
    """Measure each side in turn, A B A B, so that a change of the machine's pace meets all of them.

    Returns:
        for each side every quantity that it measures.
    """
    rows: dict[str, list[Mapping[str, float]]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, measure in sides.items():
            rows[name].append(measure())
    return {name: collect(measured) for name, measured in rows.items()}


def collect(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Repetitions of the same quantities, by quantity."""
    return {key: Spread(tuple(row[key] for row in rows)) for key in rows[0]}


def log_log_slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of cost = c * size^p, by least squares on logarithms: 1 is linear growth."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return slope
