"""Matrix products in float32 on a CPU: small ones by kernels of our own, others by the faster of torch's two libraries.

torch takes MKL, which keeps its kernels for registers of 512 bits to Intel's processors: on AMD's that have such
registers it reaches less than half of what oneDNN does.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from harness.machine import device_name
from harness.policy.kernels import arrays, takes_products

# Passes without padding fill up their tokens to the next multiple of this, so that the shapes of products come again.
MULTIPLE = 64
# oneDNN takes ten microseconds a call, and compiles a kernel for each new shape: from so many multiplications on it is
# faster for shapes that come again, and for any.
_RECURRING, _ANY = 2**21, 2**26
# So few rows come again anyway: those of decoded tokens.
_FEW_ROWS = 512


@cache
def favours_onednn() -> bool:
    """Whether this processor multiplies float32 matrices faster by oneDNN than by MKL."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and "AMD" in device_name("cpu")


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """[..., N] from [..., K], [N, K] and [N]: as torch's ``linear``, by whatever is fastest; added to [..., N], if that
    is given. No gradients."""
    # What does not fit is torch's to refuse.
    fits = left.shape[-1] == right.shape[1] and (bias is None or len(bias) == len(right))
    if fits and takes_products(left, *right.shape):
        from harness.policy.kernels.cpu import products

        rows = left.reshape(-1, left.shape[-1])
        out = torch.empty(len(rows), len(right))
        there = rows[:0] if onto is None else onto.reshape(out.shape)
        products.linear(*arrays(rows, right, torch.empty(0) if bias is None else bias, there, out))
        return out.view(*left.shape[:-1], len(right))
    if onto is not None:
        return product(left, right, bias).add_(onto)
    if favours_onednn() and _pays(left, len(right)):
        return onednn_product(left, right, bias)
    return functional.linear(left, right, bias)


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] from [..., K], [N, K] and [N] in float32, by oneDNN. No gradients."""
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()  # others take a thousand times as long
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def choose_products(model: PreTrainedModel) -> None:
    """Put :class:`Linear` in the place of a model's linear layers."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Linear(module))


class Linear(nn.Linear):
    """A linear layer by whatever is fastest."""

    def __init__(self, layer: nn.Linear) -> None:
        """Takes over the weights of ``layer``."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., D_out] from [..., D_in]."""
        return linear_layer(states, self.weight, self.bias)


def linear_layer(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] from [..., K], [N, K] and [N], with gradients, by whatever is fastest."""
    if not torch.is_grad_enabled():
        return product(states, weight, bias)
    ours = takes_products(states, *weight.shape) or favours_onednn() and _pays(states, len(weight))
    return (_Linear.apply if ours else functional.linear)(states, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            product(gradient, weight.t()) if of_states else None,
            sum_of_outer_products(rows, states.reshape(-1, states.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """[M, N] from [K, M] and [K, N], by whatever is fastest. No gradients."""
    if takes_products(left, left.shape[1], right.shape[1]):
        from harness.policy.kernels.cpu import products

        out = torch.zeros(left.shape[1], right.shape[1])
        products.outer(*arrays(left, right, out))
        return out
    if left.device.type != "cpu" or left.dtype != torch.float32 or not favours_onednn():
        return left.t() @ right
    # The left one is copied, and the smaller one is the faster to copy.
    if left.shape[1] <= right.shape[1]:
        return onednn_product(left.t(), right.t())
    return onednn_product(right.t(), left.t()).t()


def _pays(states: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies states [..., K] and [columns, K] faster than MKL."""
    multiplications = states.numel() * columns
    if multiplications < _RECURRING or states.device.type != "cpu" or states.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    rows = states.numel() // states.shape[-1]
    return multiplications >= _ANY or rows <= _FEW_ROWS or rows % MULTIPLE == 0
