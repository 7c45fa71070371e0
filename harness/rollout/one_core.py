"""Prompts' and decoded tokens' way through a model on one core of a CPU; half of a layer of the latter is a kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from harness.policy.experts import transposed, transposes
from harness.policy.kernels import LANES, WIDEST, arrays, on_one_core
from harness.policy.loading import decoder
from harness.policy.normalization import RMSNorm
from harness.policy.one_core import Rows, attend, head_constants
from harness.policy.products import product
from harness.policy.projections import GatedFeedForward, Joint, JointAttention, half_turned
from harness.policy.routing import is_experts
from harness.rollout.trial import gives_the_same
from harness.rollout.weights import SamplingWeights


class OneCoreDecoder(SamplingWeights):
    """The policy as rollouts see it, where :meth:`suits` says that this gives the same."""

    def refresh(self) -> None:
        """Take over the policy's weights as they are now."""
        super().refresh()
        network: Any = decoder(self.model)
        followers = [*(layer.input_layernorm for layer in network.layers[1:]), network.norm]
        self._layers = [_Layer.of(*pair) for pair in zip(network.layers, followers, strict=True)]
        self._first = _constants(network.layers[0].input_layernorm)
        self._head = _Product.of(self.model.get_output_embeddings())

    @classmethod
    def suits(cls, model: PreTrainedModel) -> bool:
        """Whether the model has the layers that are gone through here, which is tried once."""
        width = model.config.get_text_config().hidden_size
        suit = all(layer.suits_kernels for layer in model.modules() if isinstance(layer, JointAttention))
        fits = width <= WIDEST and not width % LANES and suit
        return fits and on_one_core(next(model.parameters())) and gives_the_same(cls, model)

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits [n, V] of each row's next token."""
        from harness.policy.kernels.cpu import decoding, elements

        tokens, positions, cache = inputs["input_ids"], inputs["position_ids"], inputs["past_key_values"]
        network: Any = decoder(self.model)
        embedded = network.embed_tokens(tokens)
        rotation = [part.flatten(0, -2) for part in half_turned(*network.rotary_emb(embedded, positions))]
        residual = embedded.flatten(0, 1).clone()
        normalized = torch.empty(residual.shape)
        states, given = arrays(residual, normalized)
        elements.normalize(states, *self._first, given, *arrays(torch.empty(len(residual))))
        (self._decode if cache.get_seq_length() else self._read)(residual, normalized, rotation, positions, cache)
        last = normalized.view(*tokens.shape, -1)[:, -1]
        logits = torch.empty(len(tokens), len(self._head.panels) * LANES)
        decoding.project(*arrays(last), *self._head, logits.numpy())
        return logits[:, : self.model.config.get_text_config().vocab_size]

    def _read(
        self, residual: Tensor, normalized: Tensor, rotation: Sequence[Tensor], positions: Tensor, cache: Cache
    ) -> None:
        """Take prompts [P x W, H], which are padded on the left, through the layers, in place."""
        from harness.policy.kernels.cpu import decoding

        (prompts, width), lengths = positions.shape, positions[:, -1] + 1
        columns = (torch.arange(width) + (width - lengths).unsqueeze(1)).clamp(max=width - 1)
        places = columns + width * torch.arange(prompts).unsqueeze(1)
        # Padding is in no row.
        rows = Rows(arrays(places, torch.zeros_like(lengths), lengths), count=0)
        states, inputs = arrays(residual, normalized)
        cos, sin = rotation
        for index, layer in enumerate(self._layers):
            attention: JointAttention = layer.attention
            heads = attention.heads()
            weight, bias, gain, epsilon = layer.joint
            attended, _, turned, _ = attend(normalized, weight, bias, gain, epsilon, cos, sin, heads, rows)
            held = turned.view(prompts, width, -1, heads.dim)[:, :, heads.queries :].transpose(1, 2)
            cache.update(*held.split(heads.keys, 1), index)
            update = product(attended, attention.o_proj.weight, attention.o_proj.bias)
            decoding.add(states, inputs, *arrays(update), *layer.norm)
            update = layer.rest(normalized.view(prompts, width, -1)).flatten(0, 1)
            decoding.add(states, inputs, *arrays(update), *layer.follower)

    def _decode(
        self, residual: Tensor, normalized: Tensor, rotation: Sequence[Tensor], positions: Tensor, cache: Cache
    ) -> None:
        """Take one token [n, H] a row through the layers, in place; it sees all that is not padding before it."""
        from harness.policy.kernels.cpu import decoding

        states, inputs = arrays(residual, normalized)
        column = cache.get_seq_length()
        (begins,) = arrays(column - positions[:, 0])
        turning = arrays(*rotation)
        for index, layer in enumerate(self._layers):
            held: Any = cache.layers[index]
            decoding.attend(
                states, inputs, *layer.projection, *layer.constants, *turning, *held.buffers, begins, column,
                layer.attention.sizes[0], layer.attention.scaling, *layer.output, *layer.norm,
            )  # fmt: skip
            held.length += 1
            if layer.gated is not None:
                decoding.feed(states, inputs, *layer.gated, *layer.follower)
            else:
                with transposed(layer.experts):
                    update = layer.rest(normalized.unsqueeze(1)).squeeze(1)
                decoding.add(states, inputs, *arrays(update), *layer.follower)


