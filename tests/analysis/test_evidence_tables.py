from pathlib import Path

import numpy as np
import pytest

from harness.analysis.evidence_tables import (
    equal_budget_means,
    equal_budget_winners,
    probabilities_of_improvement,
    scaling,
    score_summary,
    stabilities,
    times_to_target,
)
from harness.analysis.scaling import Sigmoid
from harness.analysis.sweep import Sweep, read_sweep
from harness.analysis.table import Table
from tests.analysis.synthetic import ODD, write_sweep
from tests.analysis.toy import Run, headlined, row

ENDS = {"a": [0.80, 0.82, 0.78, 0.81, 0.84], "b": [0.60, 0.62, 0.58, 0.66, 0.64]}


@pytest.fixture(scope="module")
def known() -> Sweep:
    """`a` ends 0.19 above `b`, and each of its FLOPs costs two tokens; `c` has two runs, one of which diverged."""
    runs = [Run("a", seed, [0.2, 0.5, end], tokens=2) for seed, end in enumerate(ENDS["a"])]
    runs += [Run("b", seed, [0.2, 0.55, end]) for seed, end in enumerate(ENDS["b"])]
    runs += [Run("c", 0, [0.2, 0.3, 0.4]), Run("c", 1, [0.1], status="diverged"), Run("c", 2, status="running")]
    return headlined(runs)


def shown(table: Table, **where: str) -> dict[str, str]:
    """A line as its reader sees it."""
    place = list(table.shown.index).index(row(table, **where).name)
    return dict(zip(table.header, table.rows[place], strict=True))


def test_means_stand_beside_the_worst_seed_and_what_counts_as_it(known: Sweep) -> None:
    table = score_summary(known)
    a, c = row(table, algorithm="a"), row(table, algorithm="c")
    assert (a["n"], a["mean"], a["IQM"]) == (5, pytest.approx(0.81), pytest.approx(0.81))
    assert a["low"] < 0.81 < a["high"] and (a["worst"], a["its seed"]) == (0.78, 2)
    assert (c["n"], c["mean"], c["went wrong"], c["missing"]) == (2, pytest.approx(0.25), 1, 1)
    assert shown(table, algorithm="c")["low"] == "–" and shown(table, algorithm="a")["its seed"] == "2"
    assert table.note.startswith("held_out at the end of the budget")


def test_the_chance_of_a_better_run_is_there_for_pairs_with_enough_seeds(known: Sweep) -> None:
    table = probabilities_of_improvement(known)
    assert table.frame[["first", "second", "pairs", "first is higher"]].to_numpy().tolist() == [["a", "b", 5, 1.0]]
    assert 0.5 < table.frame["low"][0] < 1


def test_who_is_in_front_is_said_axis_by_axis(known: Sweep) -> None:
    table = equal_budget_winners(known)
    assert table.frame[["axis", "budget", "unit", "highest mean"]].to_numpy().tolist() == [
        ["flops", 10, "FLOP", "a"], ["tokens", 10, "", "b"],
    ]  # fmt: skip
    assert table.frame["unbeaten"].tolist() == ["a", "b"]  # `c`, which has only one pair with the others, is not ranked


def test_the_unbeaten_are_those_that_no_verdict_is_against() -> None:
    runs = [
        Run(name, seed, [0.2, 0.5, end], tokens=2 if name == "a" else 1)
        for name, ends in ENDS.items()
        for seed, end in enumerate(ends)
    ]
    table = equal_budget_winners(headlined(runs))
    assert table.frame["unbeaten"].tolist() == ["a", "b"]
    assert shown(table, axis="flops") == {
        "model": "tiny", "axis": "flops", "budget": "10", "unit": "FLOP", "highest mean": "a", "unbeaten": "a",
    }  # fmt: skip


def test_means_at_an_equal_budget_are_interpolated(known: Sweep) -> None:
    found = row(equal_budget_means(known), axis="tokens", algorithm="a")
    assert (found["budget"], found["n"]) == (10, 5)
    assert found["mean"] == pytest.approx(0.5)  # ten tokens are five FLOPs for it
    assert row(equal_budget_means(known), axis="flops", algorithm="a")["mean"] == pytest.approx(0.81)


