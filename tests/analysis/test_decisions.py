"""The paired test by hand, and its errors and power on runs whose truth is known."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from harness.analysis.decisions import Differences, chances, differences, further_seeds, holm, least_pairs, outcomes

SIMULATIONS = 20_000
WINNER = ["better", "worse"]
SHAPES = ["normal", "shared", "skewed accuracy", "exponential", "heavy-tailed"]


def runs(shape: str, algorithms: int, seeds: int) -> np.ndarray:
    """Scores of algorithms that do not differ, spread about 0.1, `[simulations, algorithms, seeds]`."""
    random = np.random.default_rng([seeds, algorithms])
    size = (SIMULATIONS, algorithms, seeds)
    if shape == "exponential":
        return 0.1 * random.exponential(size=size)
    if shape == "skewed accuracy":
        return 0.1 / 0.12 * random.beta(8, 2, size=size)
    if shape == "heavy-tailed":
        return 0.1 * random.standard_t(3, size=size)
    common = random.normal(size=(SIMULATIONS, 1, seeds)) if shape == "shared" else 0.0
    return 0.1 * (common + random.normal(size=size))


def judged(scores: np.ndarray, margin: float) -> np.ndarray:
    """Outcomes `[simulations, pairs]` after Holm, of scores `[simulations, algorithms, seeds]`."""
    found = [differences(scores[:, i], scores[:, j]) for i, j in combinations(range(scores.shape[1]), 2)]
    stacked = Differences(*(np.stack(field, axis=-1) for field in zip(*found, strict=True)))
    return outcomes(stacked, holm(stacked.p), margin)


@pytest.mark.parametrize("seeds", [5, 8, 20])
@pytest.mark.parametrize("algorithms", [3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_no_difference_a_winner_is_named_in_at_most_five_of_a_hundred(
    shape: str, algorithms: int, seeds: int
) -> None:
    assert np.isin(judged(runs(shape, algorithms, seeds), 0.02), WINNER).any(axis=-1).mean() <= 0.05


@pytest.mark.parametrize("seeds", [4, 8, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_comparison_is_wrong_as_often_as_its_level_says(shape: str, seeds: int) -> None:
    named = np.isin(judged(runs(shape, 2, seeds), 0.02), WINNER).mean()
    assert named <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / SIMULATIONS)


@pytest.mark.parametrize("seeds", [3, 5, 8, 12, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_of_the_difference_covers_it(shape: str, seeds: int) -> None:
    scores = runs(shape, 2, seeds)
    found = differences(scores[:, 0] + 0.05, scores[:, 1])
    assert 0.92 <= ((found.low <= 0.05) & (0.05 <= found.high)).mean() <= (0.97 if seeds >= 8 else 0.99)


@pytest.mark.parametrize(("seeds", "effect"), [(5, 0.3), (8, 0.2), (12, 0.15), (20, 0.1)])
@pytest.mark.parametrize(
    ("shape", "algorithms"),
    [("normal", 2), ("normal", 4), ("skewed accuracy", 2), ("skewed accuracy", 4), ("exponential", 2)],
)
def test_a_planted_effect_is_found_as_often_as_predicted(
    shape: str, algorithms: int, seeds: int, effect: float
) -> None:
    scores = runs(shape, algorithms, seeds)
    scores[:, 0] += effect
    found = (judged(scores, 0.02)[:, 0] == "better").mean()
    pairs = algorithms * (algorithms - 1) // 2
    predicted = chances(effect, 0.1 * np.sqrt(2), seeds, pairs, 0.02).better
    assert 0.3 < predicted < 0.95
    assert found == pytest.approx(float(predicted), abs=0.1)


@pytest.mark.parametrize("shape", ["normal", "skewed accuracy", "exponential"])
def test_what_is_predicted_from_eight_pilot_seeds_comes_true(shape: str) -> None:
    pilot, fresh = runs(shape, 2, 8), runs(shape, 2, 16)
    fresh[:, 0] += 0.11
    spreads = differences(pilot[:, 0], pilot[:, 1]).spread[:500]
    predicted = np.mean([chances(0.11, spread, 16, 1, 0.02).better for spread in spreads])
    assert (judged(fresh, 0.02) == "better").mean() == pytest.approx(predicted, abs=0.1)
    assert 0.6 < predicted < 0.95


@pytest.mark.parametrize(
    ("difference", "spread", "n"), [(0.03, 0.03, 5), (0.0, 0.03, 5), (0.01, 0.03, 5), (0.05, 0.1, 8)]
)
def test_so_many_further_seeds_decide_four_times_of_five(difference: float, spread: float, n: int) -> None:
    more = further_seeds(difference, spread, n, 3, 0.02)
    assert more is not None
    random = np.random.default_rng(0)

    def decided(seeds: int) -> float:
        gaps = random.normal(difference, spread, size=(SIMULATIONS, seeds))
        found = differences(gaps, np.zeros_like(gaps))
        return float((outcomes(found, np.minimum(3 * found.p, 1), 0.02) != "undecided").mean())

    assert 0.79 <= decided(n + more) <= 0.85
    assert decided(n + more // 2) < 0.75


def test_the_chances_of_an_effect_are_those_of_the_noncentral_t_distribution() -> None:
    edge = stats.t.isf(0.025, 9)
    found = chances(0.8, 1.0, 10, 1, 0.0)
    assert found.better == pytest.approx(stats.nct.sf(edge, 9, 0.8 * np.sqrt(10)), abs=2e-3)
    assert found.worse == pytest.approx(stats.nct.cdf(-edge, 9, 0.8 * np.sqrt(10)), abs=1e-4)
    assert found.equivalent == 0
    turned = chances(-0.8, 1.0, 10, 1, 0.0)
    assert (turned.better, turned.worse) == pytest.approx((found.worse, found.better))


def test_without_a_spread_to_speak_of_every_difference_is_decided() -> None:
    inside, outside = chances(0.01, 1e-6, 5, 3, 0.02), chances(0.03, 1e-6, 5, 3, 0.02)
    assert (inside.equivalent, outside.better) == pytest.approx((1, 1))
    assert further_seeds(0.01, 1e-6, 0, 3, 0.02) == 2
    assert further_seeds(1e-9, 1.0, 5, 3, 0.02) is None  # thousands
    assert further_seeds(0.0, 0.0, 5, 3, 0.0) is None
    assert further_seeds(0.0, 0.0, 3, 1, 0.02) == further_seeds(0.25, 0.0, 3, 1, 0.02) == 0


def test_two_or_three_pairs_never_decide_and_more_comparisons_take_more() -> None:
    assert [least_pairs(comparisons) for comparisons in (1, 3, 6, 28)] == [4, 5, 5, 7]


def test_the_paired_difference_by_hand() -> None:
    """Gaps 1, 2, 3: mean 2, spread 1, t = 2 √3, of which P(|T| > t) = 1 - t / √(t² + 2) with two degrees of freedom."""
    found = differences(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.spread) == pytest.approx((2, 1))
    assert found.p == pytest.approx(1 - np.sqrt(12 / 14))
    half = 4.302653 / np.sqrt(3)  # the tables' t of 0.975 with two degrees of freedom
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_equal_gaps_are_certain_and_no_gap_is_none() -> None:
    one = np.array([0.25, 0.5, 0.75, 1.0])
    assert differences(one + 0.25, one).p == 0
    same = differences(one, one)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert np.isnan(differences(one[:1], one[:1])).all()


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([[0.5, 0.6], [0.02, 0.03]])) == pytest.approx(np.array([[1, 1], [0.04, 0.04]]))
    assert holm(np.array([0.02, np.nan]))[0] == pytest.approx(0.04)  # what could not be tested counts


def test_a_certain_difference_that_does_not_matter_is_none() -> None:
    low, high = np.array([0.001, 0.001, -0.03, 0.015, -0.05]), np.array([0.015, 0.03, 0.01, 0.06, -0.03])
    p = np.array([0.01, 0.04, 0.3, 0.06, 0.001])
    found = outcomes(Differences((low + high) / 2, low, high, high, p), p, 0.02)
    assert found.tolist() == ["equivalent", "better", "undecided", "undecided", "worse"]
