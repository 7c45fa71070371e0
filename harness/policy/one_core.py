"""Layers on one core of a CPU: kernels of ours with their gradients, where they take the layers' sizes.

Kernels are imported where they are called: a GPU's processes never do.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.policy.kernels import arrays
from harness.policy.products import product, sum_of_outer_products

if TYPE_CHECKING:
    from harness.policy.packing import Packing


class FeedForward(torch.autograd.Function):
    """A SwiGLU layer: [..., H] from [..., H]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        from harness.policy.kernels.cpu import products

        rows = states.reshape(-1, states.shape[-1])
        both, gated = torch.empty(len(rows), len(gate_up)), torch.empty(len(rows), down.shape[1])
        out = torch.empty(rows.shape)
        products.feed_forward(*arrays(rows, gate_up, down, both, gated, out))
        ctx.save_for_backward(rows, gate_up, down, both, gated)
        return out.view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from harness.policy.kernels.cpu import products

        saved = ctx.saved_tensors
        rows, gate_up, down, *_ = saved
        of_states, of_gate_up, of_down = torch.empty(rows.shape), torch.zeros(gate_up.shape), torch.zeros(down.shape)
        given = arrays(gradient.reshape(rows.shape), *saved, of_states, of_gate_up, of_down)
        products.feed_forward_backward(*given)
        return of_states.view(gradient.shape), of_gate_up, of_down


class Normalization(torch.autograd.Function):
    """Root mean square layer normalization of rows [N, D]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from harness.policy.kernels.cpu import elements

        normalized, scale = torch.empty(states.shape), torch.empty(len(states))
        given, gain = arrays(states, weight)
        elements.normalize(given, gain, epsilon, normalized.numpy(), scale.numpy())
        ctx.save_for_backward(states, weight, scale)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        from harness.policy.kernels.cpu import elements

        states, weight, scale = ctx.saved_tensors
        of_states, of_weight = torch.empty(states.shape), torch.zeros_like(weight)
        elements.normalize_backward(*arrays(gradient, states, weight, scale, of_states, of_weight))
        return of_states, of_weight, None


class Attention(torch.autograd.Function):
    """From hidden states [N, H] of a pass without padding to what their heads attend to [N, heads x D]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        epsilon: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        sizes: Sequence[int],
        scaling: float,
        packing: "Packing",
    ) -> Tensor:
        from harness.policy.kernels.cpu import attention, elements

        (heads, groups, _), dim = sizes, cos.shape[-1]
        states = product(hidden, weight, bias).unflatten(-1, (-1, dim))
        turned, constants = torch.empty(states.shape), head_constants(gain, epsilon, cos.shape[-1])
        elements.turn(*arrays(states), *constants, *arrays(cos, sin), heads + groups, turned.numpy())
        attended = torch.zeros(len(hidden), heads, dim)
        sums = torch.empty(2, len(hidden), heads)
        places = arrays(*packing.places())
        attention.attend(turned.numpy(), *places, heads, groups, scaling, *arrays(attended, *sums))
        ctx.save_for_backward(hidden, weight, bias, gain, epsilon, cos, sin, states, turned, sums)
        ctx.sizes, ctx.scaling, ctx.places = sizes, scaling, places
        return attended.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from harness.policy.kernels.cpu import attention, elements

        hidden, weight, bias, gain, epsilon, cos, sin, states, turned, sums = ctx.saved_tensors
        heads, groups, _ = ctx.sizes
        of_turned = torch.zeros(turned.shape)
        attention.attend_backward(
            *arrays(gradient.unflatten(-1, (heads, -1)), turned), *ctx.places, heads, groups, ctx.scaling,
            *arrays(*sums, of_turned),
        )  # fmt: skip
        of_states, constants = torch.empty(states.shape), head_constants(gain, epsilon, cos.shape[-1])
        of_gain = torch.zeros(constants[0].shape)
        elements.turn_backward(
            *arrays(of_turned, states), *constants, *arrays(cos, sin), heads + groups, *arrays(of_states, of_gain)
        )
        rows = of_states.flatten(1)
        of_hidden, of_weight = product(rows, weight.t()), sum_of_outer_products(rows, hidden)
        of_bias = None if bias is None else rows.sum(0)
        return of_hidden, of_weight, of_bias, None if gain is None else of_gain, *[None] * 6


def head_constants(gain: Tensor | None, epsilon: Tensor | None, dim: int) -> tuple[np.ndarray, float]:
    """Of the normalisation of heads, as kernels take them; without one there are no gains."""
    if gain is None or epsilon is None:
        return np.empty((0, dim), np.float32), 0.0
    return arrays(gain)[0], float(epsilon)


class Experts(torch.autograd.Function):
    """Stacked experts with SwiGLU: [tokens, H] from [tokens, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        chosen: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        transposed: Sequence[np.ndarray],
    ) -> Tensor:
        from harness.policy.kernels.cpu import experts as kernels

        slots, (experts, _, size) = chosen.numel(), down.shape
        ends, order = torch.empty(experts, dtype=torch.long), torch.empty(slots, dtype=torch.long)
        kernels.sort(*arrays(chosen, ends, order))
        # The kernel writes four rows at a time.
        projected, inner = torch.empty(slots + 3, 2 * size), torch.empty(slots + 3, size)
        combined = torch.zeros(hidden.shape)
        kernels.combine(*arrays(hidden, weights, ends, order), *transposed, *arrays(projected, inner, combined))
        ctx.save_for_backward(hidden, weights, ends, order, gate_up, down, projected, inner)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from harness.policy.kernels.cpu import experts as kernels

        saved = ctx.saved_tensors
        hidden, weights, *_, gate_up, down, _, _ = saved
        of_hidden, of_weights = torch.zeros(hidden.shape), torch.empty(weights.shape)
        of_gate_up, of_down = torch.empty(gate_up.shape), torch.empty(down.shape)
        gradients = of_hidden, of_weights, of_gate_up, of_down
        kernels.combine_backward(*arrays(gradient, *saved, *gradients))
        return of_hidden, None, of_weights, of_gate_up, of_down, None
