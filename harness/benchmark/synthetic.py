"""A finished sweep as runs leave it on disk, made of random curves: what a report's time and memory are measured on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.budget import PHASES
from harness.config import BUDGET_AXES, RunConfig, compose, config_hash, save
from harness.runs.directory import EVALUATIONS, METRICS, SAMPLES

ALGORITHMS, MODELS = ("ppo", "grpo", "gspo", "dapo"), ("tiny_dense", "tiny_moe")
# As a run on a mixture-of-experts model writes them, beside budget and phases.
_METRICS = (
    "clip_fraction/token",
    "clip_fraction/low",
    "clip_fraction/high",
    "clip_fraction/sequence",
    "ratio/outside_fraction",
    "ratio/max",
    "ratio/min",
    "kl/policy_old",
    "mismatch/logprob_abs_mean",
    "mismatch/logprob_abs_max",
    "mismatch/kl",
    "entropy",
    "loss",
    "grad_norm",
    "learning_rate",
    "moe/expert_change_fraction",
    "moe/token_change_fraction",
    "moe/used_expert_change_fraction",
    "reward/zero_std_fraction",
    "reward/std",
    "completion/length_mean",
    "completion/truncated_fraction",
)


def write_sweep(root: Path, seeds: int, steps: int) -> Path:
    """Write a sweep of every algorithm, model and seed, with `steps` rollout batches each."""
    names = []
    for algorithm in ALGORITHMS:
        for model in MODELS:
            composed = compose([f"algorithm={algorithm}", f"model={model}", "budget.axis=flops", "device=cpu"])
            for seed in range(seeds):
                config = replace(composed, seed=seed, sweep=root.name, results=str(root.parent))
                _write_run(config, steps)
                names.append(config.run_name)
    (root / "sweep.json").write_text(json.dumps({"equal": {}, "code": "0" * 12, "cells": names}), encoding="utf-8")
    return root


def _write_run(config: RunConfig, steps: int) -> None:
    folder = config.run_dir
    folder.mkdir(parents=True)
    save(config, folder / "config.yaml")
    random = np.random.default_rng([config.seed, *config.algorithm.name.encode(), *config.model.name.encode()])
    metrics = _metrics(config, steps, random)
    evaluations = _evaluations(config, metrics, random)
    _write_lines(folder / METRICS, metrics)
    _write_lines(folder / EVALUATIONS, evaluations)
    _write_lines(folder / SAMPLES, [_sample(row) for row in evaluations])
    (folder / "run.json").write_text(json.dumps(_record(config, metrics, evaluations)), encoding="utf-8")


def _metrics(config: RunConfig, steps: int, random: np.random.Generator) -> list[dict[str, Any]]:
    done = np.arange(1, steps + 1) / steps
    columns = {name: random.lognormal(-2, 0.5, steps) for name in _METRICS}
    columns["reward/mean"] = 0.5 + random.normal(0.2, 0.03) * (1 - np.exp(-3 * done)) + random.normal(0, 0.02, steps)
    columns["reward/true_mean"] = columns["reward/mean"]
    columns |= {f"budget/{axis}": config.budget.limits[axis] * done for axis in BUDGET_AXES}
    for phase in PHASES:
        columns[f"flops/{phase}"] = np.full(steps, config.budget.limits["flops"] / steps / len(PHASES))
        columns[f"seconds/{phase}"] = random.lognormal(-2, 0.1, steps)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [{"step": step, **dict(zip(columns, row, strict=True))} for step, row in enumerate(rows, 1)]


def _evaluations(config: RunConfig, metrics: list[dict[str, Any]], random: np.random.Generator) -> list[dict[str, Any]]:
    n, rows = config.evaluation.limit, []
    for fraction in config.evaluation.fractions:
        step = round(fraction * len(metrics))
        spent = {f"budget/{axis}": metrics[step - 1][f"budget/{axis}"] if step else 0.0 for axis in BUDGET_AXES}
        for index, task in enumerate(config.evaluation.tasks):
            score = round(n * (0.5 - 0.1 * index + 0.2 * fraction + random.normal(0, 0.02))) / n
            rows.append(
                {"fraction": fraction, "step": step, "task": task, "score": score, "stderr": 0.03, "n": n, **spent}
            )
    return rows


def _sample(evaluation: dict[str, Any]) -> dict[str, Any]:
    where = {key: evaluation[key] for key in ("fraction", "step")}
    return {**where, "prompt": "3-7+8 =", "completion": "3-7=-4;-4+8=4#4", "answer": "4", "reward": 1.0}


def _record(config: RunConfig, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    phases = {
        phase: {unit: sum(row[f"{unit}/{phase}"] for row in metrics) for unit in ("seconds", "flops")}
        for phase in PHASES
    }
    final = [row for row in evaluations if row["fraction"] == 1.0]
    return {
        "status": "done",
        "reason": None,
        "traceback": None,
        "algorithm": config.algorithm.name,
        "model": config.model.name,
        "task": config.task.name,
        "seed": config.seed,
        "label": config.label,
        "hash": config_hash(config),
        "provenance": {"code": "0" * 12, "device": "cpu", "packages": {}, "initial_weights": config.model.name},
        "budget": {
            "axis": config.budget.axis,
            "limit": config.budget.limit,
            "spent": {axis: metrics[-1][f"budget/{axis}"] for axis in BUDGET_AXES},
            "overshoot": 0.0,
            "phases": phases,
        },
        "parameters": {"policy": 150_000, "active": 150_000, "critic": 0},
        "scores": {row["task"]: {key: row[key] for key in ("score", "stderr", "n")} for row in final},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "pid": 1,
    }


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
