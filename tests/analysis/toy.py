"""A sweep of a few points, so that what is computed from it can be worked out by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from harness.analysis.sweep import Sweep
from harness.analysis.table import Table


@dataclass
class Run:
    """One run: scores and rewards at what it had spent of the axis `flops`; tokens cost `tokens` each."""

    variant: str
    seed: int
    scores: Sequence[float] = ()
    spent: Sequence[float] = (0, 5, 10)
    rewards: Sequence[float] = ()
    status: str = "done"
    setting: str = "tiny"
    tokens: float = 1.0

    @property
    def identity(self) -> dict[str, object]:
        name = f"{self.variant}-{self.setting}-s{self.seed}"
        return {
            "run": name,
            "variant": self.variant,
            "setting": self.setting,
            "seed": self.seed,
            "status": self.status,
        }


def toy_sweep(runs: Sequence[Run]) -> Sweep:
    """Scores of the lm-eval task `held_out` at the points of `spent`, rewards at 1, 2, 3 and so on."""
    columns = [*Run("", 0).identity]
    evaluations, metrics = [], []
    for run in runs:
        for spent, score in zip(run.spent, run.scores, strict=False):
            budget = {"budget/flops": float(spent), "budget/tokens": run.tokens * spent}
            evaluations.append({**run.identity, "eval_task": "held_out", "score": score, **budget})
        for step, reward in enumerate(run.rewards, 1):
            metrics.append({**run.identity, "step": step, "reward/mean": reward, "budget/flops": float(step)})
    steps = pd.DataFrame(metrics, columns=[*columns, "step", "reward/mean", "budget/flops"])
    return Sweep(
        paths=[Path("toy")],
        name="toy",
        axis="flops",
        limit=10.0,
        cells=pd.DataFrame([{**run.identity, "config": {"seed": run.seed}} for run in runs]),
        runs=steps,
        all_runs=steps,
        evaluations=pd.DataFrame(
            evaluations, columns=[*columns, "eval_task", "score", "budget/flops", "budget/tokens"]
        ),
        samples=pd.DataFrame(),
        variants=list(dict.fromkeys(run.variant for run in runs)),
        settings=list(dict.fromkeys(run.setting for run in runs)),
    )


def headlined(runs: Sequence[Run]) -> Sweep:
    """A toy sweep whose headline metric is `held_out`, and which can be drawn."""
    sweep = toy_sweep(runs)
    return replace(sweep, metric="held_out", cells=sweep.cells.assign(algorithm=sweep.cells["variant"]))


def row(table: Table, **where: str) -> pd.Series:
    """The only row of a table with these values."""
    frame = table.frame
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]
