"""What metering and logging cost, as a share of the step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from harness.benchmark.measure import interleave
from harness.benchmark.sizes import Sizes
from harness.benchmark.table import Cell, Options, Table, at_most
from harness.benchmark.training import MODELS, WholeSteps
from harness.benchmark.worker import workers

GOAL = 0.01
# A measurement ends with writing what is new; a run does so every two seconds, not every few steps.
_LONGER = 5
_KINDS = ("metering", "logging", "expert changes")
_TEXT = (
    "Shares of a training step's seconds. Metering: the clock readings at the bounds of phases, the counting of FLOPs "
    "and other budget axes. Logging: the rollout batch's metrics, metrics.jsonl, run.json and TensorBoard's file; what "
    "is new is written every {steps} steps; a run does so every two seconds. Expert changes are measured "
    "too, of the model: a forward pass after the last optimizer step, on mixture-of-experts models. Training pays "
    "for none of the three from its budget."
)


class Instrumented:
    """Training steps of which the time inside of metering and logging is taken."""

    def __init__(self, model: str, sizes: Sizes) -> None:
        self.sizes = replace(sizes, batches=_LONGER * sizes.batches)
        self.steps = WholeSteps(model, "natural", self.sizes)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._instrument()

    def __call__(self) -> dict[str, float]:
        self.seconds.clear()
        whole = self.steps()["seconds"] / self.sizes.batches
        return {"step": whole, **{name: self.seconds[name] / self.sizes.batches for name in _KINDS}}

    def _instrument(self) -> None:
        trainer: Any = self.steps.trainer
        meter, directory = trainer.meter, trainer.directory
        for owner, name, kind in [
            (meter, "charge_flops", "metering"),
            (meter, "count", "metering"),
            (trainer, "_costs", "metering"),
            (trainer, "_batch_metrics", "logging"),
            (directory, "append_metrics", "logging"),
            (directory, "update_status", "logging"),
            (trainer, "log", "logging"),
            (trainer.policy_updater, "probe_expert_changes", "expert changes"),
        ]:
            setattr(owner, name, self._timed(getattr(owner, name), kind))
        meter.phase, meter.paused = (self._timed_block(block, "metering") for block in (meter.phase, meter.paused))
        trainer.policy_updater.uncharged = meter.paused
        trainer.policy_cost = trainer.judge.policy_cost = _Wrapped(
            trainer.policy_cost, lambda method: self._timed(method, "metering")
        )

    def _timed(self, method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - started

        return wrapper

    def _timed_block(
        self, method: Callable[..., AbstractContextManager[None]], kind: str
    ) -> Callable[..., AbstractContextManager[None]]:
        """As :meth:`_timed`, of entering and leaving a block and not of what it holds."""

        @contextmanager
        def wrapper(*args) -> Iterator[None]:
            block = method(*args)
            self._timed(block.__enter__, kind)()
            yield
            self._timed(block.__exit__, kind)(None, None, None)

        return wrapper


class _Wrapped:
    """An object whose methods are wrapped."""

    def __init__(self, target: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._target, self._wrap = target, wrap

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return self._wrap(value) if callable(value) else value


def tables(options: Options) -> list[Table]:
    """Both models."""
    rows = [_row(model, options) for model in MODELS]
    return [Table("Overhead of metering and logging", _TEXT.format(steps=_LONGER * options.sizes.batches), rows)]


def _row(model: str, options: Options) -> dict[str, Cell]:
    with workers({"ours": (Instrumented, {"model": model, "sizes": options.sizes})}) as sides:
        measured = interleave(sides, options.repetitions)["ours"]
    metering, logging = measured["metering"] / measured["step"], measured["logging"] / measured["step"]
    return {
        "model": model,
        "step, s": measured["step"],
        "metering": metering,
        "logging": logging,
        "both": metering + logging,
        **at_most(metering + logging, GOAL),
        "expert changes": measured["expert changes"] / measured["step"],
    }
