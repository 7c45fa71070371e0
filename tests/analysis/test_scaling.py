from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.scaling import MAX_ERROR, ScalingFit, Sigmoid, fit_runs, scaling_fits, scaling_frame
from harness.analysis.scores import Metric
from harness.analysis.sweep import Sweep
from tests.analysis.toy import Run, toy_sweep

EMPTY = ScalingFit("tiny", "a", "held_out", "flops", 0, None, start=0.2)
TRUTH = Sigmoid(asymptote=0.9, log_midpoint=np.log(0.2), log_steepness=np.log(1.5))
LIMIT = 1e12


def runs_of(truth: Sigmoid, seeds: int, noise: float, start: float = 0.2, seed: int = 0) -> list[np.ndarray]:
    """Points of runs whose asymptotes differ by 0.02, measured with noise."""
    random = np.random.default_rng(seed)
    budget = np.linspace(0, 1, 31)[1:]
    curves = (truth._replace(asymptote=truth.asymptote + 0.02 * random.normal()) for _ in range(seeds))
    return [
        np.stack([LIMIT * budget, curve.at(budget, start) + noise * random.normal(size=30)], axis=1) for curve in curves
    ]


def test_the_sigmoid_by_hand() -> None:
    """Halfway at the midpoint; at twice the midpoint 1 / (1 + 2^-B); the start at nothing, the asymptote at the end."""
    found = TRUTH.at(np.array([0, 0.2, 0.4, 1e12]), start=0.2)
    assert found == pytest.approx([0.2, 0.55, 0.2 + 0.7 / (1 + 2**-1.5), 0.9])


def test_a_sigmoid_is_found_again_and_predicts_its_end() -> None:
    fit = fit_runs(runs_of(TRUTH, 5, noise=0.0), LIMIT, EMPTY)
    assert fit.reason is None
    assert fit.asymptote.value == pytest.approx(0.9, abs=0.02)
    assert (fit.midpoint.value, fit.steepness.value) == pytest.approx((0.2 * LIMIT, 1.5), rel=0.05)
    assert fit.error == pytest.approx(0, abs=0.01) and fit.measured == pytest.approx(0.84, abs=0.02)
    assert fit.x[-1] == LIMIT and fit.y[0] == 0.2 and (fit.low <= fit.y).all() and (fit.y <= fit.high).all()


def test_the_intervals_over_seeds_cover_the_truth() -> None:
    fits = [fit_runs(runs_of(TRUTH, 8, noise=0.02, seed=seed), LIMIT, EMPTY) for seed in range(40)]
    assert all(fit.reason is None for fit in fits)
    for name, truth in {"asymptote": 0.9, "midpoint": 0.2 * LIMIT, "steepness": 1.5}.items():
        inside = [getattr(fit, name).low <= truth <= getattr(fit, name).high for fit in fits]
        assert 0.87 <= np.mean(inside)
    assert np.mean([fit.asymptote.high - fit.asymptote.low for fit in fits]) < 0.08


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        (runs_of(TRUTH, 2, noise=0.0), "2 finished runs, where it takes 3"),
        ([run[4::5] for run in runs_of(TRUTH, 5, noise=0.0)], "points of a run in the first half: 3"),
        (runs_of(Sigmoid(1.5, np.log(0.9), np.log(0.8)), 5, noise=0.03), "wider than half of what the fit gains"),
    ],
)
def test_no_fit_is_shown_where_it_does_not_hold(runs: list[np.ndarray], why: str) -> None:
    fit = fit_runs(runs, LIMIT, EMPTY)
    assert fit.reason is not None and why in fit.reason
    assert np.isnan(fit.asymptote).all() and not len(fit.x)


def test_a_collapse_in_the_second_half_fails_the_back_test() -> None:
    runs = runs_of(TRUTH, 5, noise=0.0)
    for run in runs:
        run[run[:, 0] > 0.6 * LIMIT, 1] -= 0.2
    fit = fit_runs(runs, LIMIT, EMPTY)
    assert fit.reason == f"the first half predicts {fit.predicted:.3f} for an end of {fit.measured:.3f}"
    assert fit.error > MAX_ERROR * (fit.measured - 0.2) and np.isnan(fit.asymptote.value)


def test_a_reward_that_does_not_rise_has_no_fit() -> None:
    random = np.random.default_rng(0)
    flat = [np.stack([np.linspace(0.03, 1, 30), 0.2 + 0.01 * random.normal(size=30)], axis=1) for _ in range(5)]
    assert fit_runs(flat, 1.0, EMPTY).reason is not None
    assert fit_runs([], 1.0, EMPTY).reason == "0 finished runs, where it takes 3"


def test_a_sweep_is_fitted_by_variant_from_its_own_cold_start() -> None:
    spent = np.linspace(0, 10, 31)
    runs = []
    for seed in range(4):
        rising = TRUTH._replace(log_midpoint=np.log(2.0), asymptote=0.9 + 0.005 * seed).at(spent, 0.3)
        runs.append(Run("a", seed, rising.tolist(), spent.tolist()))
        runs.append(Run("b", seed, rising.tolist(), spent.tolist(), status="done" if seed < 2 else "diverged"))
    a, b = scaling_fits(toy_sweep(runs), Metric("evaluations", "held_out"))
    assert (a.variant, a.n, a.reason, a.start) == ("a", 4, None, pytest.approx(0.3))
    assert (b.variant, b.n) == ("b", 2) and b.reason is not None
    frame = scaling_frame([a, b])
    assert frame["holds"].tolist() == [True, False]
    assert frame["asymptote"][0] == a.asymptote.value and np.isnan(frame["asymptote"][1])
    assert frame["error"][0] == a.predicted - a.measured


def test_there_is_no_fit_from_a_cold_start_that_was_not_measured() -> None:
    spent = np.linspace(1, 10, 31)
    runs = [Run("a", seed, TRUTH.at(spent / 10, 0.3).tolist(), spent.tolist()) for seed in range(3)]
    (fit,) = scaling_fits(toy_sweep(runs), Metric("evaluations", "held_out"))
    assert fit.reason == "the cold start was not measured"


def test_the_same_fit_every_time(sweep: Sweep) -> None:
    first, second = (scaling_fits(sweep, Metric("runs", "reward/mean")) for _ in range(2))
    assert scaling_frame(first).equals(scaling_frame(second)) and len(first) == 7
    assert replace(first[0], x=[]).metric == "training reward"
