from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from harness.analysis.sweep import Sweep, read_sweep
from harness.analysis.table import Table, markdown_text
from harness.analysis.tables import (
    budgets,
    clip_fractions,
    completion,
    completion_grid,
    expert_changes,
    final_scores,
    learning_rate_search,
    phases,
    rewards,
    samples,
    score_overview,
    verdict_table,
)
from tests.analysis.synthetic import Cell, write_sweep
from tests.analysis.toy import Run, headlined, row


def test_final_scores_stand_beside_the_cold_start(sweep: Sweep) -> None:
    found = row(final_scores(sweep), algorithm="grpo", model="tiny_dense", evaluation="longer")
    scores = sweep.cells.query("algorithm == 'grpo' and model == 'tiny_dense'")["score/longer"]
    assert (found["n"], found["mean"]) == (3, pytest.approx(scores.mean()))
    assert found["low"] < scores.min() and scores.max() < found["high"]  # three runs say little of their mean
    assert found["cold start"] == round(256 * 0.4) / 256
    assert found["change"] == pytest.approx(found["mean"] - found["cold start"])


def test_two_finished_runs_have_no_interval_in_the_overview(sweep: Sweep) -> None:
    table = score_overview(sweep)
    two, three = (row(table, model="tiny_dense", algorithm=name)["held_out"] for name in ("ppo", "grpo"))
    assert two.endswith("(n\xa0=\xa02)") and "[" not in two
    assert "[" in three


def test_the_overview_begins_with_the_cold_start_and_leaves_no_algorithm_out(sweep: Sweep) -> None:
    dense = [line for line in score_overview(sweep).rows if line[0] == "tiny_dense"]
    assert [line[1] for line in dense] == ["cold start", *sweep.variants]
    assert dense[0][2] == "0.551" and set(dense[3][2:]) == {"–"}  # replay was skipped


def test_the_budget_table_shows_all_axes_and_the_overshoot(sweep: Sweep) -> None:
    table = budgets(sweep)
    found = row(table, algorithm="ppo", model="tiny_moe")
    assert (found["queries"], found["updates"]) == (256 * 42, 168)
    assert found["largest overshoot"] == pytest.approx(42 / 40.5 - 1)
    assert "Equal axis: flops, limit 1 TFLOP" in table.note


def test_shares_of_phases_add_up(sweep: Sweep) -> None:
    frame = phases(sweep).frame
    for cost in ("flops", "seconds"):
        assert frame.filter(like=f"{cost} ").sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert row(phases(sweep), algorithm="ppo", model="tiny_dense")["flops critic"] == pytest.approx(0.3)


def test_clip_fractions_are_held_against_the_smallest_of_the_model(sweep: Sweep) -> None:
    table = clip_fractions(sweep)
    for model, smallest in (("tiny_dense", "grpo"), ("tiny_moe", "grpo_replay")):
        base = row(table, algorithm=smallest, model=model)
        found = row(table, algorithm="gspo", model=model)
        assert base["times the smallest"] == 1
        assert found["times the smallest"] == pytest.approx(found["token"] / base["token"])
    assert row(table, algorithm="grpo", model="tiny_dense")["steps at 0"] == pytest.approx(0.1)


def test_expert_change_is_only_of_models_with_experts(sweep: Sweep) -> None:
    table = expert_changes(sweep)
    assert set(table.frame["model"]) == {"tiny_moe"}
    assert row(table, algorithm="grpo_replay")["used in its steps"] == 0
    assert row(table, algorithm="grpo_replay")["choices changed"] > 0.01


def test_every_cell_is_in_the_completion_table_with_its_reason(sweep: Sweep) -> None:
    frame = completion(sweep).frame
    assert len(frame) == 24
    assert frame["status"].value_counts().to_dict() == {
        "done": 18, "skipped": 3, "failed": 1, "diverged": 1, "interrupted": 1,
    }  # fmt: skip
    assert frame[frame["status"] == "diverged"]["reason"].tolist() == ["the loss is nan at step 17"]


