import shutil
from pathlib import Path

import pandas as pd
import pytest

from harness.analysis.evidence import headline_verdicts
from harness.analysis.sweep import Sweep, cut_at_limit, read_sweep
from harness.errors import ConfigError
from tests.analysis.synthetic import LIMIT, Cell, write_sweep


def test_curves_end_at_the_budgets_limit() -> None:
    runs = pd.DataFrame({"budget/tokens": [40.0, 80.0, 100.0, 101.0], "budget_limit": 100.0, "step": [1, 2, 3, 4]})
    assert cut_at_limit(runs, "tokens")["step"].tolist() == [1, 2, 3]


def test_a_sweep_is_cut_and_keeps_its_cells_without_metrics(sweep: Sweep) -> None:
    assert sweep.runs["budget/flops"].max() <= LIMIT
    assert sweep.runs["step"].max() == 40
    assert len(sweep.cells) == 24


def test_order_is_that_of_the_plan(sweep: Sweep) -> None:
    assert sweep.variants == ["ppo", "grpo", "grpo_replay", "gspo"]
    assert sweep.settings == ["tiny_dense", "tiny_moe"]


def test_a_searched_learning_rate_is_never_averaged_over(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", seed, learning_rate=rate) for rate in (1e-4, 2e-4) for seed in (0, 1)]
    found = read_sweep(write_sweep(tmp_path / "sweep", [*cells, Cell("ppo", "tiny_dense", 0)]))
    assert found.variants == ["gspo learning_rate=0.0001", "gspo learning_rate=0.0002", "ppo"]


def test_planned_cells_whose_settings_are_lost_are_in_no_comparison(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", seed, learning_rate=rate) for rate in (1e-4, 2e-4) for seed in range(4)]
    folder = write_sweep(tmp_path / "sweep", cells)
    for lost in (cells[3], cells[7]):  # of one seed
        shutil.rmtree(folder / lost.name)
    found = read_sweep(folder)
    assert found.cells["status"].value_counts().to_dict() == {"done": 6, "planned": 2}
    assert set(found.compared["status"]) == {"done"}
    assert [(one.first, one.second) for one in headline_verdicts(found)] == [
        ("gspo learning_rate=0.0001", "gspo learning_rate=0.0002")
    ]


def test_another_citation_makes_no_variant_and_a_part_is_called_by_its_kind(tmp_path: Path) -> None:
    kinds = ("token", "sequence")
    cells = [
        Cell("gspo", "tiny_dense", seed, config={"algorithm": {"source": f"paper {seed}", "ratio": {"name": kind}}})
        for kind in kinds
        for seed in (0, 1)
    ]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    assert found.variants == [f"gspo ratio.name={kind}" for kind in kinds]


def test_two_runs_of_one_cell_are_named(tmp_path: Path) -> None:
    cell = Cell("gspo", "tiny_dense", 0)
    folder = write_sweep(tmp_path / "sweep", [cell, Cell("grpo", "tiny_dense", 0)])
    shutil.copytree(folder / cell.name, folder / f"{cell.name}_copy")
    with pytest.raises(ConfigError, match=f"{cell.name} and {cell.name}_copy are runs of one cell, {cell.label}: move"):
        read_sweep(folder)


def test_runs_whose_settings_are_lost_are_not_taken_for_one_cell(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0, learning_rate=rate) for rate in (1e-4, 2e-4)]
    folder = write_sweep(tmp_path / "sweep", cells)
    for cell in cells:
        (folder / cell.name / "config.yaml").write_bytes(b"\xff")
    assert read_sweep(folder).cells["reason"].str.startswith("config.yaml cannot be read").all()


def test_a_learning_rate_chosen_per_model_makes_no_variants(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0, learning_rate=1e-4), Cell("gspo", "tiny_moe", 0, learning_rate=2e-4)]
    assert read_sweep(write_sweep(tmp_path / "sweep", cells)).variants == ["gspo"]


def test_two_tasks_are_two_settings(tmp_path: Path) -> None:
    other = {"task": {"name": "products"}}
    cells = [Cell("gspo", "tiny_dense", 0), Cell("gspo", "tiny_dense", 1, config=other, task="products")]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    assert found.settings == ["tiny_dense/chain_sum", "tiny_dense/products"]
