"""Closed forms, rliable's numbers, and coverage on scores whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from harness.analysis.intervals import (
    bootstrap_interval,
    interquartile_interval,
    mean_interval,
    median_interval,
    probability_of_improvement,
    share_interval,
)

SIMULATIONS = 1000
SCORES = {
    "normal": stats.norm(0.7, 0.05),
    "skewed accuracy": stats.beta(8, 2),
    "lognormal": stats.lognorm(0.5),
    "exponential": stats.expon(),
}
# Two tasks of five runs each.
X = np.array([[0.83, 0.62], [0.87, 0.55], [0.91, 0.71], [0.79, 0.66], [0.85, 0.58]])
Y = np.array([[0.80, 0.60], [0.88, 0.50], [0.84, 0.64], [0.77, 0.68], [0.82, 0.57]])


def interquartile_mean_of(distribution) -> float:
    """2 ∫ of the quantile function from 1/4 to 3/4."""
    levels = 0.25 + (np.arange(20_000) + 0.5) / 40_000
    return float(distribution.ppf(levels).mean())


def share_inside(truth: float, low: np.ndarray, high: np.ndarray) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("n", [8, 12, 20])
@pytest.mark.parametrize("name", SCORES)
def test_the_interval_of_the_mean_covers_it(name: str, n: int) -> None:
    runs = SCORES[name].rvs((n, 3 * SIMULATIONS), random_state=n)
    parts = [bootstrap_interval(part) for part in np.split(runs, 30, axis=1)]
    low, high = np.concatenate(parts, axis=1)
    assert 0.92 <= share_inside(SCORES[name].mean(), low, high) <= 0.97


@pytest.mark.parametrize("n", [3, 5])
def test_with_few_runs_it_is_wide_rather_than_wrong(n: int) -> None:
    runs = SCORES["normal"].rvs((n, SIMULATIONS), random_state=n)
    low, high = bootstrap_interval(runs)
    assert 0.92 <= share_inside(0.7, low, high) <= 0.98


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_the_interval_of_the_interquartile_mean_covers_it(name: str, n: int) -> None:
    runs = SCORES[name].rvs((SIMULATIONS, n), random_state=n)
    found = np.array([interquartile_interval([one]) for one in runs])
    assert 0.91 <= share_inside(interquartile_mean_of(SCORES[name]), found[:, 1], found[:, 2]) <= 0.97


def test_the_interval_over_settings_resamples_within_them() -> None:
    random = np.random.default_rng(0)
    settings = random.normal(0.3, 0.05, (SIMULATIONS, 6)), random.normal(0.8, 0.02, (SIMULATIONS, 6))
    found = np.array([mean_interval([a, b]) for a, b in zip(*settings, strict=True)])
    assert 0.92 <= share_inside(0.55, found[:, 1], found[:, 2]) <= 0.97
    assert (found[:, 2] - found[:, 1]).max() < 0.2  # without strata it would be half a point, or two


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_of_the_probability_of_improvement_covers_it(n: int, shared: float) -> None:
    random = np.random.default_rng(n)
    seeds = np.sqrt(shared) * random.normal(size=(SIMULATIONS, n))
    x = 1.0 + seeds + np.sqrt(1 - shared) * random.normal(size=(SIMULATIONS, n))
    y = seeds + np.sqrt(1 - shared) * random.normal(size=(SIMULATIONS, n))
    found = np.array([probability_of_improvement(a, b) for a, b in zip(np.exp(x), np.exp(y), strict=True)])
    assert 0.92 <= share_inside(stats.norm.cdf(1 / np.sqrt(2)), found[:, 1], found[:, 2]) <= 0.97


@pytest.mark.parametrize(("n", "least"), [(3, 0.88), (4, 0.93)])
def test_few_pairs_do_not_narrow_the_interval_of_the_probability_of_improvement(n: int, least: float) -> None:
    x, y = np.random.default_rng(n).normal(size=(2, SIMULATIONS, n))
    found = np.array([probability_of_improvement(a, b) for a, b in zip(x, y, strict=True)])
    assert least <= share_inside(0.5, found[:, 1], found[:, 2])


@pytest.mark.parametrize("n", [8, 12, 20])
def test_the_interval_of_a_median_with_infinite_values_covers_it(n: int) -> None:
    times = np.random.default_rng(n).exponential(size=(SIMULATIONS, n))
    times[times > 1.2] = np.inf  # three runs of ten do not get there
    found = np.array([median_interval(one) for one in times])
    assert 0.92 <= share_inside(np.log(2), found[:, 1], found[:, 2]) <= 0.97


def test_of_many_normal_runs_the_bootstrap_interval_is_that_of_students_t() -> None:
    runs = np.random.default_rng(1).normal(3.0, 2.0, size=100)
    half = stats.t.ppf(0.975, 99) * runs.std(ddof=1) / 10
    assert bootstrap_interval(runs) == pytest.approx((runs.mean() - half, runs.mean() + half), abs=0.1 * half)


def test_the_bootstrap_interval_is_the_same_every_time_and_taken_pointwise() -> None:
    runs = np.random.default_rng(2).normal(size=(5, 4))
    low, high = bootstrap_interval(runs)
    assert np.array_equal(bootstrap_interval(runs)[0], low)
    assert low.shape == high.shape == (4,)
    assert bootstrap_interval(runs[:, 2]) == pytest.approx((low[2], high[2]))
    assert mean_interval([runs[:, 2]]) == pytest.approx((runs[:, 2].mean(), low[2], high[2]))


def test_it_moves_and_stretches_with_the_scores() -> None:
    runs = np.array([0.2, 0.5, 0.3, 0.45, 0.7, 0.35, 0.6, 0.25])
    low, high = bootstrap_interval(runs)
    assert bootstrap_interval(10 * runs - 3) == pytest.approx((10 * low - 3, 10 * high - 3))
    assert interquartile_interval([10 * runs - 3]) == pytest.approx(
        [10 * bound - 3 for bound in interquartile_interval([runs])]
    )


def test_runs_that_are_all_equal_leave_no_doubt() -> None:
    low, high = bootstrap_interval(np.array([[0.5, 1.0], [0.5, 2.0], [0.5, 3.0]]))
    assert (low[0], high[0]) == (0.5, 0.5) and low[1] < 2 < high[1]
    assert interquartile_interval([np.full(8, 0.5)]) == (0.5, 0.5, 0.5)


def test_the_interval_of_the_interquartile_mean_does_not_leave_the_runs() -> None:
    runs = SCORES["exponential"].rvs((100, 8), random_state=0)
    found = np.array([interquartile_interval([one]) for one in runs])
    assert (runs.min(axis=1) <= found[:, 1]).all() and (found[:, 2] <= runs.max(axis=1)).all()
    assert np.median((found[:, 2] - found[:, 1]) / np.ptp(runs, axis=1)) == pytest.approx(0.55, abs=0.05)


def test_an_interquartile_mean_of_several_settings_has_no_interval() -> None:
    found = interquartile_interval([np.linspace(0.1, 0.2, 8), np.linspace(0.8, 0.9, 8)])
    assert found.value == pytest.approx(0.5) and np.isnan([found.low, found.high]).all()


def test_an_interquartile_mean_of_a_few_runs_has_no_interval() -> None:
    found = interquartile_interval([np.array([0.852, 0.868, 0.876, 0.885, 0.898])])
    assert found.value == pytest.approx(0.8763, abs=1e-4) and np.isnan([found.low, found.high]).all()
    assert not np.isnan(interquartile_interval([np.linspace(0.85, 0.9, 8)])).any()


def test_two_runs_or_one_in_a_stratum_have_a_value_but_no_interval() -> None:
    for strata in ([np.array([0.2, 0.4])], [np.array([0.1, 0.2, 0.3]), np.array([0.6])]):
        found = mean_interval(strata)
        assert found.value == pytest.approx(0.3) and np.isnan([found.low, found.high]).all()
    assert np.isnan(mean_interval([np.empty(0)])).all()


# What rliable 1.2.0 returns for X and Y (runs x tasks): metrics.aggregate_iqm and aggregate_mean on both tasks and on
# the first, metrics.probability_of_improvement on each task; tasks are settings here.
def test_values_are_those_of_rliable() -> None:
    assert interquartile_interval([*X.T]).value == pytest.approx(0.7433333333333333)
    assert interquartile_interval([*Y.T]).value == pytest.approx(0.7183333333333334)
    assert interquartile_interval([X[:, 0]]).value == pytest.approx(0.85)
    assert mean_interval([*X.T]).value == pytest.approx(0.737)
    assert probability_of_improvement(X[:, 0], Y[:, 0]).value == pytest.approx(0.68)
    assert probability_of_improvement(X[:, 1], Y[:, 1]).value == pytest.approx(0.6)
    ties = probability_of_improvement(np.array([0.5, 0.5, 0.7]), np.array([0.5, 0.6, 0.6]))
    assert ties.value == pytest.approx(0.4444444444444444)


def test_our_interval_holds_that_of_rliable_which_is_too_narrow_for_five_runs() -> None:
    """Of X by library.get_interval_estimates, 20,000 resamples: 0.707 to 0.767."""
    mean = mean_interval([*X.T])
    assert mean.low < 0.707 and 0.767 < mean.high


def test_that_all_runs_are_better_is_not_certainty() -> None:
    found = probability_of_improvement(np.array([4.0, 5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0, np.inf]))
    assert found.value == 0.75
    sure = probability_of_improvement(np.arange(5, 10.0), np.arange(5.0))
    assert sure.value == sure.high == 1 and 0.5 < sure.low < 0.75
    turned = probability_of_improvement(np.arange(5.0), np.arange(5, 10.0))
    assert turned == pytest.approx((0, 0, 1 - sure.low), abs=1e-3)


def test_the_share_of_runs_has_wilsons_interval() -> None:
    z = stats.norm.ppf(0.975) ** 2
    assert share_interval(0, 5) == pytest.approx((0, 0, z / (5 + z)))
    assert share_interval(5, 5) == pytest.approx((1, 5 / (5 + z), 1))
    assert np.isnan(share_interval(0, 0)).all()


def test_the_median_of_five_is_between_the_ends_of_their_range() -> None:
    assert median_interval(np.array([3.0, 1.0, np.inf, 2.0, 5.0])) == (3.0, 1.0, np.inf)
    few = median_interval(np.array([1.0, np.inf, np.inf]))
    assert few.value == np.inf and np.isnan([few.low, few.high]).all()
    assert median_interval(np.array([1.0, 2.0, np.inf, np.inf])).value == np.inf
    assert np.isnan(median_interval(np.empty(0))).all()


def test_the_median_of_eight_is_between_interpolated_order_statistics() -> None:
    """Hettmansperger and Sheather by hand: the 1st to 8th cover 127/128, the 2nd to 7th 119/128."""
    part = (127 / 128 - 0.95) / (8 / 128)
    inner = 7 * part / (1 + 6 * part)
    found = median_interval(np.arange(1.0, 9.0))
    assert found == pytest.approx((4.5, 1 + inner, 8 - inner))
    assert median_interval(np.array([1, 2, 3, 4, 5, 6, 7, np.inf])).high == np.inf
