"""From completions to what the algorithm is rewarded with."""

from bisect import bisect_left
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness.algorithms.advantages import all_equal, group_statistics, last_tokens, step_rewards
from harness.algorithms.registry import call
from harness.config import RewardModelConfig, RunConfig
from harness.errors import ConfigError
from harness.rollout.batch import Batch, stack_rows
from harness.tasks import STEP_VERIFIERS, VERIFIERS, Problem


@dataclass
class Rewards:
    """The rewards of B completions of up to T tokens."""

    tokens: Tensor  # [B, T] float, what the algorithm is given, where it was earned
    ends: Tensor  # [B, T] bool, the last token of each rewarded step
    outcome: Tensor  # [B] float, the task's reward for the whole completion, with its reward model's errors
    true: Tensor  # [B] float, the verifier's verdict on the whole completion
    steps: Tensor  # [B] float, mean reward of the intermediate steps that the problem has; NaN where none are judged

    @staticmethod
    def concatenate(parts: "list[Rewards]") -> "Rewards":
        """Those of several rollout batches; T is the longest."""
        return Rewards(*(stack_rows([getattr(part, field.name) for part in parts]) for field in fields(Rewards)))

    def select(self, rows: Tensor) -> "Rewards":
        """The given completions, cut to the longest among them, which its last step tells."""
        part = Rewards(*(getattr(self, field.name)[rows] for field in fields(self)))
        width = int(part.ends.any(0).nonzero().max()) + 1
        part.tokens, part.ends = part.tokens[:, :width], part.ends[:, :width]
        return part

    def informative(self, group_ids: Tensor) -> Tensor:
        """[B] whether not all rewards are equal in each one's group, by ``group_ids`` [B]: of outcomes, before shaping;
        where steps are judged, of all steps, as the algorithm is given them."""
        if self.steps.isnan().all():
            _, std = group_statistics(self.outcome, group_ids)
            return ~all_equal(self.outcome, std)
        rows, _, rewards = step_rewards(self.tokens, self.ends, torch.ones_like(self.tokens))
        _, std = group_statistics(rewards, group_ids[rows])
        differ = torch.zeros_like(self.outcome).index_add_(0, rows, (~all_equal(rewards, std)).float())
        return differ > 0


class Grader:
    """Rewards completions as the task and the algorithm's shaping say."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.shaping, self.tokenizer = config.task, config.algorithm.shaping, tokenizer
        self.verify = VERIFIERS[config.task.verifier]

    def grade(self, texts: list[str], problems: list[Problem], batch: Batch, generator: torch.Generator) -> Rewards:
        """Reward a rollout batch.

        Args:
            texts: its B completions.
            problems: what each was asked.
            batch: the rollout batch.
            generator: a CPU generator, where the reward model's errors come from.

        Raises:
            ConfigError: where a verifier gives anything else than a number from 0 to 1.
        """
        key = f"task.verifier={self.task.verifier}"
        verdicts = [number(self.verify(text, problem), key) for text, problem in zip(texts, problems, strict=True)]
        true = torch.tensor(verdicts, dtype=torch.float32)
        lengths, longest = batch.completion_lengths, self.task.max_completion_tokens
        outcome = misjudged(true, lengths, longest, self.task.reward_model, generator)
        shaped = call("shaping", self.shaping, outcome, lengths, longest, like=outcome)
        last = last_tokens(batch.mask)
        tokens, ends, steps = self._steps(texts, problems, batch)
        return Rewards(tokens + last * shaped.unsqueeze(1), ends | last, outcome, true, steps)

    def _steps(self, texts: list[str], problems: list[Problem], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the intermediate steps: rewards [B, T], last tokens [B, T] and means [B] as in :class:`Rewards`."""
        tokens, ends = torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape, dtype=torch.bool)
        means = torch.full((len(texts),), torch.nan)
        if self.task.step_verifier is not None:
            judge, key = STEP_VERIFIERS[self.task.step_verifier], f"task.step_verifier={self.task.step_verifier}"
            completions, lengths = batch.completions.tolist(), batch.completion_lengths.tolist()
            for row, (text, problem) in enumerate(zip(texts, problems, strict=True)):
                rewards, expected = judge(text, problem)
                offsets = [offset for offset, _ in rewards]
                columns = tokens_at(offsets, completions[row][: lengths[row]], self.tokenizer)
                for column, (_, reward) in zip(columns, rewards, strict=True):
                    tokens[row, column] += number(reward, key)  # steps that end within one token are one step
                    ends[row, column] = True
                if expected:
                    means[row] = sum(reward for _, reward in rewards) / expected
        return tokens, ends, means


def number(reward: Any, key: str) -> float:
    """A verifier's reward, which as NaN would look like a run that diverged, and as 2 would outweigh all others.

    Args:
        reward: what it gave.
        key: the setting that names it.

    Raises:
        ConfigError: for anything else than a number from 0 to 1.
    """
    if not isinstance(reward, Real | np.bool_) or not 0 <= float(reward) <= 1:
        raise ConfigError(f"{key} gave {reward!r} for a completion: a verifier must give a number from 0 to 1")
    return float(reward)


def misjudged(
    rewards: Tensor, lengths: Tensor, longest: int, errors: RewardModelConfig, generator: torch.Generator
) -> Tensor:
    """Rewards in [0, 1] as an imperfect reward model would give them.

    Args:
        rewards: [B], the true ones.
        lengths: [B], tokens of the completions.
        longest: tokens at which completions are cut off.
        errors: the probability that r becomes 1 - r, and what a completion of full length gains.
        generator: a CPU generator; a row's error depends on it and on the row alone.

    Returns:
        [B]; may leave [0, 1] by the length bias.
    """
    flipped = torch.rand(len(rewards), generator=generator) < errors.label_noise
    return torch.where(flipped, 1 - rewards, rewards) + errors.length_bias * lengths / longest


def tokens_at(offsets: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token with which a text reaches each offset, by the lengths of its decoded beginnings.

    Beginnings are decoded as the whole is, since what a token adds may depend on those before it (bytes of one
    character, a space that is dropped). Where the text never gets there it is the last token.

    Args:
        offsets: in characters, into the tokens' text without special tokens.
        tokens: at least one.
    """
    indices = range(len(tokens) - 1)

    def length(index: int) -> int:
        (text,) = tokenizer.batch_decode([tokens[: index + 1]], skip_special_tokens=True)
        return len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character of which not all bytes are there yet

    return [bisect_left(indices, offset, key=length) for offset in offsets]
