import json
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from harness.errors import ConfigError
from harness.runs import compact, load_cells, load_evaluations, load_runs, load_samples
from harness.status import read_cells
from tests.analysis.synthetic import LIMIT, Cell, comparison, write_cell, write_sweep

CELLS = [
    Cell("gspo", "tiny_moe", 0),
    Cell("grpo_replay", "tiny_dense", 1, status="skipped", reason="nothing to replay", steps=0),
]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", CELLS)


def test_there_is_one_row_per_run_and_step_with_its_identity(sweep: Path) -> None:
    runs = load_runs(sweep)
    trained = runs[runs["algorithm"] == "gspo"]
    assert trained["step"].tolist() == list(range(1, 43))
    first = trained.iloc[0]
    assert first[["run", "label", "model", "task", "seed", "status"]].tolist() == [
        CELLS[0].name, "gspo-tiny_moe-chain_sum-s0", "tiny_moe", "chain_sum", 0, "done",
    ]  # fmt: skip
    assert (first["sweep"], first["budget_axis"], first["budget_limit"]) == ("synthetic", "flops", LIMIT)
    assert first["budget/updates"] == 4


def test_a_cell_without_metrics_has_one_row_without_a_step(sweep: Path) -> None:
    skipped = load_runs(sweep).query("status == 'skipped'")
    assert len(skipped) == 1
    assert skipped["step"].isna().all()
    assert skipped["reason"].tolist() == ["nothing to replay"]


def test_a_torn_last_line_is_left_out(sweep: Path) -> None:
    file = sweep / CELLS[0].name / "metrics.jsonl"
    with file.open("a") as open_file:
        open_file.write('{"step": 43, "reward/me')
    assert load_runs(sweep)["step"].max() == 42


def test_a_broken_line_inside_a_file_is_named(sweep: Path) -> None:
    file = sweep / CELLS[0].name / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], '{"step": 4, "rew', *lines[4:]]) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 4 "):
        load_runs(sweep)


def test_null_reads_as_nan_in_a_numeric_column(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Cell("ppo", "tiny_dense", 0, status="diverged", steps=1)])
    runs = load_runs(sweep)
    assert runs["loss"].isna().tolist() == [True]
    assert pd.api.types.is_float_dtype(runs["loss"])


def test_a_cell_of_the_plan_that_has_not_begun_is_planned(sweep: Path) -> None:
    plan = json.loads((sweep / "sweep.json").read_text())
    plan["cells"].append("dapo.v2-tiny_moe-chain_sum-s11-0a1b2c3d")
    (sweep / "sweep.json").write_text(json.dumps(plan))
    last = load_cells(sweep).iloc[-1]
    assert last[["algorithm", "model", "task", "seed", "hash", "status"]].tolist() == [
        "dapo.v2", "tiny_moe", "chain_sum", 11, "0a1b2c3d", "planned",
    ]  # fmt: skip


def test_a_directory_that_is_only_being_set_up_disturbs_nothing(sweep: Path) -> None:
    before = load_runs(sweep)
    (sweep / "new-tiny_moe-chain_sum-s0-00000000").mkdir()
    (sweep / "report" / "figures").mkdir(parents=True)
    (sweep / CELLS[0].name / "config.yaml").write_text("algorithm: {name: gs")  # half written
    assert load_runs(sweep)["step"].equals(before["step"])


def test_cells_tell_cost_scores_and_provenance(sweep: Path) -> None:
    cell = load_cells(sweep).iloc[0]
    assert cell["spent/updates"] == 168
    assert cell["overshoot"] == pytest.approx(42 / 40.5 - 1)
    assert cell["flops/update"] == pytest.approx(0.55 * LIMIT * 42 / 40.5)
    assert 0 < cell["score/held_out"] < 1 and cell["n/held_out"] == 256
    assert cell["initial_weights"] == "weights of tiny_moe"
    assert cell["learning_rate"] == 3e-4
    assert cell["config"]["rollout"]["completions_per_batch"] == 256
    assert cell["packages"] == {"torch": "2.13.0", "pandas": "3.1.1"}


def test_evaluations_keep_the_training_task_apart_from_the_evaluation_task(sweep: Path) -> None:
    evaluations = load_evaluations(sweep)
    assert len(evaluations) == 9
    assert set(evaluations["task"]) == {"chain_sum"}
    assert set(evaluations["eval_task"]) == {"held_out", "longer", "signed"}


