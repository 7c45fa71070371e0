"""Products of the same states as one: queries, keys and values, or a feed-forward layer's gate and what it gates.

transformers' layers make three products, normalise queries and keys one after the other, and rotate them likewise. Here
they stay in one tensor for as long as the same is done to them. On one core of a CPU kernels of ours do it; on a GPU
under autocast it is compiled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import Cache, PreTrainedModel

from harness.policy import one_core
from harness.policy.attention import causal_attention, is_padding_free, padding_free_attention
from harness.policy.fusion import autocast_dtype, fused
from harness.policy.kernels import on_one_core, takes_heads, takes_products
from harness.policy.normalization import RMSNorm
from harness.policy.packing import Packing, packed_states
from harness.policy.products import linear_layer

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
        heads, groups, values = self.sizes
        gains = [len(norm.weight) for norm in (self.q_norm, self.k_norm)] if self.normalizes else []
        shaped = groups == values and not heads % groups and all(size == self.head_dim for size in gains)
        self.suits_kernels = takes_heads(self.head_dim) and shaped

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
        return Joint(
            stacked([projection.weight for projection in self.projections()]), self.bias(), *self.normalization()
        )

    def heads(self) -> one_core.Heads:
        """As kernels take them."""
        return one_core.Heads(self.sizes[0], self.sizes[1], self.head_dim, self.scaling)

    def projections(self) -> tuple[nn.Linear, ...]:
        """Those whose products are one."""
        return self.q_proj, self.k_proj, self.v_proj

    def bias(self) -> Tensor | None:
        """[heads x D], where there is one."""
        if self.q_proj.bias is None:
            return None
        return torch.cat([projection.bias for projection in self.projections()])

    def normalization(self) -> tuple[Tensor | None, Tensor | None]:
        """The gain [heads of queries and keys, D] of heads that are normalised, and what is added to mean squares."""
        if not self.normalizes:
            return None, None
        gains = zip((self.q_norm, self.k_norm), self.sizes, strict=False)
        return torch.cat([norm.weight.expand(heads, -1) for norm, heads in gains]), self.q_norm.constant

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
        fits = self.suits_kernels and rotation[0].shape[-1] == self.head_dim
        if packing is not None and fits and on_one_core(hidden):
            arguments = (hidden[0], *joint, *(part[0, :, 0] for part in rotation))
            attended = one_core.Attention.apply(*arguments, self.heads(), packing)
            return self.o_proj(attended.unsqueeze(0))
        states = _turned(hidden, joint, rotation, self.sizes)
        if packing is not None:
            query, key, value = (packing.in_rows(part[0]).transpose(1, 2) for part in states)
            rows = causal_attention(query, key, value, self.scaling).transpose(1, 2)
            return self.o_proj(packing.in_one(rows).flatten(1).unsqueeze(0))
        query, key, value = (part.transpose(1, 2) for part in states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, _ = padding_free_attention(self, query, key, value, mask, self.scaling, **settings)
        return self.o_proj(attended.flatten(2))


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


class GatedFeedForward(nn.Module):
    """A SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes over the parts of ``layer``, under their names.

        Raises:
            AttributeError, ValueError: if it has others.
        """
        super().__init__()
        given: Any = layer
        self.gate_proj, self.up_proj, self.down_proj = given.gate_proj, given.up_proj, given.down_proj
        if len(list(given.parameters())) != 3:
            raise ValueError("it has biases, or other parameters")
        # By itself, since a gate may be clamped where small states do not come.
        weight = self.gate_proj.weight
        probe = torch.linspace(-1e3, 1e3, 3 * weight.shape[1], device=weight.device).view(1, 3, -1)
        expected = given(probe).detach()
        if not torch.allclose(self(probe), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ValueError("it computes something else")

    def joint(self) -> Tensor:
        """[2 x I, H] the weights of the gate, then of what it gates."""
        return stacked([projection.weight for projection in self.projections()])

    def projections(self) -> tuple[nn.Linear, ...]:
        """Those whose products are one."""
        return self.gate_proj, self.up_proj

    def fits_kernels(self, states: Tensor) -> bool:
        """Whether those for one core of a CPU take the layer and such states."""
        width, size = self.down_proj.weight.shape
        fits = self.gate_proj.weight.shape == self.up_proj.weight.shape == (size, width) == (size, states.shape[-1])
        return fits and takes_products(states, width, size, 2 * size)

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] from [..., H]."""
        return self.feed(states, self.joint())

    def feed(self, states: Tensor, joint: Tensor) -> Tensor:
        """[..., H] from [..., H], by what :meth:`joint` gave."""
        if self.fits_kernels(states):
            return one_core.FeedForward.apply(states, joint, self.down_proj.weight)
        both = linear_layer(states, joint)
        rows = both.flatten(0, -2)
        gated = _Gated.apply(rows) if torch.is_grad_enabled() else _gate(rows)
        return self.down_proj(gated.view(*both.shape[:-1], -1))


@fused(rows=1)
def _gate(both: Tensor) -> Tensor:
    """[N, I] from [N, 2 x I]."""
    gate, up = both.float().chunk(2, -1)
    return (silu(gate) * up).to(both.dtype)


