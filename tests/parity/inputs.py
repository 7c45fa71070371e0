"""Random batches on which the harness and its peers are compared."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from harness.algorithms.advantages import last_tokens

SHAPES = [(1, 1), (2, 3), (5, 8), (40, 12), (14, 33)]


class Inputs(NamedTuple):
    """What a policy loss is computed from, float64; masked positions hold junk, which must not matter."""

    logprobs: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 at valid positions
    rollout_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]


def batches(bound: float = 20.0, per_token: bool = True, shifted: bool = False) -> Iterator[Inputs]:
    """Batches of several shapes, with padding, holes, single-token sequences and advantages of zero.

    Args:
        bound: the largest absolute log-ratio; half of the batches have some of that size, all have small ones too.
        per_token: whether advantages may differ within a sequence, as they then do in two of three batches.
        shifted: whether all tokens of a batch have one log-ratio, inside of every clip range.
    """
    for seed, (rows, width) in enumerate(SHAPES * 3):
        generator = torch.Generator().manual_seed(seed)
        inputs = random_inputs(generator, rows, width, bound if seed % 2 else 1.0, per_token and seed >= len(SHAPES))
        if shifted:
            inputs = inputs._replace(logprobs=inputs.old_logprobs + 0.03 * (seed % 8) - 0.1)
        if not shifted or inputs.mask.sum() != 2:  # two tokens have one covariance, so that either may be selected
            yield inputs


def random_inputs(generator: torch.Generator, rows: int, width: int, bound: float, per_token: bool) -> Inputs:
    """One batch; each sequence has a drift of its own and a scale for its log-ratios, from 0 to ``bound``."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, width, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[-1] = 1
    mask = torch.arange(width) < lengths
    # What a tool wrote lies inside a completion and is not trained on; the first token is always the policy's.
    mask[:, 1:] &= torch.rand(rows, width - 1, generator=generator) > 0.1
    mask = mask.double()

    scales = torch.tensor([2e-4, min(2.0, bound), bound, min(0.6, bound), 4e-3, 0.1, 0.0], dtype=torch.float64)
    scale = scales[torch.arange(rows) % len(scales)].unsqueeze(1)
    log_ratio = (uniform(-1, 1) + uniform(-1, 1)[:, :1]) / 2 * scale
    extreme = uniform(0, 1) < 0.3
    log_ratio = torch.where(extreme & (scale == bound), log_ratio.sign() * bound, log_ratio)
    # Probabilities stay below 1 on both sides.
    old_logprobs = -uniform(0.01, 4) - log_ratio.clamp(min=0)
    advantages = 2 * uniform(-1, 1) if per_token else 2 * uniform(-1, 1)[:, :1].expand(rows, width)
    advantages = advantages * (torch.arange(rows) % 4 != 3).double().unsqueeze(1)
    mismatch = uniform(-2, 2)
    mismatch[0] *= 0.01  # within every band of a correction, so that something remains
    sampled = (old_logprobs + mismatch).float().double()  # TRL keeps these in float32
    junk = uniform(-30, 0).float().double()
    return Inputs(
        logprobs=torch.where(mask > 0, old_logprobs + log_ratio, junk),
        old_logprobs=torch.where(mask > 0, old_logprobs, junk.flip(0)),
        advantages=advantages * mask,
        mask=mask,
        rollout_logprobs=torch.where(mask > 0, sampled, junk.flip(1)),
        ref_logprobs=torch.where(mask > 0, old_logprobs + log_ratio + uniform(-2, 2), junk.roll(1)),
    )


def sequences(log_ratios: list[list[float]], advantages: list[float], lengths: list[int] | None = None) -> Inputs:
    """A batch by hand: token log-ratios and one advantage a sequence; rows of equal length, cut to ``lengths``."""
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    rows, width = log_ratio.shape
    mask = (torch.arange(width) < torch.tensor(lengths or [width] * rows).unsqueeze(1)).double()
    old_logprobs = -1 - log_ratio.clamp(min=0)
    return Inputs(
        logprobs=old_logprobs + log_ratio,
        old_logprobs=old_logprobs,
        advantages=torch.tensor(advantages, dtype=torch.float64).unsqueeze(1) * mask,
        mask=mask,
        rollout_logprobs=old_logprobs,
        ref_logprobs=old_logprobs,
    )


class Rollouts(NamedTuple):
    """What advantages are computed from, float64."""

    rewards: Tensor  # [B, T]
    ends: Tensor  # [B, T] bool, true where a reward for the whole completion sits
    group_ids: Tensor  # [B]
    mask: Tensor  # [B, T]
    values: Tensor  # [B, T]


def rollouts(dense: bool = False, even: bool = False) -> Iterator[Rollouts]:
    """Rewarded batches with groups of equal rewards among them.

    Args:
        dense: rewards for every token instead of one for the completion.
        even: groups of three side by side, as TRL wants them; else of one to several in any order, and holes.
    """
    for seed, (groups, width) in enumerate([(1, 4), (2, 3), (4, 9), (7, 1)]):
        generator = torch.Generator().manual_seed(seed)
        rows = 3 * groups
        index = (
            torch.arange(groups).repeat_interleave(3) if even else torch.randint(groups, (rows,), generator=generator)
        )
        lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
        mask = torch.arange(width) < lengths
        if not even:
            mask[:, 1:] &= torch.rand(rows, width - 1, generator=generator) > 0.1
        mask = mask.double()
        outcome = torch.randint(0, 3, (rows, 1), generator=generator).double() / 2
        outcome = torch.where(index.unsqueeze(1) == 0, 0.7, outcome)  # the first group's are all equal
        ends = last_tokens(mask)
        noise = torch.rand(rows, width, generator=generator, dtype=torch.float64)
        rewards = outcome * ends + (noise * mask if dense else 0)
        values = torch.randn(rows, width, generator=generator, dtype=torch.float64) * mask
        yield Rollouts(rewards, ends, index, mask, values)
