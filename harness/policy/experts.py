"""Stacked experts in the precision of autocast, which leaves transformers' grouped matrix products alone.

With float32 weights they would be computed in float32, one expert after the other, on a GPU that multiplies bfloat16
in one kernel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

AUTOCAST_GROUPED_MM = "autocast_grouped_mm"  # the name in a model's configuration


def follow_autocast(model: PreTrainedModel) -> None:
    """Let the experts of a model that multiplies them by ``grouped_mm`` follow autocast; others do, or cannot."""
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(AUTOCAST_GROUPED_MM)


def autocast_grouped_mm(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' ``grouped_mm``, with the experts' weights cast where autocast is on.

    Args:
        experts: the module that holds them.
        hidden: [tokens, H].
        chosen: [tokens, k] experts.
        weights: [tokens, k] of each.

    Returns:
        [tokens, H].
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        experts = _Cast(experts, torch.get_autocast_dtype(kind))  # type: ignore[assignment]
    return grouped_mm_experts_forward(experts, hidden, chosen, weights)


class _Cast:
    """A module seen with its weights in another precision; gradients go to its own."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


ALL_EXPERTS_FUNCTIONS.register(AUTOCAST_GROUPED_MM, autocast_grouped_mm)