def test_one_run_directory_can_be_read_by_itself(sweep: Path) -> None:
    assert load_runs(sweep / CELLS[0].name)["step"].tolist() == list(range(1, 43))


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_path_without_runs_says_what_to_give(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="give a sweep folder"):
        load_runs(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b'{"status":', b"[1]", b"\x80\x81"])
@pytest.mark.parametrize("name", ["sweep.json", "{}/run.json", "{}/metrics.jsonl"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_sweep(tmp_path / "sweep", comparison())
    file = folder / name.format(CELLS[0].name)
    file.write_bytes(content + b"\n")
    for read in (load_runs, read_cells):
        with pytest.raises(ConfigError, match=rf"{file}.* is damaged .*: remove (it,|its run directory) and"):
            read(folder)


def test_a_run_that_lost_files_says_so_in_its_reason(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", comparison())
    first, second, third, *_ = (cell.name for cell in comparison() if cell.status == "done")
    (folder / first / "evaluations.jsonl").unlink()
    (folder / third / "config.yaml").write_text("a: [")
    (folder / second / "metrics.jsonl").unlink()
    reasons = load_cells(folder).query("status == 'done'").set_index("run")["reason"].dropna()
    assert reasons.to_dict() == {
        first: "evaluations.jsonl lost: remove its run directory and run the cell again",
        second: "metrics.jsonl lost: remove its run directory and run the cell again",
        third: "config.yaml cannot be read: remove its run directory and run the cell again",
    }


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_run_that_lost_lines_says_so_in_its_reason(sweep: Path, name: str, kept: int) -> None:
    file = sweep / CELLS[0].name / name
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    reason = load_cells(sweep)["reason"][0]
    assert reason == f"{name} is not whole: remove its run directory and run the cell again"


def test_the_compact_form_reads_as_the_sweep_does(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", comparison())
    small = compact(sweep, tmp_path / "compact")
    for load in (load_runs, load_evaluations, load_samples, load_cells):
        assert_frame_equal(load(small), load(sweep))


def test_the_compact_form_holds_no_weights_and_no_logs(sweep: Path, tmp_path: Path) -> None:
    run = sweep / CELLS[0].name
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "state.pt").write_bytes(b"weights")
    (run / "log.txt").write_text("log")
    small = compact(sweep, tmp_path / "compact")
    assert {file.name for file in small.rglob("*") if file.is_file()} == {
        "sweep.json", "metrics.parquet", "evaluations.parquet", "samples.jsonl", "run.json", "config.yaml",
    }  # fmt: skip


def test_the_compact_form_is_brought_up_to_date_by_the_same_sweep(sweep: Path, tmp_path: Path) -> None:
    compact(sweep, tmp_path / "compact")
    write_cell(sweep, Cell("gspo", "tiny_moe", 1))
    assert load_runs(compact(sweep, tmp_path / "compact"))["run"].nunique() == 3


def test_a_compact_form_with_runs_beside_its_tables_is_not_copied_without_them(sweep: Path, tmp_path: Path) -> None:
    small = compact(sweep, tmp_path / "compact")
    added = write_cell(small, Cell("gspo", "tiny_moe", 1)).name
    with pytest.raises(ConfigError, match=f"is a compact sweep, of whose tables {added} is no part: move"):
        compact(small, tmp_path / "again")


@pytest.mark.parametrize("key", ["equal", "code"])
def test_another_sweep_is_not_overwritten(sweep: Path, tmp_path: Path, key: str) -> None:
    compact(sweep, tmp_path / "compact")
    plan = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps({**plan, key: "other"}))
    with pytest.raises(ConfigError, match=f"another sweep .*{key} differs"):
        compact(sweep, tmp_path / "compact")


def test_runs_that_the_sweep_does_not_have_are_not_overwritten(sweep: Path, tmp_path: Path) -> None:
    other = write_sweep(tmp_path / "other", [Cell("ppo", "tiny_dense", 0)])
    compact(other, tmp_path / "compact")
    with pytest.raises(ConfigError, match="ppo-tiny_dense-chain_sum-s0"):
        compact(sweep, tmp_path / "compact")


def test_a_folder_of_something_else_is_not_written_to(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    other = write_sweep(tmp_path / "other", CELLS)
    for target in (tmp_path / "notes", other, sweep):
        before = sorted(target.rglob("*"))
        with pytest.raises(ConfigError, match="remove it first|give another folder"):
            compact(sweep, target)
        assert sorted(target.rglob("*")) == before
