"""Whether paired runs decide, and what it takes for them to: on plain arrays, one comparison or many at once.

Runs of one seed are pairs. The test is the paired t test, corrected by Holm (1979); the interval is the t interval of
the mean difference. The bootstrap of :mod:`harness.analysis.intervals` is for scores, which may be skewed; differences
of two variants' scores are close to symmetric, and there the t interval covers as it should from three pairs on, with
a power that can be worked out beforehand. Variants that are alike are told apart in at most 5 % of sweeps, however
skewed their scores; where the means are equal but only one variant is much skewed (an exponential against a normal
distribution with a third of its spread), a winner is named in 7 to 12 %. "Equivalent" is each pair's own, by its
interval: of variants that differ by just the margin 2.5 % of sweeps say so, and more often of one of several pairs.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import ndtr

from harness.analysis.intervals import CONFIDENCE

LEVEL = 1 - CONFIDENCE
POWER = 0.8
MARGIN = 0.02  # of a score from 0 to 1: smaller differences do not matter
CLEAR = 3.0  # spreads: a difference so large should not be missed
MOST_SEEDS = 1000  # that are worth naming
_QUADRATURE = 100


class Differences(NamedTuple):
    """Paired differences x - y, each field `[...]`: mean, 95 % interval, spread (standard deviation), two-sided p."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    spread: np.ndarray
    p: np.ndarray


class Chances(NamedTuple):
    """The probability of each outcome but undecided, `[...]`."""

    better: np.ndarray
    worse: np.ndarray
    equivalent: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """That it is any of them."""
        return self.better + self.worse + self.equivalent


def differences(x: np.ndarray, y: np.ndarray) -> Differences:
    """Of runs that share a seed at the same place of the last axis, `[..., n]`; NaN where n is less than 2."""
    gaps = x - y
    n = gaps.shape[-1]
    if n < 2:
        return Differences(*np.full((5, *gaps.shape[:-1]), np.nan))
    mean, spread = gaps.mean(axis=-1), gaps.std(axis=-1, ddof=1)
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * spread / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / spread * np.sqrt(n), n - 1)
    return Differences(mean, mean - half, mean + half, spread, np.where(np.isnan(p), 1.0, p))  # no gap at all: 0 / 0


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p values of the comparisons along the last axis (Holm 1979); NaN counts as a comparison, and stays."""
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), axis=-1)


def outcomes(found: Differences, p_holm: np.ndarray, margin: float) -> np.ndarray:
    """Better, worse, equivalent or undecided, `[...]`; a difference that is certain but does not matter is none."""
    small = (found.low > -margin) & (found.high < margin)
    clear = p_holm <= LEVEL
    return np.select([small, clear & (found.mean > 0), clear], ["equivalent", "better", "worse"], "undecided")


def chances(difference: float, spread: float, pairs: np.ndarray | int, comparisons: int, margin: float) -> Chances:
    """How likely each outcome is with so many pairs, for a true difference and spread of normal differences.

    Exact for the level that Holm's next step has, but for the quadrature over the spread that will be seen. A lower
    bound where other comparisons of the setting are decided by the same runs, or scores have long tails.

    Args:
        pairs: n at least 2, `[...]`.
        comparisons: of the setting that are open, this one among them.
    """
    n = np.asarray(pairs, dtype=float)[..., None]
    seen = np.reshape([_spreads_seen(int(size)) for size in np.ravel(n)], (*np.shape(pairs), _QUADRATURE))
    error = spread / np.sqrt(n)
    inside = margin - stats.t.ppf(1 - LEVEL / 2, n - 1) * seen * error  # means within it are equivalent
    beyond = np.maximum(stats.t.ppf(1 - LEVEL / comparisons / 2, n - 1) * seen * error, inside)  # and past it, clear
    better, worse = ndtr((difference - beyond) / error), ndtr((-beyond - difference) / error)
    within = ndtr((inside - difference) / error) - ndtr((-inside - difference) / error)
    return Chances(better.mean(axis=-1), worse.mean(axis=-1), np.maximum(within, 0).mean(axis=-1))


@cache
def _spreads_seen(n: int) -> np.ndarray:
    """Equally likely standard deviations of n standard normal differences, `[_QUADRATURE]`."""
    return np.sqrt(stats.chi2.ppf((np.arange(_QUADRATURE) + 0.5) / _QUADRATURE, n - 1) / (n - 1))


@cache
def least_pairs(comparisons: int) -> int:
    """The pairs that it takes to find even a difference of three spreads with 80 % probability: 4 for one comparison.

    With fewer, the test says little either way, and leans on differences being normal, which so few cannot show.
    """
    sizes = np.arange(2, 100)
    return int(sizes[chances(CLEAR, 1.0, sizes, comparisons, 0.0).better >= POWER][0])


def further_seeds(difference: float, spread: float, n: int, comparisons: int, margin: float) -> int | None:
    """How many more than n pairs decide with 80 % probability; None for more than 1,000."""
    if spread == 0:  # any pairs decide, but that nothing is less than nothing
        return None if difference == margin == 0 else 0
    more = np.arange(max(1, 2 - n), MOST_SEEDS + 1)
    enough = more[chances(difference, spread, n + more, comparisons, margin).decided >= POWER]
    return int(enough[0]) if len(enough) else None
