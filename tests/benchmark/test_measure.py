"""What is computed from measurements, against numbers worked out by hand."""

import json

import pytest

from harness.benchmark.measure import Spread, collect, interleave, log_log_slope
from harness.benchmark.sizes import TINY
from harness.benchmark.table import Options, Table, at_least, at_most, markdown, write

OPTIONS = Options(repetitions=3, sizes=TINY, device="cpu", shapes=(), sweep=None)


def test_spread_is_quoted_by_median_and_range():
    spread = Spread((4.0, 1.0, 2.0))
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 4.0)


def test_ratios_are_taken_within_a_repetition():
    # Of the medians the ratio would be 2; pair by pair it is 1, 4 and 0.5.
    ratio = Spread((2.0, 4.0, 8.0)) / Spread((2.0, 1.0, 16.0))
    assert ratio.values == (1.0, 4.0, 0.5) and ratio.median == 1.0


def test_sums_and_units():
    assert (Spread((1.0, 2.0)) + Spread((10.0, 20.0))).values == (11.0, 22.0)
    assert (Spread((1.0, 2.0)) * 1e3).values == (1000.0, 2000.0)


def test_sides_are_measured_in_turn():
    order = []

    def side(name):
        def measure():
            order.append(name)
            return {"call": float(len(order))}

        return measure

    measured = interleave({"ours": side("ours"), "theirs": side("theirs")}, 3)
    assert order == ["ours", "theirs"] * 3
    assert measured["ours"]["call"].values == (1.0, 3.0, 5.0) and measured["theirs"]["call"].values == (2.0, 4.0, 6.0)


def test_repetitions_are_collected_by_quantity():
    assert collect([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]) == {"a": Spread((1.0, 3.0)), "b": Spread((2.0, 4.0))}


@pytest.mark.parametrize(
    ("costs", "slope"),
    [
        ([5.0, 10.0, 20.0], 1.0),
        ([7.0, 28.0, 112.0], 2.0),
        ([3.0, 3.0, 3.0], 0.0),
        # Least squares on (0, 0), (1, 1), (2, 0) in powers of two, with a constant: the middle one does not tilt it.
        ([1.0, 2.0, 1.0], 0.0),
    ],
)
def test_slope_is_the_exponent_of_growth(costs, slope):
    assert log_log_slope([64, 128, 256], costs) == pytest.approx(slope)


def test_goals_are_held_against_the_median():
    assert at_least(Spread((1.0, 2.5, 9.0)), 2.0) == {"goal": "at least 2", "reached": "yes"}
    assert at_least(Spread((1.0, 1.5, 9.0)), 2.0) == {"goal": "at least 2", "reached": "no"}
    assert at_most(Spread((0.1, 0.13, 0.2)), 0.125) == {"goal": "at most 0.125", "reached": "no"}


def test_what_is_measured_once_is_not_called_a_median():
    assert "Medians" not in markdown([Table("Sweep", "Once.", [{"ratio": 1.2}])], {"cores": "2"}, 5)


def test_table_is_written_as_json_and_markdown(tmp_path):
    rows = [
        {"model": "a", "ours, tokens/s": Spread((1000.0, 12345.6, 20000.0)), "share": 0.04567, "goal": None},
        {"model": "b", "ours, tokens/s": Spread((1.0, 2.0, 3.0)), "share": 2e-5, "goal": "at least 2"},
    ]
    machine = {"processor": "one", "cores": "2"}
    tables = [Table("Whole step", "What was done.", rows)]
    text = write(tmp_path / "new", "step", tables, machine, OPTIONS)
    assert (tmp_path / "new" / "step.md").read_text() == text == markdown(tables, machine, 3)
    assert text.startswith("## Whole step\n\nWhat was done.\n\n| model | ours, tokens/s | share | goal |\n| --- |")
    assert "| a | 12,346 (1,000 to 20,000) | 0.0457 |  |" in text
    assert "| b | 2 (1 to 3) | 2e-05 | at least 2 |" in text
    assert "Medians of 3 repetitions" in text and text.endswith("- processor: one\n- cores: 2\n")
    content = json.loads((tmp_path / "new" / "step.json").read_text())
    assert content["benchmark"] == "step" and content["machine"] == machine and content["repetitions"] == 3
    assert content["tables"][0]["rows"][1] == {
        "model": "b",
        "ours, tokens/s": {"median": 2.0, "min": 1.0, "max": 3.0, "values": [1.0, 2.0, 3.0]},
        "share": 2e-5,
        "goal": "at least 2",
    }
