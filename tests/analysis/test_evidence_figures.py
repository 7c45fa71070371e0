import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from harness.analysis.evidence import headline_equal_budgets, headline_verdicts
from harness.analysis.evidence_figures import equal_budget, pairwise, performance_profiles, scaling
from harness.analysis.scaling import Sigmoid
from harness.analysis.style import Drawing, looks
from harness.analysis.sweep import Sweep, read_sweep
from tests.analysis.synthetic import ODD, write_sweep
from tests.analysis.toy import Run, headlined

ENDS = {
    "a": [0.80, 0.82, 0.78, 0.81, 0.84], "b": [0.60, 0.62, 0.58, 0.66, 0.64], "c": [0.79, 0.84, 0.77, 0.80, 0.86],
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Sweep:
    """`a` and `c` end 0.19 above `b` and cannot be told apart; each FLOP of `a` costs two tokens."""
    return headlined([
        Run(name, seed, [0.2, 0.55, end], tokens=2 if name == "a" else 1)
        for name, ends in ENDS.items()
        for seed, end in enumerate(ends)
    ])  # fmt: skip


def drawn(drawing: Drawing | None) -> Drawing:
    assert drawing is not None
    assert re.search(r"n\s=\s\d", drawing.caption) and re.search(r"95 % ([a-z]+ )?interval", drawing.caption)
    return drawing


def points(axes: Axes) -> list[Line2D]:
    """The values of an interval plot, from top to bottom."""
    found = [line for line in axes.lines if line.get_marker() == "o"]
    return sorted(found, key=lambda line: line.get_ydata()[0])


def is_filled(line: Line2D) -> bool:
    return line.get_markerfacecolor() == line.get_color()


def test_a_decided_pair_is_filled_in_the_colour_of_the_better_one(known: Sweep) -> None:
    figure = drawn(pairwise(known)).figure
    difference, chance = figure.axes
    assert [label.get_text() for label in difference.get_yticklabels()] == ["a − b", "a − c", "b − c"]
    look = looks(known)
    for axes in (difference, chance):
        first, undecided, last = points(axes)
        assert (to_rgb(first.get_color()), to_rgb(last.get_color())) == (look["a"].color, look["c"].color)
        assert [is_filled(line) for line in (first, undecided, last)] == [True, False, True]
    assert points(difference)[0].get_xdata()[0] == pytest.approx(0.19)
    assert [line.get_xdata()[0] for line in points(chance)] == [1.0, 0.52, 0.0]


def test_the_data_of_the_pairs_are_their_verdicts(known: Sweep) -> None:
    data = drawn(pairwise(known)).data
    verdicts = headline_verdicts(known)
    assert data["outcome"].tolist() == [one.outcome for one in verdicts] == ["better", "undecided", "worse"]
    assert data["low"].tolist() == [one.low for one in verdicts]
    assert (data["low_of_probability"] <= data["probability"]).all()


def test_nine_variants_are_held_against_the_one_with_the_highest_mean() -> None:
    names = [f"v{number}" for number in range(9)]
    runs = [
        Run(name, seed, [0.2, 0.5 + 0.01 * number + 0.001 * (seed * number % 5)], [0, 10])
        for number, name in enumerate(names)
        for seed in range(3)
    ]
    sweep = headlined(runs)
    assert len(headline_verdicts(sweep)) == len(list(combinations(names, 2))) == 36
    drawing = drawn(pairwise(sweep))
    assert drawing.data[["first", "second"]].to_numpy().tolist() == [[name, "v8"] for name in names[:-1]]
    assert "only those with the variant that has the highest mean" in drawing.caption


def test_the_highest_mean_is_one_of_those_that_have_pairs() -> None:
    runs = [
        Run(f"v{number}", seed, [0.2, 0.5 + 0.01 * number + 0.001 * (seed * number % 5)], [0, 10])
        for number in range(9)
        for seed in range(3)
    ]
    drawing = drawn(pairwise(headlined([*runs, Run("top", 0, [0.2, 0.9], [0, 10])])))
    assert drawing.data["second"].unique().tolist() == ["v8"]


def test_every_axis_shows_who_is_beaten_on_it(known: Sweep) -> None:
    drawing = drawn(equal_budget(known))
    (axes,) = drawing.figure.axes
    assert [text.get_text() for text in axes.texts] == ["equal flops: 10 FLOP", "equal tokens: 10"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"] * 2
    assert [is_filled(line) for line in points(axes)] == [True, False, True, False, False, True]
    assert points(axes)[3].get_xdata()[0] == pytest.approx(0.55)  # `a`, at ten tokens
    _, tokens = headline_equal_budgets(known)
    assert drawing.data["unbeaten"].tolist() == [is_filled(line) for line in points(axes)]
    assert drawing.data.query("axis == 'tokens'")["mean_low"].tolist() == tokens.means["mean_low"].tolist()


def test_too_few_runs_beat_nobody() -> None:
    runs = [Run(name, seed, [0.2, 0.5, end]) for name, ends in ENDS.items() for seed, end in enumerate(ends[:3])]
    assert drawn(equal_budget(headlined(runs))).data["unbeaten"].all()
    assert not any(is_filled(line) for line in points(drawn(pairwise(headlined(runs))).figure.axes[0]))


def test_a_profile_falls_by_a_run_at_each_of_its_scores(known: Sweep) -> None:
    drawing = drawn(performance_profiles(known))
    (axes,) = drawing.figure.axes
    assert len(axes.lines) == len(axes.collections) == 3
    b = axes.lines[1]
    heights = dict(zip(np.round(b.get_xdata(), 6), b.get_ydata(), strict=True))
    assert max(heights) == 0.86 and set(np.round(list(heights.values()), 6)) == {0.8, 0.6, 0.4, 0.2, 0.0}
    assert sum(height > 0 for level, height in heights.items() if level > 0.66) == 0
    assert "Wilson's 95 % interval" in drawing.caption and "n\xa0=\xa05 runs each" in drawing.caption


@pytest.fixture(scope="module")
def rising() -> Sweep:
    """`a` follows a sigmoid, `b` does too but with few points."""
    spent = np.linspace(0, 10, 31).tolist()
    runs = []
    for seed in range(3):
        curve = Sigmoid(0.9 + 0.005 * seed, np.log(2.0), np.log(1.5)).at(np.array(spent), 0.3).tolist()
        runs += [Run("a", seed, curve, spent), Run("b", seed, curve[::10], spent[::10])]
    return headlined(runs)


def test_a_scaling_fit_is_drawn_where_it_holds_and_missed_aloud_where_it_does_not(rising: Sweep) -> None:
    drawing = drawn(scaling(rising))
    (axes,) = drawing.figure.axes
    dots, curve, bar, asymptote = axes.lines
    assert {to_rgb(line.get_color()) for line in axes.lines} == {looks(rising)["a"].color}
    assert len(dots.get_xdata()) == 26 and np.interp(2, *curve.get_data()) == pytest.approx(0.6025, abs=0.01)
    assert asymptote.get_ydata()[0] == pytest.approx(0.905, abs=0.01) and asymptote.get_xdata()[0] > 10
    assert bar.get_ydata()[0] < asymptote.get_ydata()[0] < bar.get_ydata()[1]
    assert "No curve where the fit does not hold (the table says why): held_out on tiny (b)." in drawing.caption
    assert set(drawing.data["variant"]) == {"a"} and drawing.data["line"].value_counts()["fit"] == 100


def test_where_no_fit_holds_there_is_no_figure_of_them(known: Sweep) -> None:
    assert scaling(known) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps_have_no_figure_that_says_nothing(tmp_path: Path, name: str) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "sweep", ODD[name]))
    assert pairwise(sweep) is None
    assert (equal_budget(sweep) is None) == (performance_profiles(sweep) is None) == (name != "one variant")
    scaling(sweep)
