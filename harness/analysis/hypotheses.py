"""A hypothesis about a sweep: what is compared, where the result should lie, and whether it does.

It is supported if the 95 % interval lies wholly within its bounds, not supported if wholly outside, else undecided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from harness.analysis.decisions import differences, least_pairs
from harness.analysis.intervals import (
    MIN_RUNS_FOR_INTERVAL,
    NONE,
    Interval,
    mean_interval,
    probability_of_improvement,
)
from harness.analysis.quantities import QUANTITIES, Score
from harness.analysis.scores import counts, none_ended_well, paired
from harness.analysis.sweep import Sweep
from harness.errors import ConfigError

Outcome = Literal["supported", "not supported", "undecided", "not tested here"]


class Comparison(NamedTuple):
    """What is made of the runs' numbers.

    Attributes:
        algorithms: how many are compared; runs of two that share a seed are pairs.
        words: as it stands in a sentence, with places for the algorithms.
        takes: the numbers for which `interval` is defined.
        interval: from `[n]` numbers of each algorithm; :data:`NONE` where it is not defined.
    """

    algorithms: int
    words: str
    takes: str
    interval: Callable[..., Interval]

    @property
    def least(self) -> int:
        """The runs, or pairs, below which nothing is said."""
        return MIN_RUNS_FOR_INTERVAL if self.algorithms == 1 else least_pairs(1)


def level(values: np.ndarray) -> Interval:
    """The mean, with its studentised bootstrap interval."""
    return mean_interval([values]) if np.isfinite(values).all() else NONE


def difference(x: np.ndarray, y: np.ndarray) -> Interval:
    """The mean of x - y, with its paired t interval."""
    if not np.isfinite([x, y]).all():
        return NONE
    found = differences(x, y)
    return Interval(float(found.mean), float(found.low), float(found.high))


def ratio(x: np.ndarray, y: np.ndarray) -> Interval:
    """The geometric mean of x / y, with the t interval of its logarithm."""
    if not (np.minimum(x, y) > 0).all():
        return NONE
    return Interval(*map(math.exp, difference(np.log(x), np.log(y))))


COMPARISONS: dict[str, Comparison] = {
    "level": Comparison(1, "{}", "finite numbers", level),
    "difference": Comparison(2, "{} minus {}", "finite numbers", difference),
    "ratio": Comparison(2, "{} over {}", "finite numbers above 0", ratio),
    "chance": Comparison(2, "probability that {} has more than {}", "any numbers", probability_of_improvement),
}


@dataclass(frozen=True)
class Hypothesis:
    """A comparison of a quantity lies between two bounds; None is no bound.

    Attributes:
        kind: of :data:`COMPARISONS`.
        algorithms: names of entries, as many as the comparison takes.
        quantity: of :data:`harness.analysis.quantities.QUANTITIES`.
    """

    kind: str
    algorithms: tuple[str, ...]
    quantity: Annotated[Any, QUANTITIES]
    above: float | None
    below: float | None

    def __post_init__(self) -> None:
        if self.kind not in COMPARISONS:
            raise ConfigError(f"kind={self.kind}: no such comparison; there are {', '.join(COMPARISONS)}")
        if len(self.algorithms) != (number := COMPARISONS[self.kind].algorithms):
            raise ConfigError(f"algorithms={list(self.algorithms)}: kind={self.kind} takes {number}")
        if len(set(self.algorithms)) < number:
            raise ConfigError(f"algorithms={list(self.algorithms)}: name two that are not the same")
        if (self.above is None and self.below is None) or not self._low < self._high:
            raise ConfigError(f"above={self.above} and below={self.below}: give a bound, and above less than below")

    @property
    def _low(self) -> float:
        return -math.inf if self.above is None else self.above

    @property
    def _high(self) -> float:
        return math.inf if self.below is None else self.below

    def judge(self, interval: Interval) -> Outcome:
        """Whether the interval lies wholly inside the bounds, wholly outside, or neither."""
        if self._low < interval.low and interval.high < self._high:
            return "supported"
        return "not supported" if interval.high <= self._low or self._high <= interval.low else "undecided"

    def words(self, sweep: Sweep) -> str:
        """As it stands in a sentence."""
        if self.above is not None and self.below is not None:
            where = f"{self.above:g} to {self.below:g}"
        else:
            where = f"below {self.below:g}" if self.above is None else f"above {self.above:g}"
        what = COMPARISONS[self.kind].words.format(*self.algorithms)
        return f"{self.quantity.label(sweep)}, {what}: {where}"


@dataclass(frozen=True)
class Result:
    """What the runs of one setting say of a hypothesis.

    Attributes:
        hypothesis: in words.
        interval: the estimate, NaN where it was not tested.
        n: runs, or pairs of runs.
        measured: the estimate with its interval and n in words; or why it was not tested.
        worst: runs that count as the worst because they diverged or failed.
    """

    hypothesis: str
    outcome: Outcome
    interval: Interval
    n: int
    measured: str
    worst: int = 0


def examine(sweep: Sweep, hypothesis: Hypothesis, rows: pd.DataFrame, setting: str) -> Result:
    """Hold a hypothesis against one setting of a sweep.

    Args:
        rows: of the hypothesis's quantity in the sweep.
    """
    comparison, names, words = COMPARISONS[hypothesis.kind], hypothesis.algorithms, hypothesis.words(sweep)
    here = rows[(rows["setting"] == setting) & rows["variant"].isin(names)]
    values = [here["score"].dropna().to_numpy()] if len(names) == 1 else paired(here, *names)
    n, interval = len(values[0]), NONE
    reasons = [reason for name in names if (reason := _absence(sweep, hypothesis, here, name, setting))]
    scored = isinstance(hypothesis.quantity, Score)  # of other quantities, runs that went wrong have none or their own
    if not reasons and scored and n and len(names) == 2 and none_ended_well(here, *names):
        reasons = [f"no run of {' or '.join(names)} ended well, and all count as the worst"]
    if not reasons and scored and n and len(names) == 1 and (here.dropna(subset="score")["status"] == "failed").all():
        reasons = [f"every run of {names[0]} failed, which says nothing of its learning"]
    if not reasons and n < comparison.least:
        reasons = [f"{_count(n, comparison)} of {' and '.join(names)}, where it takes {comparison.least}"]
    if not reasons and math.isnan((interval := comparison.interval(*values)).low):
        reasons = [f"{words.rpartition(':')[0]}: a {hypothesis.kind} takes {comparison.takes}"]
    if reasons:
        return Result(words, "not tested here", NONE, n, "; ".join(reasons))
    about = counts(here)
    worst = about["worst"] if scored else 0
    remarks = [f"{worst} counted as the worst"] * bool(worst)
    remarks += [f"{about['missing']} left out"] * bool(about["missing"])
    numbers = f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
    measured = ", ".join([numbers, _count(n, comparison), *remarks])
    return Result(words, hypothesis.judge(interval), interval, n, measured, worst)


def _absence(sweep: Sweep, hypothesis: Hypothesis, here: pd.DataFrame, name: str, setting: str) -> str | None:
    """Why an algorithm has no number in a setting; None where it has."""
    if here.loc[here["variant"] == name, "score"].notna().any():
        return None
    cells = sweep.cells[sweep.cells["setting"] == setting]
    own = cells[cells["variant"] == name]
    if len(own):
        skipped = (own["status"] == "skipped").all()
        return f"{name} was skipped" if skipped else f"no run of {name} has {hypothesis.quantity.label(sweep)}"
    # Variants that differ in a setting carry it in their names.
    several = cells["variant"].str.startswith(f"{name} ").any()
    return f"{name} ran with several settings, of which the claim names none" if several else f"no runs of {name}"


def _count(n: int, comparison: Comparison) -> str:
    return f"{n} {'run' if comparison.algorithms == 1 else 'pair'}{'' if n == 1 else 's'}"
