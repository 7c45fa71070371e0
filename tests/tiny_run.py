"""A run of about a second: a model that has hardly been started, and a reward that is seldom the same twice.

Imported as a plugin, it adds the verifier and the parts that these runs name.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.algorithms.objective import token_ratio
from harness.algorithms.registry import register
from harness.cell import prepare, run_cell
from harness.config import compose
from harness.runs.directory import EVALUATIONS, METRICS, SAMPLES, RunDirectory
from harness.tasks import VERIFIERS

COMPLETIONS = 16  # in a rollout batch
UPDATES = 4  # optimizer steps that follow it
TINY = [
    "plugins=[tests.tiny_run]",
    "model.cold_start.steps=2",
    "model.cold_start.batch_size=4",
    "task.verifier=digits",
    "task.max_completion_tokens=12",
    f"rollout.completions_per_batch={COMPLETIONS}",
    "budget.axis=updates",
    f"algorithm.minibatches={UPDATES}",
    f"budget.limits.updates={2 * UPDATES}",
    "evaluation.tasks=[chain_sum_held_out]",
    "evaluation.fractions=[]",
    "evaluation.limit=2",
    "checkpoint_every=1",
]

# Two steps on such a model with nothing of this module's, for runs in processes of their own.
PLAIN = [
    "model.cold_start.steps=2",
    "model.cold_start.batch_size=4",
    "rollout.completions_per_batch=16",
    "task.max_completion_tokens=8",
    "algorithm.minibatches=4",
    "budget.axis=updates",
    "budget.limits.updates=8",
    "evaluation.tasks=[chain_sum_held_out]",
    "evaluation.limit=2",
]

# An untrained model never answers right, so that no algorithm would learn anything; digits it does write.
VERIFIERS["digits"] = lambda completion, problem: sum(map(str.isdigit, completion)) / 12


@register("ratio", "breaks")
def breaks(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A token ratio that is NaN as soon as the policy has moved: in the second optimizer step."""
    ratio = token_ratio(logprobs, old_logprobs, mask)
    return ratio * torch.nan if (ratio - 1).abs().max() > 1e-4 else ratio


def planned(results: Path, *overrides: str, config_dir: Path | None = None) -> RunDirectory:
    """The directory of a tiny run, ready to start."""
    return prepare(compose([*TINY, f"results={results}", *overrides], config_dir=config_dir))


def run(results: Path, *overrides: str) -> RunDirectory:
    """The directory of a tiny run that is done."""
    directory = planned(results, *overrides)
    assert run_cell(directory) == "done", directory.read_status()["traceback"]
    return directory


def lines(directory: RunDirectory, name: str) -> list[dict[str, Any]]:
    """The rows of a JSON lines file without what may differ between two identical runs: times."""
    file = directory.path / name
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def numbers(directory: RunDirectory) -> dict[str, Any]:
    """All that a run says besides times."""
    budget = directory.read_status()["budget"]
    return {
        **{name: lines(directory, name) for name in (METRICS, EVALUATIONS, SAMPLES)},
        "scores": directory.read_status().get("scores"),
        "spent": {axis: amount for axis, amount in budget["spent"].items() if axis != "device_seconds"},
        "flops": {phase: cost["flops"] for phase, cost in budget["phases"].items()},
        "overshoot": budget["overshoot"],
        "policy": (directory.policy_dir / "model.safetensors").read_bytes(),
    }
