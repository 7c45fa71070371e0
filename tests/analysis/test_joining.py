import json
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.joining import join
from harness.analysis.sweep import Sweep, read_sweep
from harness.errors import ConfigError
from tests.analysis.synthetic import Cell, write_sweep

SEEDS = (0, 1)


def sweep_of(root: Path, algorithm: str, model: str = "tiny_dense", config: dict[str, Any] | None = None) -> Sweep:
    return read_sweep(write_sweep(root, [Cell(algorithm, model, seed, config=config or {}) for seed in SEEDS]))


def record(root: Path, key: str, value: str) -> Sweep:
    """Change what every run says of its provenance."""
    for file in root.glob("*/run.json"):
        run = json.loads(file.read_text())
        run["provenance"][key] = value
        file.write_text(json.dumps(run))
    return read_sweep(root)


def test_algorithms_of_two_sweeps_stand_side_by_side(tmp_path: Path) -> None:
    grpo, gspo = sweep_of(tmp_path / "a", "grpo"), sweep_of(tmp_path / "b", "gspo", model="tiny_moe")
    joined = join([grpo, gspo])
    assert joined.variants == ["grpo", "gspo"] and joined.settings == ["tiny_dense", "tiny_moe"]
    assert (joined.paths, joined.name) == ([tmp_path / "a", tmp_path / "b"], "synthetic + synthetic")
    assert len(joined.runs) == len(grpo.runs) + len(gspo.runs) and len(joined.samples) == 8
    assert joined.evaluations.groupby("variant").size().to_dict() == {"grpo": 18, "gspo": 18}


def test_an_algorithm_with_other_settings_elsewhere_is_a_variant(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-4), ("b", 2e-4)):
        write_sweep(tmp_path / name, [Cell("gspo", "tiny_dense", 0, learning_rate=rate)])
    joined = join([read_sweep(tmp_path / "a"), read_sweep(tmp_path / "b")])
    assert joined.variants == ["gspo learning_rate=0.0001", "gspo learning_rate=0.0002"]


def test_tasks_of_two_sweeps_are_settings(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_dense", 0), Cell("gspo", "tiny_dense", 0, task="products")]
    cells[1].config = {"task": {"name": "products"}}
    parts = [read_sweep(write_sweep(tmp_path / cell.task, [cell])) for cell in cells]
    assert join(parts).settings == ["tiny_dense/chain_sum", "tiny_dense/products"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            {"budget": {"axis": "tokens", "limits": {"tokens": 1e6}}},
            r"budget settings \(budget.axis: flops against tokens;",
        ),
        ({"rollout": {"temperature": 0.7}}, r"rollout.temperature: 1 against 0.7"),
        ({"evaluation": {"limit": 64}}, r"evaluation.limit: 256 against 64"),
        ({"device": "cuda"}, r"device: cpu against cuda"),
        (
            {"model": {"name": "tiny_dense", "path": "elsewhere"}},
            r"model settings of tiny_dense \(model.path: none against els",
        ),
        ({"task": {"name": "chain_sum", "prompt": "?"}}, r"settings of task chain_sum \(task.prompt: "),
    ],
)
def test_other_settings_under_which_runs_are_not_comparable(tmp_path: Path, other: dict, reason: str) -> None:
    first, second = sweep_of(tmp_path / "a", "grpo"), sweep_of(tmp_path / "b", "gspo", config=other)
    with pytest.raises(ConfigError, match=reason) as error:
        join([first, second])
    assert f"{tmp_path}/a and {tmp_path}/b cannot be joined" in str(error.value)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("initial_weights", r"initial weights of tiny_dense \(weights of tiny_dense, changed\)"),
        ("code", r"code that affects numbers \(abc123, changed\)"),
        ("device", r"device model \(cpu, changed\)"),
    ],
)
def test_other_origins_of_the_numbers(tmp_path: Path, key: str, reason: str) -> None:
    first = sweep_of(tmp_path / "a", "grpo")
    sweep_of(tmp_path / "b", "gspo")
    second = record(tmp_path / "b", key, "changed")
    with pytest.raises(ConfigError, match=reason):
        join([first, second])
    with pytest.raises(ConfigError, match="since they differ in"):  # any two, not only neighbours of the first
        join([sweep_of(tmp_path / "c", "ppo", model="tiny_moe"), first, second])


def test_all_reasons_are_given_at_once(tmp_path: Path) -> None:
    first = sweep_of(tmp_path / "a", "grpo")
    second = sweep_of(tmp_path / "b", "gspo", config={"rollout": {"temperature": 0.7}, "evaluation": {"limit": 64}})
    with pytest.raises(ConfigError, match=r"rollout settings .*; evaluation settings"):
        join([first, second])


def test_the_same_cell_is_not_counted_twice(tmp_path: Path) -> None:
    parts = [read_sweep(write_sweep(tmp_path / name, [Cell("gspo", "tiny_dense", 0)])) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="both have the cell gspo-tiny_dense-chain_sum-s0"):
        join(parts)


def test_a_sweep_over_the_settings_of_a_task_takes_further_runs_of_these(tmp_path: Path) -> None:
    plain, noisy = ({"task": {"name": "chain_sum", "noise": noise}} for noise in (0.0, 0.1))
    over = [Cell("gspo", "tiny_dense", seed, config=config) for config in (plain, noisy) for seed in SEEDS]
    searched = read_sweep(write_sweep(tmp_path / "a", over))
    further = read_sweep(write_sweep(tmp_path / "b", [Cell("gspo", "tiny_dense", 2, config=noisy)]))
    assert len(join([searched, further]).cells) == len(join([further, searched]).cells) == 5
    unknown = {"task": {"name": "chain_sum", "noise": 0.2}}
    with pytest.raises(ConfigError, match="task.noise: 0 against 0.1 against 0.2"):
        join([searched, read_sweep(write_sweep(tmp_path / "c", [Cell("gspo", "tiny_dense", 3, config=unknown)]))])


def test_cells_that_have_not_run_forbid_nothing(tmp_path: Path) -> None:
    first = sweep_of(tmp_path / "a", "grpo")
    planned = Cell("gspo", "tiny_dense", 0, status="planned", steps=0, config={"rollout": {"temperature": 0.7}})
    assert len(join([first, read_sweep(write_sweep(tmp_path / "b", [planned]))]).cells) == 3
