"""Layers on one core of a CPU: kernels of ours with their gradients, where they take the layers' sizes.

Kernels are imported where they are called: a GPU's processes never do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from harness.policy.kernels import LANES, NO_LOGIT, arrays
from harness.policy.products import product, sum_of_outer_products

if TYPE_CHECKING:
    from harness.policy.packing import Packing


class FeedForward(torch.autograd.Function):
    """A SwiGLU layer: [..., H] from [..., H]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        out, both = _feed_forward(rows, gate_up, down, rows[:0])
        ctx.save_for_backward(rows, gate_up, down, both)
        return out.view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        of_rows, *of_weights = _feed_forward_backward(gradient.reshape(saved[0].shape), *saved)
        return of_rows.view(gradient.shape), *of_weights


class Normalization(torch.autograd.Function):
    """Root mean square layer normalization of rows [N, D]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        normalized, scale = _normalize(states, gain, epsilon)
        ctx.save_for_backward(states, gain, scale)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        states, gain, scale = ctx.saved_tensors
        return *_normalize_backward(gradient, states, gain, scale, gradient[:0]), None


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
        heads: "Heads",
        packing: "Packing",
    ) -> Tensor:
        added = None if epsilon is None else float(epsilon)
        attended, *between = attend(hidden, weight, bias, gain, added, cos, sin, heads, packing)
        ctx.save_for_backward(hidden, weight, bias, gain, cos, sin, *between)
        ctx.others = added, heads, packing
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_attend_backward(gradient, *ctx.saved_tensors, *ctx.others), *[None] * 5


class Attending(torch.autograd.Function):
    """The first half of a layer: tokens [N, H] of a pass without padding, and what they attend to added to them."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        norm: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        output: Tensor,
        output_bias: Tensor | None,
        epsilons: tuple[float, float],
        cos: Tensor,
        sin: Tensor,
        heads: "Heads",
        packing: "Packing",
    ) -> Tensor:
        normalized, scale = _normalize(tokens, norm, epsilons[0])
        weight, gain = torch.cat([query, key, value]), None
        if query_norm is not None and key_norm is not None:
            gain = torch.cat([query_norm.expand(heads.queries, -1), key_norm.expand(heads.keys, -1)])
        attended, *between = attend(normalized, weight, bias, gain, epsilons[1], cos, sin, heads, packing)
        ctx.save_for_backward(tokens, norm, scale, output, attended, normalized, weight, bias, gain, cos, sin, *between)
        ctx.others = epsilons[1], heads, packing
        return product(attended, output, output_bias, onto=tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm, scale, output, attended, *saved = ctx.saved_tensors
        heads: Heads = ctx.others[1]
        gradient = gradient.contiguous()
        of_normalized, of_weight, of_bias, of_gain = _attend_backward(
            product(gradient, output.t()), *saved, *ctx.others
        )
        of_tokens, of_norm = _normalize_backward(of_normalized, tokens, norm, scale, gradient)
        counts = heads.queries, heads.keys, heads.keys
        of_query, of_key, of_value = of_weight.split([count * heads.dim for count in counts])
        of_query_norm, of_key_norm = (
            (None, None) if of_gain is None else (of_gain[: heads.queries].sum(0), of_gain[heads.queries :].sum(0))
        )
        return (
            of_tokens, of_norm, of_query, of_key, of_value, of_bias, of_query_norm, of_key_norm,
            sum_of_outer_products(gradient, attended), gradient.sum(0) if ctx.needs_input_grad[9] else None,
            *[None] * 5,
        )  # fmt: skip


class Feeding(torch.autograd.Function):
    """The second half: tokens [N, H], and what a SwiGLU layer makes of them added to them."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm: Tensor, epsilon: float, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        normalized, scale = _normalize(tokens, norm, epsilon)
        gate_up = torch.cat([gate, up])
        out, both = _feed_forward(normalized, gate_up, down, tokens)
        ctx.save_for_backward(tokens, norm, scale, normalized, gate_up, down, both)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm, scale, *saved = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_normalized, of_gate_up, of_down = _feed_forward_backward(gradient, *saved)
        of_tokens, of_norm = _normalize_backward(of_normalized, tokens, norm, scale, gradient)
        return of_tokens, of_norm, None, *of_gate_up.chunk(2), of_down


class Scores(torch.autograd.Function):
    """Log-probabilities [M] of tokens [M] and entropies [M], from hidden states [M, H] and a linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        from harness.policy.kernels.cpu import vocabulary

        count, more, scale = len(weight), -len(weight) % LANES, 1 / temperature
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
            raise IndexError(f"tokens {tokens.min()} to {tokens.max()} of a vocabulary of {count}")
        added = torch.zeros(count) if bias is None else bias
        added, weight = (
            functional.pad(added, (0, more), value=NO_LOGIT * min(1.0, temperature)),
            functional.pad(weight, (0, 0, 0, more)),
        )
        every, chosen, entropies = (torch.empty(len(states), *shape) for shape in ((count + more,), (), ()))
        vocabulary.score(*arrays(states, weight, added, tokens), scale, *arrays(every, chosen, entropies))
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(every, entropies, tokens, states, weight)
        ctx.others = scale, count, entropy_gradient
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_chosen: Tensor, by_entropy: Tensor) -> tuple[Tensor | None, ...]:
        from harness.policy.kernels.cpu import vocabulary

        saved = ctx.saved_tensors
        *_, states, weight = saved
        scale, count, entropy_gradient = ctx.others
        by_entropy = by_entropy if entropy_gradient else torch.zeros(len(states))
        of_states, of_weight, of_bias = torch.empty(states.shape), torch.zeros(weight.shape), torch.zeros(len(weight))
        gradients = of_states, of_weight, of_bias
        vocabulary.score_backward(*arrays(by_chosen, by_entropy, *saved), scale, *arrays(*gradients))
        return of_states, of_weight[:count], of_bias[:count] if ctx.needs_input_grad[2] else None, None, None, None


