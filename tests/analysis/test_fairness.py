import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from harness.analysis.evidence import axis_sentences
from harness.analysis.fairness import Check, algorithm_differences, checks, unequal_sentences
from harness.analysis.page import write_report
from harness.analysis.sweep import Sweep, read_sweep
from tests.analysis.synthetic import Cell, write_sweep


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.what: check for check in found}


def test_a_fair_sweep_passes_every_check(sweep: Sweep) -> None:
    assert [check.what for check in checks(sweep) if not check.equal] == ["tuning trials"]  # it was not tuned
    assert unequal_sentences(sweep) == []


def test_other_initial_weights_are_found(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 0)]
    root = write_sweep(tmp_path / "sweep", cells)
    file = root / cells[1].name / "run.json"
    run = json.loads(file.read_text())
    run["provenance"]["initial_weights"] = "others"
    file.write_text(json.dumps(run))
    unlike = read_sweep(root)
    found = by_name(checks(unlike))["initial weights of tiny_dense"]
    assert not found.equal
    assert "others" in found.detail
    (said,) = write_report(unlike, tmp_path / "report").headlines[:1]
    assert said == "Not compared on equal terms, since runs differ in initial weights of tiny_dense."


def test_nothing_is_said_to_be_unequal_before_a_run_has_begun(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_dense", 0, status="planned", steps=0)])
    assert unequal_sentences(read_sweep(root)) == []


def test_a_plugin_that_was_edited_between_runs_is_found(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 0), Cell("gspo", "tiny_dense", 1)]
    root = write_sweep(tmp_path / "sweep", cells)
    read = [{"mine": "aaa", "rows.jsonl": "ccc"}, {"rows.jsonl": "ccc"}, {"mine": "bbb", "rows.jsonl": "ccc"}]
    for cell, inputs in zip(cells, read, strict=True):
        file = root / cell.name / "run.json"
        run = json.loads(file.read_text())
        run["provenance"]["inputs"] = inputs
        file.write_text(json.dumps(run))
    found = by_name(checks(read_sweep(root)))
    assert found["content of rows.jsonl"] == Check("content of rows.jsonl", True, "ccc")
    assert found["content of mine"] == Check("content of mine", False, "aaa, bbb")


def test_a_setting_that_should_be_equal_is_named_with_its_values(tmp_path: Path) -> None:
    warm = {"rollout": {"engine": "embedded", "completions_per_batch": 256, "temperature": 0.7}}
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 0, config=warm)]
    found = by_name(checks(read_sweep(write_sweep(tmp_path / "sweep", cells))))
    assert found["rollout settings"] == Check("rollout settings", False, "rollout.temperature: 1 against 0.7")
    assert found["budget settings"].equal


def test_of_the_limits_that_were_equal_the_one_in_force_is_told(sweep: Sweep) -> None:
    assert by_name(checks(sweep))["budget settings"] == Check(
        "budget settings", True, "axis: flops; limits.flops: 1e+12"
    )


def test_limits_that_differ_are_all_told(tmp_path: Path) -> None:
    budget = {"budget": {"axis": "flops", "limits": {"flops": 1e12, "updates": 300.0}}}
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 0, config=budget)]
    found = by_name(checks(read_sweep(write_sweep(tmp_path / "sweep", cells))))["budget settings"]
    assert found == Check("budget settings", False, "budget.limits.updates: 200 against 300")


def test_different_seeds_are_not_the_same_prompts(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 1)]
    assert not by_name(checks(read_sweep(write_sweep(tmp_path / "sweep", cells))))["seeds on tiny_dense"].equal


def test_only_settings_that_differ_stand_side_by_side(sweep: Sweep) -> None:
    frame = algorithm_differences(sweep).frame.set_index("setting")
    assert frame.loc["routing_replay"].to_dict() == {
        "ppo": "disabled", "grpo": "disabled", "grpo_replay": "R2", "gspo": "disabled",
    }  # fmt: skip
    assert frame.loc["completions_per_prompt", "ppo"] == "1"
    assert frame.loc["critic.learning_rate", "ppo"] == "0.001"
    assert "minibatches" not in frame.index


def test_of_many_algorithms_what_is_unusual_of_each_is_told(tmp_path: Path) -> None:
    names = [f"a{number}" for number in range(9)]
    usual = {"surrogate": {"name": "clip", "clip_low": 0.2}, "minibatches": 8}
    cells = [Cell(name, "tiny_dense", 0, config={"algorithm": {"name": name, **usual}}) for name in names]
    cells[3].config["algorithm"] = {"name": "a3", "surrogate": {"name": "plain"}, "minibatches": 1}
    table = algorithm_differences(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    assert table.header == ["algorithm", "unlike most"] and [line[0] for line in table.rows] == names
    assert table.rows[3][1] == "surrogate.name: plain; surrogate.clip_low: –; minibatches: 1"
    assert {line[1] for line in table.rows if line[0] != "a3"} == {"–"}
    assert table.remarks == ["Most have surrogate.name: clip; surrogate.clip_low: 0.2; minibatches: 8."]
    assert list(table.frame) == ["setting", *names] and len(table.frame) == 3


def test_other_package_versions_are_found(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0), Cell("ppo", "tiny_dense", 0)]
    root = write_sweep(tmp_path / "sweep", cells)
    file = root / cells[1].name / "run.json"
    run = json.loads(file.read_text())
    run["provenance"]["packages"]["torch"] = "9.9.9"
    file.write_text(json.dumps(run))
    found = by_name(checks(read_sweep(root)))["package versions"]
    assert not found.equal and found.detail == "torch: 2.13.0 against 9.9.9"


def _slower(sweep: Sweep, slow: pd.Series) -> Sweep:
    seconds = sweep.cells["seconds/update"].where(~slow, 1.5 * sweep.cells["seconds/update"])
    return replace(sweep, cells=sweep.cells.assign(**{"seconds/update": seconds}))


def test_seconds_are_doubted_where_the_same_work_took_one_run_much_longer(sweep: Sweep) -> None:
    alike = [check for check in checks(sweep) if check.what.startswith("speed of the machine")]
    assert [check.equal for check in alike] == [True, True]
    gspo = (sweep.cells["variant"] == "gspo") & (sweep.cells["setting"] == "tiny_moe")
    # A whole variant may share less of what its sequences begin with than others do.
    assert all(check.equal for check in checks(_slower(sweep, gspo)) if check.what.startswith("speed of the machine"))
    doubted = _slower(sweep, gspo & (sweep.cells["seed"] == 1))
    dense, moe = (check for check in checks(doubted) if check.what.startswith("speed of the machine"))
    assert dense.equal and not moe.equal and "seconds say as much of what else the machine did" in moe.detail
    said = axis_sentences(doubted)
    assert said[-1].startswith("Device seconds tell little here")
    assert not any("device seconds" in sentence for sentence in said[:-1])
