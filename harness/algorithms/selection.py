"""Tokens that a surrogate treats apart from the others, chosen in a whole optimizer batch.

A registered selection is called as ``fn(advantages, old_logprobs, mask, **settings) -> selected``, all [B, T], with
``selected`` bool, true at chosen tokens. It sees constants alone, so that the choice does not depend on micro-batches.
"""

from typing import Literal

import torch
from torch import Tensor

from harness.algorithms.registry import register
from harness.typed_values import PositiveShare


@register("selection", "none")
def none(advantages: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """No token."""
    return torch.zeros_like(mask, dtype=torch.bool)


@register("selection", "high_covariance", ordered=("low", "high"))
def high_covariance(
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    fraction: PositiveShare,
    low: float | None,
    high: float | None,
    pick: Literal["random", "largest"],
) -> Tensor:
    """Tokens that would lower the entropy most: of large (A - mean A) (l_old - mean l_old) (arXiv 2505.22617).

    ``fraction`` of the batch's valid tokens, at least one, out of those whose covariance lies between ``low`` and
    ``high`` (null: unbounded): the ``largest`` (KL-Cov), or ones at ``random`` (Clip-Cov), by a generator that starts
    anew for each batch. The paper has the log-probabilities of the policy that is trained in the covariance; those of
    the old policy are known before the first micro-batch.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    advantages, old_logprobs = advantages[rows, columns], old_logprobs[rows, columns]
    covariance = (advantages - advantages.mean()) * (old_logprobs - old_logprobs.mean())
    inside = covariance > (-torch.inf if low is None else low)
    inside &= covariance < (torch.inf if high is None else high)
    candidates = inside.nonzero().squeeze(1)
    if pick == "largest":
        order = covariance[candidates].argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).to(candidates.device)
    chosen = candidates[order[: max(1, int(fraction * len(rows)))]]
    selected = torch.zeros_like(mask, dtype=torch.bool)
    selected[rows[chosen], columns[chosen]] = True
    return selected
