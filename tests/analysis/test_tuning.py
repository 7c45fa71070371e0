"""What the report says of tuning."""

from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.style import figure_style
from harness.analysis.sweep import Sweep, read_sweep
from harness.analysis.tuning import sensitivity, tuning_sensitivity, tuning_summary, tuning_trials
from harness.analysis.view import viewed
from harness.runs.directory import RunDirectory
from tests.analysis.synthetic import Cell, trial, write_sweep

_RATES = (1e-4, 2e-4, 4e-4)


@pytest.fixture
def tuned(tmp_path) -> Sweep:
    """gspo is best at the middle rate, by little; ppo diverges at the largest."""
    folder = write_sweep(tmp_path / "s", [trial("gspo", None, 2e-4, seed=0), trial("ppo", None, 1e-4, seed=0)])
    cells = []
    for seed in (1000, 1001):
        for number, rate in enumerate(_RATES):
            cells.append(trial("gspo", number, rate, seed, gain=(0.20, 0.21, 0.05)[number]))
            lost = {"status": "diverged", "steps": 10} if number == 2 else {}
            cells.append(trial("ppo", number, rate, seed, gain=(0.3, 0.1, 0.0)[number], **lost))
    write_sweep(folder / "trials", cells)
    return read_sweep(folder)


def test_every_trial_is_told_with_its_settings_and_which_was_chosen(tuned: Sweep) -> None:
    frame = tuning_trials(tuned).frame
    assert list(frame["algorithm"]) == ["gspo"] * 3 + ["ppo"] * 3
    assert list(frame["learning_rate"]) == [*_RATES, *_RATES]
    assert list(frame["runs"]) == [2] * 6
    assert list(frame["chosen"]) == ["", "chosen", "", "chosen", "", ""]
    assert list(frame)[list(frame).index("score") + 1] == "chosen"  # what the reader looks for is in sight
    assert np.isneginf(frame["score"].iloc[-1]) and np.isfinite(frame["score"].iloc[:-1]).all()
    assert (frame["flops"].iloc[0] > 1.9e12) and (frame["lowest"] <= frame["highest"]).all()


def test_sensitivity_counts_the_trials_that_are_as_good_as_the_best(tuned: Sweep) -> None:
    frame = tuning_sensitivity(tuned).frame.set_index("algorithm")
    assert frame["within margin"].to_dict() == {"gspo": 2, "ppo": 1}
    assert frame["went wrong"].to_dict() == {"gspo": 0, "ppo": 1}
    assert np.isneginf(frame.loc["ppo", "worst"])


def test_the_figure_draws_every_run_of_every_trial(tuned: Sweep) -> None:
    with figure_style():
        drawing = sensitivity(tuned)
    assert drawing is not None
    assert len(drawing.data) == 12 and drawing.data["chosen"].sum() == 4
    assert "seeds 1000, 1001" in drawing.caption
    (panel,) = drawing.figure.axes
    assert panel.get_xscale() == "log" and panel.get_xlabel() == "Learning rate"


def test_a_choice_at_the_end_of_what_was_tried_is_told(tuned: Sweep) -> None:
    alike, how = tuning_summary(tuned)
    assert alike  # gspo took the middle one
    assert how.endswith("the smallest learning rate that was tried is the best of ppo on tiny_dense")


def test_trials_that_all_failed_before_a_step_are_told(tmp_path) -> None:
    folder = write_sweep(tmp_path / "s", [trial("gspo", None, 2e-4, seed=0, status="skipped", steps=0)])
    lost = [trial("gspo", number, rate, status="failed", steps=0) for number, rate in enumerate(_RATES)]
    for directory in write_sweep(folder / "trials", lost).glob("gspo-*"):
        run = RunDirectory(directory)
        run.update_status(budget={key: run.read_status()["budget"][key] for key in ("axis", "limit")})
    sweep = read_sweep(folder)
    assert tuning_summary(sweep)[1].endswith("0 FLOP (flops) a run on average; the best by mean training reward")
    assert tuning_trials(sweep).frame[["flops", "chosen"]].values.tolist() == [[0.0, ""]] * 3
    with figure_style():
        drawing = sensitivity(sweep)
    assert drawing is not None and "×: a run that diverged or failed" in drawing.caption


def test_trials_are_found_for_the_cells_of_one_task_of_several(tmp_path) -> None:
    tasks = ("chain_sum", "products")
    folder = write_sweep(tmp_path / "s", [replace(trial("gspo", None, 2e-4, 0), task=task) for task in tasks])
    write_sweep(
        folder / "trials",
        [replace(trial("gspo", n, rate, gain=0.1), task=task) for task in tasks for n, rate in enumerate((2e-4, 4e-4))],
    )
    for filters in ([], ["task=chain_sum"], ["seed=0"]):
        sweep = viewed(read_sweep(folder), filters=filters)
        assert tuning_summary(sweep)[1].startswith("2 trials of each algorithm on each model"), filters
        assert set(tuning_trials(sweep).frame["model"]) == set(sweep.cells["setting"]), filters


def test_a_sweep_that_was_not_tuned_has_nothing_to_tell(tmp_path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "s", [Cell("gspo", "tiny_dense", 0)]))
    assert tuning_trials(sweep).frame.empty and tuning_sensitivity(sweep).frame.empty and sensitivity(sweep) is None
