"""Where the time of rollouts and updates goes, by kinds of operations."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from harness.benchmark.measure import interleave
from harness.benchmark.sizes import Sizes
from harness.benchmark.table import Cell, Options, Table
from harness.benchmark.training import MODELS, WholeSteps
from harness.benchmark.worker import workers

# torch's names of the operations of each kind, and names of our kernels with those of their modules.
PARTS = {
    "attention, in kernels": (
        "attention.attend attention.attend_backward decoding.attend elements.turn elements.turn_backward"
    ),
    "feed-forward layers, in kernels": "decoding.feed products.feed_forward products.feed_forward_backward",
    "experts, in kernels": "experts.combine experts.combine_backward experts.sort",
    "single products and normalisation, in kernels": (
        "decoding.add decoding.project elements.normalize elements.normalize_backward products.linear products.outer"
    ),
    "logits, draws and rows of decoded tokens, in kernels": (
        "decoding.copy_rows decoding.regroup vocabulary.draw vocabulary.score vocabulary.score_backward"
    ),
    "products, softmax and arithmetic of torch": (
        "_fused_adamw_ _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data add add_ addcmul addmm "
        "any baddbmm bmm clamp cos cumsum div div_ eq exp ge le linalg_vector_norm lt maximum mean minimum "
        "mkldnn::_linear_pointwise mm mul mul_ mv ne neg pow rsqrt sin sub sum topk where"
    ),
    "copies, gathering and scattering": (
        "_index_put_impl_ argsort cat copy_ embedding_dense_backward fill_ gather index index_copy_ index_select "
        "masked_fill_ nonzero scatter_add_ sort zero_ _unique2"
    ),
}
REST = "the rest: what it costs to call operations, and to call for them"
_PHASES = ("rollout", "update")
_TEXT = (
    "Shares of the seconds of a phase by torch's profiler, which counts an operation without those that it calls; it "
    "makes each call more expensive, and so the rest larger than it is. A kernel of ours is one of these operations. "
    "Natural lengths, one core, float32."
)


class Profiled:
    """Seconds of each part in each phase of the trainer's steps, over those of the phase."""

    def __init__(self, model: str, sizes: Sizes) -> None:
        from numba.core.dispatcher import Dispatcher

        from harness.policy.kernels.cpu import attention, decoding, elements, experts, products, vocabulary

        for module in (attention, decoding, elements, experts, products, vocabulary):
            for name, function in vars(module).items():
                if isinstance(function, Dispatcher) and function.signatures:  # others are parts of them
                    setattr(module, name, _recorded(f"{module.__name__.split('.')[-1]}.{name}", function))
        self.steps = WholeSteps(model, "natural", sizes)
        self.seconds: dict[str, dict[str, float]] = {phase: {} for phase in _PHASES}
        self.steps()
        trainer: Any = self.steps.trainer
        trainer.engine.generate = self._watched("rollout", trainer.engine.generate)
        trainer.policy_updater.update = self._watched("update", trainer.policy_updater.update)

    def __call__(self) -> dict[str, float]:
        for phase in _PHASES:
            self.seconds[phase] = dict.fromkeys([*PARTS, "all"], 0.0)
        self.steps()
        shares: dict[str, float] = {}
        for phase, seconds in self.seconds.items():
            parts = {part: seconds[part] / seconds["all"] for part in PARTS}
            shares |= {f"{phase} {part}": share for part, share in {**parts, REST: 1 - sum(parts.values())}.items()}
        return shares

    def _watched(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args):
            with profile(activities=[ProfilerActivity.CPU]) as watched:
                started = time.perf_counter()
                result = method(*args)
                self.seconds[phase]["all"] += time.perf_counter() - started
            alone = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in watched.key_averages()}
            for part, names in PARTS.items():
                self.seconds[phase][part] += sum(alone.get(name, 0.0) for name in names.split()) * 1e-6
            return result

        return wrapper


def _recorded(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
    @wraps(kernel)
    def call(*args: Any) -> None:
        with record_function(name):
            kernel(*args)

    return call


def tables(options: Options) -> list[Table]:
    """A row for each part."""
    measured = {}
    for model in MODELS:
        with workers({"ours": (Profiled, {"model": model, "sizes": options.sizes})}) as sides:
            measured[model] = interleave(sides, options.repetitions)["ours"]
    columns = [(phase, model) for phase in _PHASES for model in MODELS]
    rows: list[dict[str, Cell]] = [
        {"part": part, **{f"{phase}, {model}": measured[model][f"{phase} {part}"] for phase, model in columns}}
        for part in (*PARTS, REST)
    ]
    return [Table("Where the time goes", _TEXT, rows)]
