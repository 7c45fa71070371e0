"""Queries, keys and values of an attention layer as one product, on a CPU.

transformers' layers make three products, normalise queries and keys one after the other, and rotate them likewise. Here
they stay in one tensor for as long as the same is done to them, with gradients in closed form.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache, PreTrainedModel

from harness.policy.attention import causal_attention, is_padding_free, padding_free_attention
from harness.policy.normalization import RMSNorm, inverse_rms
from harness.policy.packing import Packing, packed_states
from harness.policy.products import product, sum_of_outer_products

# [B, L, 1, D] cosine and sine of each place in a head.
Rotation = tuple[Tensor, Tensor]

_PARAMETERS = {f"{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj", "o_proj") for kind in ("weight", "bias")}
_PARAMETERS |= {"q_norm.weight", "k_norm.weight"}


class Joint(NamedTuple):
    """Weights of the product; heads are those of queries, then of keys, then of values."""

    weight: Tensor  # [heads x D, H]
    bias: Tensor | None  # [heads x D]
    gain: Tensor | None  # [heads of queries and keys, D], where they are normalised
    epsilon: Tensor | None  # what is added to their mean square


def half_turned(cos: Tensor, sin: Tensor) -> Rotation:
    """Transformers' position embeddings [B, L, D], the sine negative where the second half of a head is turned to."""
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return cos.unsqueeze(2), sin.unsqueeze(2)


class JointAttention(nn.Module):
    """An attention layer with heads, optionally normalised (arXiv 2010.04245), that are rotated (arXiv 2104.09864)."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes over the parts of ``layer``, under their names.

        Raises:
            AttributeError, ValueError: if it has others.
        """
        super().__init__()
        given: Any = layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(given, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.normalizes = hasattr(given, "q_norm")
        if self.normalizes:
            self.q_norm, self.k_norm = given.q_norm, given.k_norm
            if not (isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm)):
                raise ValueError("heads are normalised in another way")
        _check_arithmetic(given)
        # Read by transformers' attention functions and by its caches.
        self.layer_idx, self.scaling, self.head_dim = given.layer_idx, given.scaling, given.head_dim
        self.num_key_value_groups, self.is_causal = given.num_key_value_groups, True
        self.sizes = [
            projection.out_features // self.head_dim for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """As the layers that it stands in for: [B, L, H] from [B, L, H], and no attention weights."""
        rotation = half_turned(*position_embeddings)
        attended = self.attend(
            hidden_states, self.joint(), rotation, attention_mask, past_key_values, packing, **settings
        )
        return attended, None

    def joint(self) -> Joint:
        """What is computed from the weights alone; it stays the same until they change."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        bias, gain, epsilon = None, None, None
        if self.q_proj.bias is not None:
            bias = torch.cat([projection.bias for projection in projections])
        if self.normalizes:
            gains = zip((self.q_norm, self.k_norm), self.sizes, strict=False)
            gain = torch.cat([norm.weight.expand(heads, -1) for norm, heads in gains])
            epsilon = self.q_norm.constant
        return Joint(weight, bias, gain, epsilon)

    def attend(
        self,
        hidden: Tensor,
        joint: Joint,
        rotation: Rotation,
        mask: Tensor | None,
        cache: Cache | None,
        packing: Packing | None = None,
        **settings: Any,
    ) -> Tensor:
        """[B, L, H] from [B, L, H].

        Args:
            hidden: the states.
            joint: what :meth:`joint` gave.
            rotation: what :func:`half_turned` made of transformers' position embeddings.
            mask: as transformers' attention functions take it.
            cache: of the keys and values before.
            packing: where tokens of a pass without padding belong.
            settings: for transformers' attention functions.
        """
        arguments = (hidden, *joint, *rotation, self.sizes[0] + self.sizes[1])
        states = _Projections.apply(*arguments) if torch.is_grad_enabled() else _project(*arguments)[0]
        if packing is not None:
            query, key, value = self._split(packing.in_rows(states[0]))
            rows = causal_attention(query, key, value, self.scaling).transpose(1, 2)
            return self.o_proj(packing.in_one(rows).flatten(1).unsqueeze(0))
        query, key, value = self._split(states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, _ = padding_free_attention(self, query, key, value, mask, self.scaling, **settings)
        return self.o_proj(attended.flatten(2))

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        """[B, heads, L, D] each, from [B, L, heads + 2 key heads, D]."""
        return states.transpose(1, 2).split(self.sizes, 1)


def _check_arithmetic(layer: Any) -> None:
    """Refuse a layer that does more to its states where a few fresh tokens need not show it.

    Raises:
        ValueError: for such a layer.
    """
    if {name for name, _ in layer.named_parameters()} - _PARAMETERS:
        raise ValueError("it has other parameters")
    if getattr(layer.config, "clip_qkv", None) is not None:
        raise ValueError("states are clipped, large ones alone")
    if "llama_4_scaling_beta" in (getattr(layer.config, "rope_parameters", None) or {}):
        raise ValueError("queries are scaled, far from the beginning alone")


def _project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    epsilon: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotated: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """States [B, L, heads, D] of which the first are normalised and rotated; and for the gradient their direction and
    one over their root mean square. No gradients."""
    states = product(hidden, weight, bias).unflatten(-1, (-1, cos.shape[-1]))
    turned = gained = states[..., :rotated, :]
    direction, scale = None, None
    if gain is not None and epsilon is not None:
        scale = inverse_rms(turned, epsilon)
        direction = turned * scale
        gained = direction * gain
    torch.addcmul(gained.roll(cos.shape[-1] // 2, -1).mul_(sin), gained, cos, out=turned)
    return states, direction, scale


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        states, direction, scale = _project(*arguments)
        hidden, weight, bias, gain, _, cos, sin, ctx.rotated = arguments
        ctx.save_for_backward(hidden, weight, bias, gain, direction, scale, cos, sin)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, gain, direction, scale, cos, sin = ctx.saved_tensors
        of_states = gradient.clone(memory_format=torch.contiguous_format)
        turned = of_states[..., : ctx.rotated, :]
        of_gained = torch.addcmul((turned * sin).roll(cos.shape[-1] // 2, -1), turned, cos)
        of_gain = None
        if gain is None:
            turned.copy_(of_gained)
        else:
            along = of_gained * direction
            of_gain = along.flatten(0, -3).sum(0)
            # Along the vector itself nothing passes, since its length is divided out.
            along = along.mul_(gain).mean(-1, keepdim=True)
            torch.mul(of_gained.mul_(gain).addcmul_(direction, along, value=-1), scale, out=turned)
        of_states = of_states.flatten(-2)
        rows = of_states.flatten(0, -2)
        of_weight = sum_of_outer_products(rows, hidden.flatten(0, -2))
        of_bias = None if bias is None else rows.sum(0)
        return product(of_states, weight.t()), of_weight, of_bias, of_gain, None, None, None, None


@torch.no_grad()
def join_projections(model: PreTrainedModel) -> None:
    """Put :class:`JointAttention` in the place of the attention layers of a model that does without padding.

    It must give what they gave, which is tried.
    """
    if not is_padding_free(model):
        return
    layers = {name: module for name, module in model.named_modules() if name.endswith(".self_attn")}
    before = packed_states(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, JointAttention(layer))
        same = torch.allclose(packed_states(model), before, rtol=1e-3, atol=1e-3)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # layers of other parts
        same = False
    if not same:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
