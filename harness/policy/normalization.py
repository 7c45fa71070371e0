"""Root-mean-square normalisation in one kernel; transformers' own models take eight operations, and as many gradients.

On one core of a CPU it is ours. On a GPU under autocast either direction is compiled, and gives what products take.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from harness.policy import one_core
from harness.policy.fusion import autocast_dtype, compiles, fused
from harness.policy.kernels import on_one_core


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv 1910.07467, equation 4), in the precision of its weight.

    Under autocast on a GPU what it gives is rounded to autocast's precision.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        """
        Args:
            weight: [D], the gain.
            epsilon: added to the mean square.
        """
        super().__init__()
        self.weight, self.epsilon = weight, epsilon
        self.constant: Tensor
        self.register_buffer("constant", weight.new_tensor(epsilon), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D], each vector over its root mean square, times the gain."""
        dtype = autocast_dtype(states)
        if dtype is not None:
            given = (states.reshape(-1, states.shape[-1]), self.weight, self.constant, dtype)
            normalized = _FusedRMSNorm.apply(*given) if torch.is_grad_enabled() else _normalize(*given)
            return normalized.view(states.shape)
        states = states.to(self.weight.dtype)  # torch has no kernel for two precisions
        if on_one_core(states) and states.shape[-1] == len(self.weight):
            rows = states.reshape(-1, states.shape[-1])
            return one_core.Normalization.apply(rows, self.weight, self.epsilon).view(states.shape)
        return nn.functional.rms_norm(states, self.weight.shape, self.weight, self.epsilon)


@fused(rows=1)
def _normalize(states: Tensor, weight: Tensor, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, D] from [N, D]."""
    states = states.float()
    return (states * _inverse_rms(states, epsilon) * weight).to(dtype)


def _normalize_backward(gradient: Tensor, states: Tensor, weight: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states [N, D] and of the gain [D]."""
    dtype, gradient, states = states.dtype, gradient.float(), states.float()
    scale = _inverse_rms(states, epsilon)
    normalized = states * scale
    product = gradient * normalized
    along = (product * weight).mean(-1, keepdim=True)
    return ((gradient * weight - normalized * along) * scale).to(dtype), product.sum(0)


def _inverse_rms(states: Tensor, epsilon: Tensor) -> Tensor:
    return (states.square().mean(-1, keepdim=True) + epsilon).rsqrt()


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, weight, epsilon)
        return _normalize(states, weight, epsilon, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        differentiate = _normalize_backward
        if gradient.is_cuda and compiles():
            from harness.policy.kernels.gpu import normalization_gradients as differentiate
        return *differentiate(gradient, *ctx.saved_tensors), None, None


@torch.no_grad()
def fuse_normalization(model: PreTrainedModel) -> None:
    """Put :class:`RMSNorm` in the place of a float32 model's own, where they give what it gives, which is tried.

    Others have a gain of their own making (1 + weight), or another input besides.
    """
    for name, module in list(model.named_modules()):
        if not type(module).__name__.endswith("RMSNorm") or len(inspect.signature(module.forward).parameters) != 1:
            continue
        weight, epsilon = (getattr(module, field, None) for field in ("weight", "variance_epsilon"))
        if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
            continue
        fused = RMSNorm(weight, epsilon)
        # Small enough for the constant that is added to count.
        probe = torch.linspace(-1, 1, 3 * len(weight), device=weight.device).view(3, -1) * epsilon**0.5
        if torch.allclose(fused(probe), module(probe), rtol=1e-4, atol=1e-6):
            model.set_submodule(name, fused)
