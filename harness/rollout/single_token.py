"""A decoded token's way through a model, and on a GPU that of prompts, without what transformers' modules cost.

With a few sequences the calls, or on a GPU the small kernels, take longer than the arithmetic. So what most models
share is gone through here, and what they differ in is left to their modules: embeddings, attention, feed-forward layers
or experts, normalisation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import Cache, PreTrainedModel

from harness.policy.fusion import compiles
from harness.policy.loading import decoder
from harness.policy.normalization import RMSNorm
from harness.policy.projections import GatedFeedForward, Joint, JointAttention, Rotation, half_turned
from harness.rollout.cache import FixedLayer
from harness.rollout.trial import gives_the_same
from harness.rollout.weights import SamplingWeights


class SingleTokenDecoder(SamplingWeights):
    """The policy as rollouts see it, where :meth:`suits` says that this gives the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._joint: list[_Joint] = []

    def refresh(self) -> None:
        """Take over the policy's weights as they are now."""
        super().refresh()
        layers: Any = decoder(self.model).layers
        if self.copies and self._joint:  # CUDA graphs read them where they are
            for layer, held in zip(layers, self._joint, strict=True):
                beside = layer.self_attn.bias(), *layer.self_attn.normalization()
                for kept, now in zip(held.attention[1:], beside, strict=True):
                    if kept is not None:
                        kept.copy_(now)
        else:
            self._joint = self._by_copies(lambda: [_Joint.of(layer) for layer in layers])

    @classmethod
    def suits(cls, model: PreTrainedModel) -> bool:
        """Whether the model has the layers that are gone through here, which is tried once."""
        return gives_the_same(cls, model)

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits [n, V] of each row's next token."""
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        arguments = tuple(inputs[name] for name in names)
        if self.copies or inputs["input_ids"].shape[1] == 1:
            return self._by_copies(self._decode, *arguments)
        return super().__call__(**inputs)

    def _by_copies(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function that goes through the model gives with the copies in the place of its weights."""
        if not self.copies:
            return function(*arguments)
        copies = {f"model.{name}": copy for name, copy in self.copies.items()}
        return functional_call(_Through(self.model, function), copies, arguments, tie_weights=False)

    def _decode(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """Logits [n, V] after the last of tokens [n, W] at positions [n, W], which see what the mask says."""
        network: Any = decoder(self.model)
        states = network.embed_tokens(tokens)
        rotation = half_turned(*network.rotary_emb(states, positions))
        normalized = network.layers[0].input_layernorm(states)
        followers = [*(layer.input_layernorm for layer in network.layers[1:]), network.norm]
        for layer, joint, follower in zip(network.layers, self._joint, followers, strict=True):
            update = _attend(layer.self_attn, normalized, joint.attention, rotation, mask, cache)
            states, normalized = _add(states, update, layer.post_attention_layernorm)
            update = layer.mlp(normalized) if joint.gated is None else layer.mlp.feed(normalized, joint.gated)
            states, normalized = _add(states, update, follower)
        return self.model.get_output_embeddings()(normalized[:, -1])


def _attend(
    attention: JointAttention, states: Tensor, joint: Joint, rotation: Rotation, mask: Tensor | None, cache: Cache
) -> Tensor:
    """[n, W, H] from states [n, W, H]."""
    held = cache.layers[attention.layer_idx]
    if mask is None or not (isinstance(held, FixedLayer) and _in_kernels(held.states[0])):
        return attention.attend(states, joint, rotation, mask, cache)
    from harness.policy.kernels.gpu import attend_once, place_states

    projected = linear(states[:, 0], joint.weight, joint.bias).unflatten(-1, (-1, attention.head_dim))
    (cos, sin), (keys, values) = (part.reshape(len(states), -1) for part in rotation), held.states
    query = place_states(projected, joint.gain, joint.epsilon, cos, sin, keys, values, held.column, attention.sizes[0])
    attended = attend_once(query, keys, values, mask[:, 0, 0], held.column, attention.scaling)
    return attention.o_proj(attended.flatten(1).unsqueeze(1))


def _add(states: Tensor, update: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The sum, and the same normalised."""
    if isinstance(norm, RMSNorm) and _in_kernels(update):
        from harness.policy.kernels.gpu import add_and_normalize

        rows = (states.flatten(0, -2), update.flatten(0, -2))
        summed, normalized = add_and_normalize(*rows, norm.weight, norm.constant)
        return summed.view(states.shape), normalized.view(states.shape)
    states = states + update
    return states, norm(states)


def _in_kernels(states: Tensor) -> bool:
    """Whether there are kernels for states of this kind."""
    return states.is_cuda and states.dtype in (torch.bfloat16, torch.float16) and compiles()


class _Joint(NamedTuple):
    """What is computed from a layer's weights alone."""

    attention: Joint
    gated: Tensor | None  # of a feed-forward layer with a gate, where that is one product

    @classmethod
    def of(cls, layer: Any) -> "_Joint":
        gated = layer.mlp.joint() if isinstance(layer.mlp, GatedFeedForward) else None
        return cls(layer.self_attn.joint(), gated)


class _Through(nn.Module):
    """The call of a function that goes through a model, as a module, whose weights can be exchanged for the time."""

    def __init__(self, model: PreTrainedModel, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)
