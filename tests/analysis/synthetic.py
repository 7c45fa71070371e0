"""A sweep as runs leave it on disk, made of known curves: what reading and reporting are tested on."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

LIMIT = 1e12
PHASES = ("rollout", "reward", "old_logprobs", "critic", "update")
EVAL_TASKS = ("held_out", "longer", "signed")
# clip fraction, reward gained, critic, routing replay
ALGORITHMS = {
    "ppo": (0.004, 0.10, True, "disabled"),
    "grpo": (0.0015, 0.16, False, "disabled"),
    "grpo_replay": (0.0008, 0.20, False, "R2"),
    "gspo": (0.25, 0.18, False, "disabled"),
}
MODELS = ("tiny_dense", "tiny_moe")


@dataclass
class Cell:
    """One run directory to write."""

    algorithm: str
    model: str
    seed: int
    status: str = "done"
    reason: str | None = None
    learning_rate: float = 3e-4
    steps: int = 42  # a step costs LIMIT / 40.5, so that the last ones lie past the limit
    gain: float | None = None  # of reward over the run; None for the algorithm's own
    task: str = "chain_sum"
    misled: float = 0.0  # how much more the training reward has than the true one in the end
    step_reward: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def traits(self) -> tuple[float, float, bool, str]:
        return ALGORITHMS.get(self.algorithm, (0.01, 0.12, False, "disabled"))

    @property
    def resolved(self) -> dict[str, Any]:
        critic = {"learning_rate": 1e-3} if self.traits[2] else None
        algorithm = {
            "name": self.algorithm,
            "routing_replay": self.traits[3],
            "critic": critic,
            "minibatches": 4,
            "completions_per_prompt": 1 if critic else 8,
            "optimizer": {"learning_rate": self.learning_rate, "warmup_updates": 8},
        }
        return {
            "algorithm": algorithm,
            "model": {"name": self.model, "path": None},
            "task": {"name": self.task, "prompt": "{expression} =", "parameters": {"min_terms": 3}},
            "rollout": {"engine": "embedded", "completions_per_batch": 256, "temperature": 1.0},
            "budget": {"axis": "flops", "limits": {"flops": LIMIT, "updates": 200.0}},
            "evaluation": {"tasks": list(EVAL_TASKS), "fractions": [0.0, 0.5, 1.0], "limit": 256},
            "seed": self.seed,
            "sweep": "synthetic",
            "device": "cpu",
            "threads": 1,
            **self.config,
        }

    @property
    def label(self) -> str:
        return f"{self.algorithm}-{self.model}-{self.task}-s{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.label}-{hashlib.sha256(json.dumps(self.resolved).encode()).hexdigest()[:8]}"


def comparison(seeds: int = 3) -> list[Cell]:
    """Algorithms x models x seeds: replay skipped on the dense model, one cell each failed, diverged and unfinished."""
    cells = [Cell(algorithm, model, seed) for model in MODELS for algorithm in ALGORITHMS for seed in range(seeds)]
    for cell in cells:
        if cell.traits[3] != "disabled" and cell.model == "tiny_dense":
            cell.status, cell.reason, cell.steps = "skipped", "tiny_dense has no routers, so nothing to replay", 0
    by_label = {cell.label: cell for cell in cells}
    failed = by_label["ppo-tiny_dense-chain_sum-s1"]
    failed.status, failed.reason, failed.steps = "failed", "RuntimeError: <b>out of memory</b>", 0
    diverged = by_label["ppo-tiny_moe-chain_sum-s2"]
    diverged.status, diverged.reason, diverged.steps = "diverged", "the loss is nan at step 17", 17
    unfinished = by_label["gspo-tiny_moe-chain_sum-s0"]
    unfinished.status, unfinished.steps = "interrupted", 25
    return cells


def trial(algorithm: str, number: int | None, rate: float, seed: int = 1000, **how: Any) -> Cell:
    """A trial that tries a learning rate; without a number a run of the comparison that took it."""
    cell = Cell(algorithm, "tiny_dense", seed, learning_rate=rate, **how)
    searched = {**cell.resolved["algorithm"], "search_space": {"optimizer.learning_rate": [rate]}}
    cell.config = {"algorithm": searched, "tuning": {"trial": number}}
    return cell


ODD = {
    "nothing has begun": [Cell("gspo", "tiny_moe", seed, status="planned", steps=0) for seed in range(3)],
    "all are skipped": [Cell("gspo", "tiny_moe", 0, "skipped", "no", steps=0)],
    "all failed at once": [Cell(name, "tiny_moe", seed, "failed", "no", steps=0) for name in "ab" for seed in range(3)],
    "all failed later": [Cell(name, "tiny_moe", seed, "failed", "no", steps=20) for name in "ab" for seed in range(3)],
    "one run": [Cell("gspo", "tiny_moe", 0)],
    "one variant": [Cell("gspo", "tiny_moe", seed) for seed in range(4)],
    "one seed": [Cell(name, "tiny_moe", 0) for name in "ab"],
    "one finished": [Cell("a", "tiny_moe", 0), *(Cell("a", "tiny_moe", seed, "running", steps=20) for seed in (1, 2))],
    "nothing in common": [Cell("a", "tiny_moe", 0), Cell("b", "tiny_dense", 1)],
}


def write_sweep(root: Path, cells: list[Cell]) -> Path:
    """Write the cells below `root` as a sweep folder."""
    root.mkdir(parents=True)
    plan = {"equal": {"threads": 1}, "code": "abc123", "cells": [cell.name for cell in cells]}
    (root / "sweep.json").write_text(json.dumps(plan))
    for cell in cells:
        write_cell(root, cell)
    return root


def write_cell(root: Path, cell: Cell) -> Path:
    """Write one run directory."""
    folder = root / cell.name
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(cell.resolved)))
    metrics = [_metrics(cell, step) for step in range(1, cell.steps + 1)]
    evaluations = [row for fraction in (0.0, 0.5, 1.0) for row in _evaluations(cell, fraction)]
    if cell.steps:
        _write_lines(folder / "metrics.jsonl", metrics)
        _write_lines(folder / "evaluations.jsonl", evaluations)
        _write_lines(folder / "samples.jsonl", _samples(cell))
    (folder / "run.json").write_text(json.dumps(_record(cell, metrics, evaluations)))
    return folder


def _random(cell: Cell, salt: int) -> np.random.Generator:
    return np.random.default_rng([cell.seed, salt, *cell.algorithm.encode(), *cell.model.encode()])


def _gain(cell: Cell) -> float:
    own = cell.traits[1] if cell.gain is None else cell.gain
    return own + 0.03 * float(_random(cell, 0).normal())


def _metrics(cell: Cell, step: int) -> dict[str, Any]:
    clip, _, critic, replay = cell.traits
    random = _random(cell, step)
    done = step / 40.5
    weights = {"rollout": 0.3, "reward": 0.0, "old_logprobs": 0.15, "critic": 0.3 if critic else 0.0}
    shares = {**weights, "update": 1 - sum(weights.values())}
    zero = cell.algorithm == "grpo" and step % 10 == 0
    reward = 0.5 + _gain(cell) * (1 - np.exp(-3 * done)) + 0.015 * float(random.normal())
    row = {
        "step": step,
        "budget/flops": LIMIT * done,
        "budget/device_seconds": 60 * done,
        "budget/tokens": 8000 * step,
        "budget/queries": (256 if critic else 32) * step,
        "budget/updates": 4 * step,
        **{f"flops/{phase}": LIMIT / 40.5 * share for phase, share in shares.items()},
        **{f"seconds/{phase}": 1.5 * share + 0.01 for phase, share in shares.items()},
        "reward/mean": reward,
        "reward/true_mean": reward - cell.misled * done,
        "loss": 0.01 * float(random.normal()),
        "entropy": 0.6 - 0.3 * done + 0.01 * float(random.normal()),
        "grad_norm": float(random.lognormal(-0.5, 0.4)),
        "clip_fraction/token": 0.0 if zero else clip * float(random.lognormal(0, 0.4)),
        "ratio/max": 1.02 if clip > 0.1 else 1.3 + float(random.lognormal(0, 0.6)),
    }
    if cell.model == "tiny_moe":
        row["moe/expert_change_fraction"] = 0.05 * float(random.lognormal(0, 0.2))
        row["moe/update_expert_change_fraction"] = 1.8 * row["moe/expert_change_fraction"]
        row["moe/used_expert_change_fraction"] = 0.0 if replay != "disabled" else row["moe/expert_change_fraction"]
    if cell.step_reward:
        row["reward/step_mean"] = 1 - 0.3 * (1 - reward)
    if cell.status == "diverged" and step == cell.steps:
        row |= {"loss": None, "grad_norm": None}
    return row


def _evaluations(cell: Cell, fraction: float) -> list[dict[str, Any]]:
    step = int(fraction * 40)
    if step > cell.steps:
        return []
    spent = {"budget/flops": LIMIT * step / 40.5, "budget/device_seconds": 60 * step / 40.5}
    rows = []
    for index, task in enumerate(EVAL_TASKS):
        score = round(256 * (0.55 - 0.15 * index + _gain(cell) * fraction)) / 256
        row = {"fraction": fraction, "step": step, "task": task, "score": score, "stderr": 0.031, "n": 256}
        rows.append({**row, **spent})
    return rows


def _samples(cell: Cell) -> list[dict[str, Any]]:
    completion = "3-7=-4;-4+8=4#4" if cell.seed else "<script>alert('x')</script>\n<img src=x onerror=1>"
    row = {"prompt": "3-7+8 =", "completion": completion, "answer": "4", "reward": float(cell.seed > 0)}
    return [{"fraction": fraction, "step": int(40 * fraction), **row} for fraction in (0.0, 1.0)]


def _record(cell: Cell, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    spent = {key.removeprefix("budget/"): value for key, value in (metrics or [{}])[-1].items() if "budget/" in key}
    phases = {
        phase: {cost: sum(row[f"{cost}/{phase}"] for row in metrics) for cost in ("seconds", "flops")}
        for phase in PHASES
    }
    final = [row for row in evaluations if row["fraction"] == 1.0 and cell.status == "done"]
    return {
        "status": cell.status,
        "reason": cell.reason,
        "traceback": "Traceback …" if cell.status == "failed" else None,
        "algorithm": cell.algorithm,
        "model": cell.model,
        "task": cell.task,
        "seed": cell.seed,
        "label": cell.label,
        "hash": cell.name[-8:],
        "provenance": {
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            "code": "abc123",
            "packages": {"torch": "2.13.0", "pandas": "3.1.1"},
            "python": "3.11.2",
            "platform": "Linux",
            "device": "cpu",
            "initial_weights": f"weights of {cell.model}",
        },
        "budget": {
            "axis": "flops",
            "limit": LIMIT,
            "spent": spent,
            "overshoot": max(0.0, spent.get("flops", 0.0) / LIMIT - 1),
            "phases": phases if metrics else {},
        },
        "parameters": {"policy": 150_000, "active": 150_000, "critic": 150_000 if cell.traits[2] else 0},
        "scores": {row["task"]: {key: row[key] for key in ("score", "stderr", "n")} for row in final},
        "started": "2026-01-01T00:00:00",
        "finished": "2026-01-01T00:01:00",
        "pid": 1,
    }


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
