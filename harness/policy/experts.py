"""Stacked experts by other means than transformers' grouped matrix products.

On a GPU they are in the precision of autocast, which leaves grouped products alone: with float32 weights they would be
computed in float32, one expert after the other, on a GPU that multiplies bfloat16 in one kernel. On a CPU gradients are
in closed form, and a token's experts are added up while they are gathered.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

# Names in a model's configuration.
AUTOCAST_GROUPED_MM = "autocast_grouped_mm"
CLOSED_FORM = "closed_form"


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
    if model.config._experts_implementation == "grouped_mm" and stacked and all(map(_is_closed_form, stacked)):
        model.set_experts_implementation(CLOSED_FORM)


def _is_closed_form(experts: nn.Module) -> bool:
    down: Any = experts.down_proj
    try:
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
    if torch.is_autocast_enabled(hidden.device.type):
        return autocast_grouped_mm(experts, hidden, chosen, weights)
    arguments: Any = (hidden, chosen, weights, experts.gate_up_proj, experts.down_proj)
    return _Experts.apply(*arguments) if torch.is_grad_enabled() else _combine(*arguments)[0]


def _combine(
    hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the chosen experts give, and what the gradient needs; in the order of the experts there are S = tokens x k
    rows. No gradients."""
    order = chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[1]
    ends = chosen.flatten().bincount(minlength=len(down)).cumsum(0).int()
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order))).view(chosen.shape)
    inputs = hidden.index_select(0, tokens)
    projected = functional.grouped_mm(inputs, gate_up.mT, offs=ends)
    gate, up = projected.chunk(2, -1)
    gated = functional.silu(gate)
    inner = gated * up
    outputs = functional.grouped_mm(inner, down.mT, offs=ends)
    combined = functional.embedding_bag(places, outputs, mode="sum", per_sample_weights=weights)
    return combined, (order, tokens, ends, places, inputs, projected, gated, inner)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        combined, kept = _combine(hidden, chosen, weights, gate_up, down)
        ctx.save_for_backward(weights, gate_up, down, *kept)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        weights, gate_up, down, order, tokens, ends, places, inputs, projected, gated, inner = ctx.saved_tensors
        gradient = gradient.index_select(0, tokens)
        of_inner = functional.grouped_mm(gradient, down, offs=ends)  # but for the weights
        of_weights = torch.linalg.vecdot(of_inner, inner)[places]
        # Rows of the inner size are the smaller ones to multiply by the weights.
        scale = weights.flatten().index_select(0, order).unsqueeze(1)
        of_down = functional.grouped_mm(gradient.t(), inner * scale, offs=ends)
        of_inner *= scale
        gate, up = projected.chunk(2, -1)
        of_projected = torch.empty_like(projected)
        of_gate, of_up = of_projected.chunk(2, -1)
        torch.mul(of_inner, gated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_inner.mul_(up), gate, grad_input=of_gate)
        of_inputs = functional.grouped_mm(of_projected, gate_up, offs=ends)
        of_gate_up = functional.grouped_mm(of_projected.t(), inputs, offs=ends)
        return functional.embedding_bag(places, of_inputs, mode="sum"), None, of_weights, of_gate_up, of_down


ALL_EXPERTS_FUNCTIONS.register(AUTOCAST_GROUPED_MM, autocast_grouped_mm)
ALL_EXPERTS_FUNCTIONS.register(CLOSED_FORM, closed_form_experts)