def test_the_true_reward_stands_beside_the_one_trained_on_by_task(tmp_path: Path) -> None:
    cells = [
        Cell("gspo", "tiny_dense", seed, task=task, misled=bias, step_reward=task == "steps")
        for task, bias in (("biased", 0.4), ("steps", 0.0))
        for seed in range(3)
    ]
    table = rewards(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    biased, steps = row(table, model="tiny_dense/biased"), row(table, model="tiny_dense/steps")
    gap = 0.4 * sum(range(1, 41)) / 40 / 40.5  # it grows from 0, over the 40 steps within the limit
    assert biased["training reward"] - biased["true reward"] == pytest.approx(gap)
    assert biased["low"] <= biased["true reward"] <= biased["high"] < biased["training reward"]
    assert steps["training reward"] == steps["true reward"]
    assert steps["intermediate steps"] == pytest.approx(1 - 0.3 * (1 - steps["true reward"]))
    assert np.isnan(biased["intermediate steps"])


def test_there_is_no_table_of_rewards_where_they_are_all_the_same(sweep: Sweep) -> None:
    assert rewards(sweep).frame.empty


def test_there_is_no_search_table_without_a_search(sweep: Sweep) -> None:
    assert learning_rate_search(sweep).frame.empty


def test_a_learning_rate_that_diverged_cannot_win(tmp_path: Path) -> None:
    gains = {1e-4: 0.1, 2e-4: 0.3, 8e-4: 0.9}
    cells = [
        Cell("gspo", model, seed, learning_rate=rate, gain=gain)
        for rate, gain in gains.items()
        for model in ("tiny_dense", "tiny_moe")
        for seed in (0, 1)
    ]
    cells[-1].status, cells[-1].steps = "diverged", 30
    table = learning_rate_search(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    frame = table.frame.set_index("learning_rate")
    assert frame["best"].to_dict() == {1e-4: "", 2e-4: "best", 8e-4: ""}
    assert frame.loc[8e-4, "tiny_moe"] == -np.inf
    assert frame.loc[8e-4, "tiny_dense"] > frame.loc[2e-4, "tiny_dense"]
    assert "went wrong" in table.rows[-1]


def test_a_model_that_declines_an_algorithm_does_not_keep_it_from_a_best_rate(tmp_path: Path) -> None:
    cells = [Cell("r2", "tiny_moe", 0, learning_rate=rate, gain=1e3 * rate) for rate in (1e-4, 2e-4)]
    cells += [Cell("r2", "tiny_dense", 0, "skipped", "no routers", rate, steps=0) for rate in (1e-4, 2e-4)]
    cells += [Cell("gspo", "tiny_dense", 0, learning_rate=rate) for rate in (1e-4, 2e-4)]
    frame = learning_rate_search(read_sweep(write_sweep(tmp_path / "sweep", cells))).frame.set_index("algorithm")
    assert frame.loc["r2", "best"].tolist() == ["", "best"]


def test_a_learning_rate_with_runs_to_do_is_not_judged(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", seed, learning_rate=rate) for rate in (1e-4, 2e-4) for seed in (0, 1)]
    cells[-1].status, cells[-1].steps = "interrupted", 20
    frame = learning_rate_search(read_sweep(write_sweep(tmp_path / "sweep", cells))).frame.set_index("learning_rate")
    assert np.isnan(frame.loc[2e-4, "average"])
    assert frame.loc[1e-4, "best"] == "best"


def test_text_cannot_break_out_of_a_markdown_table() -> None:
    table = Table("x", "X", "", pd.DataFrame({"reason": ["a | b\n<script>`rm`"]}))
    assert table.markdown().splitlines()[-1] == "| a \\| b &lt;script&gt;\\`rm\\` |"


@pytest.mark.parametrize(
    "text", ["![x](http://host/y.png)", "[x](http://host)", "*loud* ~gone~ $x$", "_a_ __b__ c_d_", "a\\*b"]
)
def test_text_is_no_markup_of_markdowns_own(text: str) -> None:
    shown = MarkdownIt("commonmark").enable("strikethrough").renderInline(markdown_text(text))
    assert shown == text


def test_underscores_inside_of_words_stay_as_they_are() -> None:
    assert markdown_text("grpo_routing_replay of _mine") == "grpo_routing_replay of \\_mine"


def test_numbers_have_no_exponent_below_a_hundred_thousand() -> None:
    frame = pd.DataFrame({"budget": [999.4, 999.6, 1800.0, 99_999.0, 1e5, 0.01234]})
    assert [cell for (cell,) in Table("x", "X", "", frame).rows] == [
        "999",
        "1,000",
        "1,800",
        "99,999",
        "1e+05",
        "0.0123",
    ]


def test_runs_that_went_wrong_are_counted_beside_their_verdict() -> None:
    runs = [Run(name, seed, [0.2, 0.5 + 0.1 * (name == "a")], [0, 10]) for name in "ab" for seed in range(4)]
    runs[5] = replace(runs[5], status="diverged")
    assert row(verdict_table(headlined(runs)), first="a", second="b")["went wrong"] == 1
    sound = [replace(run, status="done") for run in runs]
    assert "went wrong" not in verdict_table(headlined(sound)).frame


def test_pairs_that_are_all_too_few_on_a_model_are_counted_below_the_verdicts() -> None:
    ends = [0.5, 0.6, 0.55, 0.65]
    runs = [
        Run(name, seed, [0.2, end + 0.2 * (name == "a")], [0, 10], setting=model)
        for name in "ab"
        for model, seeds in (("large", ends), ("small", ends[:2]))
        for seed, end in enumerate(seeds)
    ]
    table = verdict_table(headlined(runs))
    assert [line[0] for line in table.rows] == ["large"] and len(table.frame) == 2
    assert table.remarks == [
        "small: all pairs of algorithms (1) are left out here, for a verdict takes 4 pairs of runs, and none has more "
        "than 2; the CSV has their differences."
    ]


def test_cells_sort_by_every_digit_and_know_what_is_absent() -> None:
    frame = pd.DataFrame({"number": [1 / 3, -np.inf, np.nan], "text": ["a", None, "–"], "flag": [True, False, True]})
    table = Table("x", "X", "", frame)
    assert table.rows[0] == ["0.333", "a", "yes"]
    assert table.sort_keys == [["0.3333333333333333", None, None], ["-Infinity", "", None], ["", "", None]]


def test_a_column_of_numbers_may_have_words_in_it() -> None:
    frame = pd.DataFrame({"seeds": [3, "over 1,000"], "flag": [True, False], "text": ["a", "7"]})
    assert Table("x", "X", "", frame).numeric == [True, False, False]


def test_the_grid_has_every_seed_and_every_reason(sweep: Sweep) -> None:
    table = completion_grid(sweep)
    assert len(table.frame) == 8 and table.header[2:5] == ["seed 0", "seed 1", "seed 2"]
    failed = row(table, algorithm="ppo", model="tiny_dense")
    assert failed["seed 1"] == "failed" and failed["seed 0"] == "done"
    assert "Failed: ppo on tiny_dense (seed 1): RuntimeError: <b>out of memory</b>" in table.remarks
    skipped = "grpo_replay on tiny_dense (seeds 0, 1, 2): tiny_dense has no routers, so nothing to replay"
    assert f"Skipped: {skipped}" in table.remarks


def test_a_reason_that_several_share_is_given_once(tmp_path: Path) -> None:
    cells = [
        Cell(name, "tiny_dense", seed, "skipped", "no routers", steps=0) for name in ("r2", "r3") for seed in (0, 1)
    ]
    table = completion_grid(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    assert table.remarks == ["Skipped: r2 on tiny_dense (seeds 0, 1), r3 on tiny_dense (seeds 0, 1): no routers"]


def test_samples_are_of_the_first_the_middle_and_the_last_point(sweep: Sweep) -> None:
    points = [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = [
        {"run": run, "variant": "gspo", "setting": "tiny_moe", "fraction": point, "prompt": f"{point} {number}"}
        for run in ("first", "second")
        for point in points
        for number in range(4)
    ]
    columns = ["run", "variant", "setting", "fraction", "prompt", "completion", "answer", "reward"]
    frame = samples(replace(sweep, samples=pd.DataFrame(rows, columns=columns))).frame
    assert frame["prompt"].tolist() == ["0.0 0", "0.0 1", "0.5 0", "0.5 1", "1.0 0", "1.0 1"]


def test_a_part_is_displayed_with_its_remarks_and_the_csv_keeps_all(tmp_path: Path) -> None:
    frame = pd.DataFrame({"value": [1, 2], "reason": ["", "*none*"]})
    table = Table("x", "X", "A note.", frame, part=frame[["value"]].head(1), remarks=["2: *none*"])
    assert (table.header, table.rows, table.numeric, table.sort_keys) == (["value"], [["1"]], [True], [["1.0"]])
    assert table.markdown() == "| value |\n| --- |\n| 1 |\n\n- 2: \\*none\\*\n"
    assert replace(table, part=frame.head(0)).markdown() == "- 2: \\*none\\*\n"
    table.save(tmp_path)
    assert (tmp_path / "x.csv").read_text() == "value,reason\n1,\n2,*none*\n"


def test_the_csv_keeps_every_digit(tmp_path: Path) -> None:
    Table("x", "X", "", pd.DataFrame({"value": [1 / 3]})).save(tmp_path)
    assert (tmp_path / "x.csv").read_text() == "value\n0.3333333333333333\n"
    assert "0.333 |" in (tmp_path / "x.md").read_text()


def test_many_algorithms_are_listed_in_the_order_of_their_scores(tmp_path: Path) -> None:
    names = [f"a{place:02}" for place in range(12)]
    cells = [Cell(name, "tiny_dense", seed, gain=0.3 * int(name[1:])) for name in names for seed in range(8)]
    cells.append(Cell("none", "tiny_dense", 0, status="skipped", steps=0))
    crowd = read_sweep(write_sweep(tmp_path / "sweep", cells))
    assert [line[1] for line in score_overview(crowd).rows] == ["cold start", *names[::-1], "none"]
    against = verdict_table(replace(crowd, baseline="a05"))
    assert list(against.frame["first"]) == [name for name in names[::-1] if name != "a05"]