def draws(logits: Tensor) -> bool:
    """Whether :func:`draw` and :func:`next_rows` take such logits [R, V]."""
    return on_one_core(logits) and logits.shape[1] <= WIDEST


def draw(logits: Tensor, rows: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As :func:`harness.rollout.decoding.draw`."""
    from harness.policy.kernels.cpu import vocabulary

    count = logits.shape[1]
    given = torch.empty(len(logits), -(-count // LANES) * LANES)
    given[:, :count] = logits
    tokens, logprobs = torch.empty_like(rows), torch.empty(len(rows))
    vocabulary.draw(given.numpy(), count, *arrays(rows, noise), 1 / temperature, *arrays(tokens, logprobs))
    return tokens, logprobs


def next_rows(row: Tensor, tokens: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`harness.rollout.decoding.next_rows`."""
    from harness.policy.kernels.cpu import decoding

    source, latest, place = torch.empty(3, len(row), dtype=torch.long)
    count = np.empty(1, np.int64)
    decoding.regroup(*arrays(row, tokens), vocabulary, *arrays(source, latest, place), count)
    return source[: count[0]], latest[: count[0]], place


class _Product(NamedTuple):
    panels: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, layer: Any) -> "_Product":
        """Of a linear layer, or what has such weights."""
        from harness.policy.kernels.cpu.decoding import panels

        bias = torch.empty(0) if layer.bias is None else nn.functional.pad(layer.bias, (0, -len(layer.bias) % LANES))
        return cls(panels(layer.weight), *arrays(bias))


class _Layer(NamedTuple):
    attention: JointAttention
    joint: Joint
    projection: _Product
    constants: tuple[np.ndarray, float]
    output: _Product
    norm: tuple[np.ndarray, float]
    gated: tuple[np.ndarray, np.ndarray] | None
    rest: nn.Module  # where that is another kind of layer
    experts: Sequence[np.ndarray]  # where it has some
    follower: tuple[np.ndarray, float]

    @classmethod
    def of(cls, layer: Any, follower: RMSNorm) -> "_Layer":
        """What kernels need of a layer, and of the normalisation that follows it."""
        from harness.policy.kernels.cpu.decoding import panels

        attention: JointAttention = layer.self_attn
        joint, gated = attention.joint(), None
        if isinstance(layer.mlp, GatedFeedForward) and not layer.mlp.down_proj.in_features % LANES:
            gated = panels(layer.mlp.joint()), panels(layer.mlp.down_proj.weight)
        return cls(
            attention=attention,
            joint=joint,
            projection=_Product.of(joint),
            constants=head_constants(joint.gain, joint.epsilon, attention.head_dim),
            output=_Product.of(attention.o_proj),
            norm=_constants(layer.post_attention_layernorm),
            gated=gated,
            rest=layer.mlp,
            experts=[weights for child in layer.mlp.children() if is_experts(child) for weights in transposes(child)],
            follower=_constants(follower),
        )


def _constants(norm: RMSNorm) -> tuple[np.ndarray, float]:
    return arrays(norm.weight)[0], norm.epsilon
