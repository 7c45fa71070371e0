import numpy as np
import pandas as pd
import pytest

from harness.analysis.statistics import curve, curve_at_points, estimate


def steps(run: str, x: list[float], y: list[float], status: str = "done") -> pd.DataFrame:
    return pd.DataFrame({"run": run, "step": range(1, len(x) + 1), "x": x, "y": y, "status": status})


def test_of_three_runs_the_interval_is_wider_than_their_range() -> None:
    found = estimate(pd.Series([0.2, 0.5, 0.3]))
    assert found.n == 3 and found.low < 0.2 and 0.5 < found.high


def test_two_runs_have_a_mean_but_no_interval() -> None:
    found = estimate(pd.Series([0.2, np.nan, 0.4, np.inf]))
    assert (found.n, found.mean) == (2, pytest.approx(0.3))
    assert np.isnan(found.low) and np.isnan(found.high)


def test_a_curve_averages_on_the_range_that_all_runs_share() -> None:
    rows = pd.concat([
        steps("a", [1, 3], [10, 30]), steps("b", [2, 4], [20, 40]), steps("c", [1, 2, 5], [10, 20, 50]),
    ])  # fmt: skip
    found = curve(rows, "x", "y")
    assert (found.n, found.x[0], found.x[-1]) == (3, 2, 3)
    assert found.mean == pytest.approx(10 * found.x)
    assert found.low == pytest.approx(found.mean)


def test_unfinished_runs_are_in_no_mean() -> None:
    rows = pd.concat([steps(run, [1, 2], [1, 1]) for run in "abc"] + [steps("d", [1, 2], [9, 9], status="diverged")])
    found = curve(rows, "x", "y")
    assert found.n == 3 and found.mean == pytest.approx(np.ones_like(found.x))
    assert len(found.unfinished) == 1


def test_fewer_than_three_runs_stay_single_lines() -> None:
    found = curve(pd.concat([steps("a", [1, 2], [1, 2]), steps("b", [1, 2], [3, 4])]), "x", "y")
    assert found.n == 2 and len(found.finished) == 2 and not len(found.x)


def test_at_points_a_mean_is_zero_only_where_all_runs_are() -> None:
    rows = pd.concat([steps("a", [1, 2, 3], [0, 0, 3]), steps("b", [1, 2, 3], [3, 0, 3]), steps("c", [1, 2], [3, 0])])
    found = curve_at_points(rows, "x", "y", "step")
    assert found.x.tolist() == [1, 2]  # not all runs have a third step
    assert found.mean.tolist() == [2, 0]
