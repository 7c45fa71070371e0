"""What a run has spent on every axis, by phase, and when it must stop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.config import BUDGET_AXES, BudgetConfig

PHASES = ("rollout", "reward", "old_logprobs", "reference", "critic", "update")


class Meter:
    """Adds up what the charged phases cost. What runs outside of :meth:`phase` is not charged.

    Attributes:
        spent: total by axis: FLOPs, seconds, completion tokens, prompts, optimizer steps of the policy.
        phases: seconds and FLOPs by phase.
    """

    def __init__(self, config: BudgetConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.spent: dict[str, float] = dict.fromkeys(BUDGET_AXES, 0.0)
        self._pauses: list[tuple[Any, Any]] = []  # marks at both ends of each, within the phase that runs
        self.phases: dict[str, dict[str, float]] = {name: {"seconds": 0.0, "flops": 0.0} for name in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block, with the device synchronised at both ends; one device is held."""
        started = self._now()
        self._pauses = []
        try:
            yield
        finally:
            seconds = self._now() - started - sum(self._between(*pause) for pause in self._pauses)
            self.phases[name]["seconds"] += seconds
            self.spent["device_seconds"] += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside of a phase: what only measures is not charged. Does not wait for the device."""
        started = self._mark()
        yield
        self._pauses.append((started, self._mark()))

    def charge_flops(self, phase: str, flops: float) -> None:
        """Add model FLOPs to a phase."""
        self.phases[phase]["flops"] += flops
        self.spent["flops"] += flops

    def count(self, **amounts: float) -> None:
        """Add tokens, queries or updates."""
        for axis, amount in amounts.items():
            self.spent[axis] += amount

    @property
    def fraction(self) -> float:
        """How much of the budget is spent, on the axis that ends the run; may pass 1."""
        return self.spent[self.config.axis] / self.config.limit

    def summary(self) -> dict[str, Any]:
        """The `budget` entry of run.json."""
        return {
            "axis": self.config.axis,
            "limit": self.config.limit,
            "spent": dict(self.spent),
            "overshoot": max(0.0, self.fraction - 1),
            "phases": {name: dict(cost) for name, cost in self.phases.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"spent": dict(self.spent), "phases": {name: dict(cost) for name, cost in self.phases.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.spent, self.phases = state["spent"], state["phases"]

    def _now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _mark(self) -> Any:
        """The place of now in the device's work."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def _between(self, started: Any, ended: Any) -> float:
        """Seconds between two marks that the device has passed."""
        return started.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - started
