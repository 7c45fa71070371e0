"""Shaping of the training reward by what the completion looks like.

A registered shaping is called as ``fn(rewards, lengths, max_tokens, **settings) -> rewards`` with ``rewards`` [B]
(float32, one a completion), ``lengths`` [B] (its tokens) and the length at which completions are cut.
"""

from torch import Tensor

from harness.algorithms.registry import register
from harness.typed_values import Count, NotNegative


@register("shaping", "none")
def none(rewards: Tensor, lengths: Tensor, max_tokens: int) -> Tensor:
    """The reward as it is."""
    return rewards


@register("shaping", "overlong")
def overlong(rewards: Tensor, lengths: Tensor, max_tokens: int, *, buffer: Count, penalty: NotNegative) -> Tensor:
    """A penalty that grows from 0 to ``penalty`` over the last ``buffer`` tokens (DAPO, arXiv 2503.14476, eq. 13)."""
    excess = (lengths - (max_tokens - buffer)).clamp(min=0) / buffer
    return rewards - penalty * excess.clamp(max=1.0)