def test_what_was_not_reached_is_said_to_be_so(known: Sweep) -> None:
    table = times_to_target(known)
    first = table.frame["target"].unique()[0]
    assert first == pytest.approx(0.505, abs=0.01)  # half of the way from 0.18 to 0.81
    a, b, c = (shown(table, algorithm=name, target=first) for name in "abc")
    assert (a["reached"], b["reached"]) == ("100%", "100%")
    assert float(a["median (FLOP)"]) > 5 > float(b["median (FLOP)"])  # with 0.5 and 0.55 at 5 FLOPs
    assert (c["n"], c["median (FLOP)"], c["low"], c["reached"]) == ("2", "not reached", "–", "0%")
    last = table.frame["target"].max()
    assert shown(table, algorithm="b", target=last)["high"] == "not reached"
    assert "where n is 5 or more" in table.note


def test_lines_are_in_the_order_of_models_and_targets() -> None:
    runs = [Run(name, seed, [0.2, 0.5, 0.8], setting=model)
            for name in "ab" for model in ("small", "large") for seed in range(3)]  # fmt: skip
    frame = times_to_target(headlined(runs)).frame
    assert frame["model"].tolist() == ["small"] * 6 + ["large"] * 6
    assert frame["algorithm"].tolist() == ["a", "b"] * 6
    assert equal_budget_means(headlined(runs)).frame["model"].tolist() == ["small"] * 4 + ["large"] * 4


def test_a_collapse_is_counted_and_its_rule_stated() -> None:
    runs = [Run("a", seed, [0.2, 0.8], rewards=[0.4, 0.6, 0.7]) for seed in range(3)]
    runs += [
        Run("b", 0, [0.2, 0.1], rewards=[0.4, 0.6, 0.1]),
        Run("b", 1, status="failed"),
        Run("b", 2, status="planned"),
    ]
    table = stabilities(headlined(runs))
    assert shown(table, algorithm="b") == {
        "model": "tiny", "algorithm": "b", "runs": "2", "diverged": "0", "failed": "1", "collapsed": "1",
        "went wrong": "100%", "low": "34%", "high": "100%", "not over": "1",
    }  # fmt: skip
    assert row(table, algorithm="a")["collapsed"] == 0
    assert "more than 0.05 below the cold start's or below 50% of its own highest" in table.note


def test_a_fit_that_holds_has_its_numbers_and_another_its_reason() -> None:
    spent = np.linspace(0, 10, 31).tolist()
    truth = Sigmoid(asymptote=0.9, log_midpoint=np.log(2.0), log_steepness=np.log(1.5))
    runs = []
    for seed in range(4):
        rising = truth._replace(asymptote=0.9 + 0.005 * seed).at(np.array(spent), 0.3).tolist()
        runs += [Run("a", seed, rising, spent), Run("b", seed, rising[::10], spent[::10])]
    table = scaling(headlined(runs))
    a, b = row(table, algorithm="a"), row(table, algorithm="b")
    assert a["A low"] < 0.9075 < a["A high"] and a["midpoint (FLOP)"] == pytest.approx(2, rel=0.05)
    assert (a["steepness"], a["predicted"]) == (pytest.approx(1.5, rel=0.05), pytest.approx(a["measured"], abs=0.01))
    assert "no fit, because" not in shown(table, algorithm="a") and len(table.rows) == 1
    assert b["no fit, because"] == "points of a run in the first half: 1, where it takes 4"
    assert table.remarks == [
        "No fit of held_out, because points of a run in the first half: 1, where it takes 4: b on tiny"
    ]


TABLES = [
    score_summary, probabilities_of_improvement, equal_budget_winners, equal_budget_means, times_to_target, stabilities,
    scaling,
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps_have_tables_too(tmp_path: Path, name: str) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "sweep", ODD[name]))
    lines = {table: len(table(sweep).rows) for table in TABLES}
    assert (lines[stabilities] > 0) == (name != "all are skipped")
    assert lines[probabilities_of_improvement] == 0
    assert (lines[times_to_target] > 0) == name.startswith(("one", "nothing in"))