@fused(rows=2)
def _gate_backward(gradient: Tensor, both: Tensor) -> Tensor:
    """[N, 2 x I]."""
    gradient, (gate, up) = gradient.float(), both.float().chunk(2, -1)
    sigmoid = gate.sigmoid()
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, gradient * gate * sigmoid], -1).to(both.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _gate(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _gate_backward(gradient, *ctx.saved_tensors)


def stacked(weights: list[Tensor]) -> Tensor:
    """[sum of rows, H] from weights [rows, H], in autocast's precision where it is on.

    Where they lie one behind the other, as copies for sampling do, nothing is copied.
    """
    whole = _whole(weights)
    if whole is not None:
        return whole
    dtype = autocast_dtype(weights[0])
    return torch.cat(weights) if dtype is None else _Stacked.apply(dtype, *weights)


def _whole(weights: list[Tensor]) -> Tensor | None:
    first, width = weights[0], weights[0].shape[1]
    place = first.storage_offset()
    for weight in weights:
        apart = weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or weight.requires_grad or not weight.is_contiguous() or weight.storage_offset() != place:
            return None
        place += weight.numel()
    return first.as_strided((sum(map(len, weights)), width), (width, 1))


class _Stacked(torch.autograd.Function):
    """Copied and rounded at once."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.dtypes, ctx.sizes = [weight.dtype for weight in weights], list(map(len, weights))
        result = weights[0].new_empty(sum(ctx.sizes), *weights[0].shape[1:], dtype=dtype)
        for part, weight in zip(result.split(ctx.sizes), weights, strict=True):
            part.copy_(weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(gradient.split(ctx.sizes), ctx.dtypes, strict=True)
        return None, *(part.to(dtype) for part, dtype in parts)


def _turned(hidden: Tensor, joint: Joint, rotation: Rotation, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Queries, keys and values [B, L, heads, D], the first two normalised and rotated."""
    cos, sin = (part.expand(*hidden.shape[:2], -1, -1).flatten(0, 1) for part in rotation)
    states = linear_layer(hidden, joint.weight, joint.bias).flatten(0, 1).unflatten(-1, (-1, cos.shape[-1]))
    arguments = (states, cos, sin, joint.gain, joint.epsilon, sizes[0], sizes[1])
    turned = _Turned.apply(*arguments) if torch.is_grad_enabled() else _turn(*arguments)
    return [part.view(*hidden.shape[:2], *part.shape[1:]) for part in turned]


@fused(rows=3)
def _turn(
    states: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None, epsilon: Tensor | None, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [N, heads, D] from those one behind the other, and cosines and sines [N, 1, D]."""
    rotated = heads + key_heads
    turned = states[:, :rotated].float()
    if gain is not None and epsilon is not None:
        turned = turned * (turned.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gain
    turned = (turned * cos + turned.roll(cos.shape[-1] // 2, -1) * sin).to(states.dtype)
    return turned[:, :heads].clone(), turned[:, heads:].clone(), states[:, rotated:].clone()


@fused(rows=6)
def _turn_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    epsilon: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the states [N, heads, D] and of the gain [rotated, D]."""
    given = torch.cat([of_query, of_key], 1).float()
    turned = states[:, : given.shape[1]].float()
    of_turned = given * cos + (given * sin).roll(cos.shape[-1] // 2, -1)
    of_gain = None
    if gain is not None and epsilon is not None:
        scale = (turned.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        direction = turned * scale
        along = of_turned * direction
        of_gain = along.sum(0)
        # Along the vector itself nothing passes, since its length is divided out.
        of_turned = (of_turned * gain - direction * (along * gain).mean(-1, keepdim=True)) * scale
    return torch.cat([of_turned.to(states.dtype), of_value.to(states.dtype)], 1), of_gain


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(states, cos, sin, *others[:2])
        return _turn(states, cos, sin, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_gain = _turn_backward(*gradients, *ctx.saved_tensors)
        return of_states, None, None, of_gain, None, None, None


@torch.no_grad()
def join_projections(model: PreTrainedModel) -> None:
    """Put :class:`JointAttention` and :class:`GatedFeedForward` in the place of a model's own layers.

    The model must do without padding, and give what it gave, which is tried.
    """
    if not is_padding_free(model):
        return
    replace_layers(model, {name: JointAttention for name, _ in model.named_modules() if name.endswith(".self_attn")})
    replace_layers(model, {name: GatedFeedForward for name, layer in model.named_modules() if _is_gated(name, layer)})


def _is_gated(name: str, layer: nn.Module) -> bool:
    return name.endswith(".mlp") and {child for child, _ in layer.named_children()} >= {"gate_proj", "up_proj"}


@torch.no_grad()
def replace_layers(model: PreTrainedModel, kinds: dict[str, type[nn.Module]]) -> None:
    """Put modules in the place of those that have these names, if the model then gives what it gave."""
    before = packed_states(model)
    layers = {name: model.get_submodule(name) for name in kinds}
    try:
        for name, kind in kinds.items():
            model.set_submodule(name, kind(layers[name]))
        same = torch.allclose(packed_states(model), before, rtol=1e-3, atol=1e-3)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # layers of other parts
        same = False
    if not same:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
