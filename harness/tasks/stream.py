"""The stream of prompts: a function of task, seed, position and split, and of nothing else."""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from harness.config import TaskConfig
from harness.errors import ConfigError
from harness.tasks.problem import SPLITS, Problem, content_bucket, derived_seed
from harness.tasks.sources import finite_problems, generated_problem, generator

# A generated problem is the first of this many candidates whose content belongs to the split. The smallest split takes
# a tenth, so that all candidates miss it with probability 2e-12.
_CANDIDATES = 256
# Positions that share one generator object, for those that are slow to make.
_BLOCK = 16


class PromptStream:
    """An endless stream of problems of one split.

    Generated problems (reasoning-gym) are drawn independently. Rows of a file or hub data set are shuffled anew in
    every epoch; there `train` is every row outside the evaluation buckets, since setting rows aside for a cold start,
    which checkpoints do not take, would waste them.

    Args:
        task: where the problems come from.
        seed: another seed is another order or another draw, from the same split.
        split: train, cold_start or evaluation; no problem is in two of them.

    Raises:
        ConfigError: for a task that cannot be read or has no problem in this split.
    """

    def __init__(self, task: TaskConfig, seed: int, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split}: choose one of {', '.join(SPLITS)}")
        self.position = 0
        self._source: _Generated | _Finite
        self._source = (_Generated if task.source == "reasoning_gym" else _Finite)(task, seed, split)

    def take(self, n: int) -> list[Problem]:
        """The next n problems."""
        start, self.position = self.position, self.position + n
        return [self._source.at(position) for position in range(start, self.position)]

    @property
    def known(self) -> Sequence[Problem]:
        """All problems that there are; none of a generator, which makes them as they are asked for."""
        return self._source.known

    def seek(self, position: int) -> None:
        """Continue at a position: the number of problems taken before it."""
        self.position = position


class _Generated:
    def __init__(self, task: TaskConfig, seed: int, split: str) -> None:
        self._task, self._split = task, split
        self._make = generator(task, "task")
        self._identity = (task.dataset, task.parameters, seed, split)
        self.known: Sequence[Problem] = ()
        self._block = lru_cache(maxsize=2)(self._make_block)

    def at(self, position: int) -> Problem:
        block, offset = divmod(position, _BLOCK)
        candidates = self._block(block)
        for index in range(offset * _CANDIDATES, (offset + 1) * _CANDIDATES):
            problem = generated_problem(self._task, candidates[index], "task")
            if content_bucket(problem.prompt) in SPLITS[self._split]:
                return problem
        raise ConfigError(
            f"task.parameters leave '{self._task.dataset}' too few different problems: none of {_CANDIDATES} belongs "
            f"to the split '{self._split}'; widen them"
        )

    def _make_block(self, block: int) -> Any:
        # reasoning-gym draws entry i with seed + i, so that neighbouring seeds would overlap: they are hashed apart.
        # Some of its data sets take no more than 32 bits.
        size = _BLOCK * _CANDIDATES
        return self._make(seed=derived_seed(*self._identity, block) % (2**32 - size), size=size)


class _Finite:
    def __init__(self, task: TaskConfig, seed: int, split: str) -> None:
        if split == "cold_start":
            raise ConfigError(f"model.cold_start.task.source={task.source}: a cold start needs generated problems")
        held_out = SPLITS["evaluation"]
        problems = finite_problems(task, "task")
        self.known = [p for p in problems if (content_bucket(p.prompt) in held_out) == (split == "evaluation")]
        if not self.known:
            raise ConfigError(
                f"task: {task.path or task.dataset} is too small: it has no problem in the split '{split}'"
            )
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def at(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self.known))
        return self.known[self._order(epoch)[index]]

    def _shuffled(self, epoch: int) -> list[int]:
        return random.Random(derived_seed(self._seed, epoch)).sample(range(len(self.known)), len(self.known))
