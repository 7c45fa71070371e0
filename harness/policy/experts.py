"""Stacked experts by other means than transformers' grouped matrix products.

On a GPU they are in the precision of autocast, which leaves grouped products alone: with float32 weights they would be
computed in float32, one expert after the other, on a GPU that multiplies bfloat16 in one kernel. On one core of a CPU
all experts are one kernel of ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from harness.policy import one_core
from harness.policy.kernels import LANES, arrays, on_one_core

# Names in a model's configuration.
AUTOCAST_GROUPED_MM = "autocast_grouped_mm"
CLOSED_FORM = "closed_form"

_TRANSPOSED: ContextVar[Sequence[np.ndarray]] = ContextVar("transposed", default=())


def follow_autocast(model: PreTrainedModel) -> None:
    """Let the experts of a model that multiplies them by ``grouped_mm`` follow autocast; others do, or cannot."""
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(AUTOCAST_GROUPED_MM)


@torch.no_grad()
def use_closed_form(model: PreTrainedModel) -> None:
    """Let a model on a CPU multiply its experts in closed form, if it asks for ``grouped_mm`` and gets what that gives.

    That is tried: experts with biases, or with another gate than plain SwiGLU, do not.
    """
    stacked = [module for module in model.modules() if isinstance(getattr(module, "down_proj", None), nn.Parameter)]
    if model.config._experts_implementation == "grouped_mm" and stacked and all(map(_gives_the_same, stacked)):
        model.set_experts_implementation(CLOSED_FORM)


def _gives_the_same(experts: nn.Module) -> bool:
    down: Any = experts.down_proj
    try:
        if not _fits(experts) or len(list(experts.parameters())) > 2:
            return False
        hidden = torch.linspace(-1, 1, 3 * down.shape[1]).view(3, -1)
        chosen = torch.tensor([[0, 1], [1, 0], [len(down) - 1, 0]])
        weights = torch.linspace(0.2, 0.8, 6).view(3, 2)
        ours = closed_form_experts(experts, hidden, chosen, weights)
        theirs = grouped_mm_experts_forward(experts, hidden, chosen, weights)
        # By itself, since a gate may be clamped where small states do not come.
        projected = torch.linspace(-1e3, 1e3, 16 * down.shape[2]).view(8, -1)
        gate, up = projected.chunk(2, -1)
        gated: Tensor = experts._apply_gate(projected)  # type: ignore[operator]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # weights of another layout
        return False
    same = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    return same and bool(theirs.any()) and torch.allclose(gated, functional.silu(gate) * up)


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


def closed_form_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Experts with SwiGLU (arXiv 2002.05202) and without biases; arguments and result as above."""
    if not (on_one_core(hidden) and _fits(experts)):
        return autocast_grouped_mm(experts, hidden, chosen, weights)
    arguments: Any = (hidden, chosen, weights, experts.gate_up_proj, experts.down_proj)
    return one_core.Experts.apply(*arguments, _TRANSPOSED.get() or _transposes(experts))


def transposes(experts: nn.Module) -> Sequence[np.ndarray]:
    """What is computed from the weights alone of experts in closed form; none of others."""
    return _transposes(experts) if on_one_core(next(experts.parameters())) and _fits(experts) else ()


def _transposes(experts: Any) -> Sequence[np.ndarray]:
    return arrays(experts.gate_up_proj.mT, experts.down_proj.mT)


@contextmanager
def transposed(weights: Sequence[np.ndarray]) -> Iterator[None]:
    """Let experts that are called inside take these for what :func:`transposes` gives."""
    token = _TRANSPOSED.set(weights)
    try:
        yield
    finally:
        _TRANSPOSED.reset(token)


def _fits(experts: Any) -> bool:
    """Whether the weights are laid out as kernels take them, in sizes that these take."""
    count, width, size = experts.down_proj.shape
    fit = experts.gate_up_proj.shape == (count, 2 * size, width) and not (width % LANES or size % LANES)
    return fit and experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float32


ALL_EXPERTS_FUNCTIONS.register(AUTOCAST_GROUPED_MM, autocast_grouped_mm)
ALL_EXPERTS_FUNCTIONS.register(CLOSED_FORM, closed_form_experts)
