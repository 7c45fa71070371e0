"""How the cost of an update grows with its tokens, its group size and the length of its sequences."""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from harness.algorithms.advantages import group_advantages
from harness.algorithms.metrics import Metrics
from harness.benchmark.measure import Spread, interleave, log_log_slope
from harness.benchmark.sizes import Sizes
from harness.benchmark.table import Cell, Options, Table, at_most
from harness.benchmark.training import run_config
from harness.benchmark.worker import workers
from harness.policy.flops import BACKWARD, policy_cost
from harness.policy.loading import build_model, prepare_layers
from harness.policy.tokenizer import build_tokenizer
from harness.rollout.batch import Batch, join
from harness.update import PolicyUpdater, Targets

GOAL = 1.1
_LENGTH, _GROUP_SIZE, _PROMPTS, _SEQUENCES = 48, 8, 8, 32  # what stays while something else grows
_PROMPT = 8  # tokens
_TEXT = (
    "Seconds of an update on tiny_dense, from rewards through advantages to the last of its optimizer steps, on one "
    "core in float32. The slope is the exponent p of seconds = c * size^p over all sizes; the goal is 1.1 and whatever "
    "attention adds to the growth of the model FLOPs."
)


@dataclass(frozen=True)
class Point:
    """One size on one axis."""

    axis: str
    size: int
    sequences: int
    group_size: int
    length: int  # of a completion

    @property
    def name(self) -> str:
        """What its measurement is called."""
        return f"{self.axis} {self.size}"


def points(sizes: Sizes) -> list[Point]:
    """All sizes on all axes."""
    return [
        *(Point("tokens", n * _LENGTH, n, _GROUP_SIZE, _LENGTH) for n in sizes.sequences),
        *(Point("group size", n, n * _PROMPTS, n, _LENGTH) for n in sizes.group_sizes),
        *(Point("sequence length", n, _SEQUENCES, _GROUP_SIZE, n - _PROMPT) for n in sizes.lengths),
    ]


class Updates:
    """One update at every point, of a model with fresh weights on random tokens."""

    def __init__(self, sizes: Sizes) -> None:
        longest = max(*sizes.lengths, _PROMPT + _LENGTH)
        self.config = run_config("tiny_dense", sizes, f"model.architecture.max_position_embeddings={longest}")
        assert self.config.model.architecture is not None
        policy = build_model(self.config.model.architecture, build_tokenizer(), seed=0).eval()
        prepare_layers(policy, "cpu")  # as those of a run
        self.cost, self.updater = policy_cost(policy), PolicyUpdater(policy, self.config, nullcontext)
        self.batches = {point.name: random_batch(point) for point in points(sizes)}
        self()

    def __call__(self) -> dict[str, float]:
        """Seconds by the point's name, and FLOPs by `flops` and its name."""
        seconds = {name: self._seconds(batch) for name, batch in self.batches.items()}
        flops = {f"flops {name}": (1 + BACKWARD) * self.cost.batch(batch) for name, batch in self.batches.items()}
        return seconds | flops

    def _seconds(self, batch: Batch) -> float:
        rewards = torch.rand(len(batch.mask))
        started = time.perf_counter()
        advantages = group_advantages(rewards, batch.group_ids, self.config.algorithm)
        targets = Targets(batch.rollout_logprobs, advantages.unsqueeze(1) * batch.mask)
        self.updater.update(batch, targets, torch.Generator().manual_seed(0), Metrics())
        return time.perf_counter() - started


def random_batch(point: Point) -> Batch:
    """Sequences of random tokens, all of the point's length.

    Prompts of a group are different ones, too: what sequences begin with alike is counted as FLOPs, but not computed.
    """
    tokens = torch.randint(3, 20, (point.sequences, _PROMPT + point.length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(point.sequences, point.length)
    group_ids = torch.arange(point.sequences) // point.group_size
    prompts = tokens[:, :_PROMPT].tolist()
    return join(prompts, tokens[:, _PROMPT:], mask, torch.zeros_like(mask), group_ids, 0)


def tables(options: Options) -> list[Table]:
    """The slope on every axis."""
    with workers({"ours": (Updates, {"sizes": options.sizes})}) as sides:
        measured = interleave(sides, options.repetitions)["ours"]
    found = points(options.sizes)
    axes = dict.fromkeys(point.axis for point in found)
    rows = [_row(axis, [point for point in found if point.axis == axis], measured) for axis in axes]
    return [Table("Growth of an update's cost", _TEXT, rows)]


def _row(axis: str, found: list[Point], measured: dict[str, Spread]) -> dict[str, Cell]:
    sizes = [point.size for point in found]
    seconds = [measured[point.name] for point in found]
    repetitions = zip(*(spread.values for spread in seconds), strict=True)
    slope = Spread(tuple(log_log_slope(sizes, costs) for costs in repetitions))
    flops_slope = log_log_slope(sizes, [measured[f"flops {point.name}"].median for point in found])
    return {
        "what grows": axis,
        "from": sizes[0],
        "to": sizes[-1],
        "smallest, s": seconds[0],
        "largest, s": seconds[-1],
        "slope of seconds": slope,
        "slope of model FLOPs": flops_slope,
        **at_most(slope, GOAL + max(0.0, flops_slope - 1)),
    }