class Heads(NamedTuple):
    """How many there are of queries, and of keys and values; their size; and what scores are multiplied by."""

    queries: int
    keys: int
    dim: int
    scaling: float


def _normalize(states: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Vectors [N, D] over their root mean square, times the gain [D]; and one over that [N]."""
    from harness.policy.kernels.cpu import elements

    normalized, scale = torch.empty(states.shape), torch.empty(len(states))
    elements.normalize(*arrays(states, gain), epsilon, *arrays(normalized, scale))
    return normalized, scale


def _normalize_backward(
    gradient: Tensor, states: Tensor, gain: Tensor, scale: Tensor, onto: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the states, added to [N, D] or [0, D], and of the gain."""
    from harness.policy.kernels.cpu import elements

    of_states, of_gain = torch.empty(states.shape), torch.zeros(gain.shape)
    elements.normalize_backward(*arrays(gradient, states, gain, scale, onto, of_states, of_gain))
    return of_states, of_gain


def _feed_forward(states: Tensor, gate_up: Tensor, down: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """[N, H] from [N, H], added to [N, H] or [0, H]; and what comes into the gate [N, 2 x I]."""
    from harness.policy.kernels.cpu import products

    both, out = torch.empty(len(states), len(gate_up)), torch.empty(states.shape)
    products.feed_forward(*arrays(states, gate_up, down, both, onto, out))
    return out, both


def _feed_forward_backward(
    gradient: Tensor, states: Tensor, gate_up: Tensor, down: Tensor, both: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from harness.policy.kernels.cpu import products

    of_states, of_gate_up, of_down = torch.empty(states.shape), torch.zeros(gate_up.shape), torch.zeros(down.shape)
    products.feed_forward_backward(*arrays(gradient, states, gate_up, down, both, of_states, of_gate_up, of_down))
    return of_states, of_gate_up, of_down


@dataclass(frozen=True)
class Rows:
    """What :func:`attend` wants to know of a pass, as :class:`harness.policy.packing.Packing` knows it."""

    places: list[np.ndarray]
    count: int


def attend(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    epsilon: Tensor | float | None,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
    packing: "Packing | Rows",
) -> tuple[Tensor, ...]:
    """[N, heads x D] from [N, H]; and heads before and after they are turned, and what weights were divided by. Tokens
    from ``packing.count`` on may be in no row, and then attend to nothing."""
    from harness.policy.kernels.cpu import attention, elements

    states = product(hidden, weight, bias).unflatten(-1, (-1, heads.dim))
    turned, constants = torch.empty(states.shape), head_constants(gain, epsilon, heads.dim)
    elements.turn(*arrays(states), *constants, *arrays(cos, sin), heads.queries + heads.keys, *arrays(turned))
    attended, sums = torch.empty(len(hidden), heads.queries, heads.dim), torch.empty(2, len(hidden), heads.queries)
    attended[packing.count :] = 0
    attention.attend(
        *arrays(turned), *packing.places, heads.queries, heads.keys, heads.scaling, *arrays(attended, *sums)
    )
    return attended.flatten(1), states, turned, sums


def _attend_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    states: Tensor,
    turned: Tensor,
    sums: Tensor,
    epsilon: float | None,
    heads: Heads,
    packing: "Packing",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the states, the weight, its bias and the gain."""
    from harness.policy.kernels.cpu import attention, elements

    of_turned = torch.zeros(turned.shape)
    attention.attend_backward(
        *arrays(gradient.unflatten(-1, (-1, heads.dim)), turned), *packing.places, heads.queries, heads.keys,
        heads.scaling, *arrays(*sums, of_turned),
    )  # fmt: skip
    of_states, constants = torch.empty(states.shape), head_constants(gain, epsilon, heads.dim)
    of_gain = torch.zeros(constants[0].shape)
    elements.turn_backward(
        *arrays(of_turned, states), *constants, *arrays(cos, sin), heads.queries + heads.keys,
        *arrays(of_states, of_gain),
    )  # fmt: skip
    rows = of_states.flatten(1)
    return (
        product(rows, weight.t()),
        sum_of_outer_products(rows, hidden),
        None if bias is None else rows.sum(0),
        None if gain is None else of_gain,
    )


def head_constants(gain: Tensor | None, epsilon: Tensor | float | None, dim: int) -> tuple[np.ndarray, float]:
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
        projected, combined = torch.empty(slots + 3, 2 * size), torch.zeros(hidden.shape)
        kernels.combine(*arrays(hidden, weights, ends, order), *transposed, *arrays(projected, combined))
        ctx.save_for_backward(hidden, weights, ends, order, gate_up, down, projected)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from harness.policy.kernels.cpu import experts as kernels

        saved = ctx.saved_tensors
        hidden, weights, *_, gate_up, down, _ = saved
        of_hidden, of_weights = torch.zeros(hidden.shape), torch.empty(weights.shape)
        of_gate_up, of_down = torch.empty(gate_up.shape), torch.empty(down.shape)
        gradients = of_hidden, of_weights, of_gate_up, of_down
        kernels.combine_backward(*arrays(gradient, *saved, *gradients))
        return of_hidden, None, of_weights, of_gate_up, of_down, None
