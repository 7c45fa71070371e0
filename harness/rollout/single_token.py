"""A decoded token's way through a model on a CPU, without what it costs to call transformers' modules.

With a few sequences the calls take longer than the arithmetic. So the layers that most models share are gone through
here: query, key and value are one product, which is normalised and rotated as a whole. What models differ in is left to
their own modules: feed-forward layers or experts, normalisation, rotary embeddings.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.policy.attention import decoding_mask, is_padding_free, padding_free_attention
from harness.policy.loading import decoder
from harness.policy.normalization import normalized
from harness.policy.products import product
from harness.rollout.cache import build_cache
from harness.rollout.decoding import each_sees_one
from harness.rollout.weights import SamplingWeights


@dataclass
class _Layer:
    """A layer, and of its attention what is computed from the weights as they are."""

    module: Any
    weight: Tensor  # [(heads + 2 key heads) D, H] of queries, keys and values
    bias: Tensor | None  # [(heads + 2 key heads) D]
    gain: Tensor | None  # [heads + key heads, D] of the normalisation of queries and keys, where there is one
    heads: int
    key_heads: int


class SingleTokenDecoder:
    """The policy as rollouts see it, where :meth:`suits` says that it is what :class:`SamplingWeights` gives."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.network: Any = decoder(model)
        self.refresh()

    @classmethod
    @torch.no_grad()
    def suits(cls, model: PreTrainedModel) -> bool:
        """Whether the model runs on a CPU and has the layers that are gone through here, which is tried."""
        if model.device.type != "cpu" or not is_padding_free(model):
            return False
        try:
            return torch.allclose(_probe(cls(model)), _probe(SamplingWeights(model)), rtol=1e-3, atol=1e-3)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # layers of other parts
            return False

    def refresh(self) -> None:
        """Take over the policy's weights as they are now."""
        self._layers = [_layer(module) for module in self.network.layers]

    def __call__(self, **inputs: Any) -> Tensor:
        """Float32 logits [n, V] of each row's next token."""
        if inputs["input_ids"].shape[1] > 1:
            return self.model(**inputs).logits[:, -1].float()
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        return self._decode(*(inputs[name] for name in names))

    def _decode(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Float32 logits [n, V] after tokens [n, 1] at positions [n, 1], which see what the mask says."""
        states = self.network.embed_tokens(tokens)
        cos, sin = (each.unsqueeze(2) for each in self.network.rotary_emb(states, positions))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for index, layer in enumerate(self._layers):
            attention = layer.module.self_attn
            joint = product(layer.module.input_layernorm(states), layer.weight, layer.bias)
            joint = joint.unflatten(-1, (layer.heads + 2 * layer.key_heads, -1))
            rotated, value = joint.split([layer.heads + layer.key_heads, layer.key_heads], 2)
            if layer.gain is not None:
                rotated = normalized(rotated, layer.gain, attention.q_norm.constant)
            rotated = torch.addcmul(rotated.roll(half, -1).mul_(sin), rotated, cos)
            query, key = rotated.transpose(1, 2).split([layer.heads, layer.key_heads], 1)
            key, value = cache.update(key, value.transpose(1, 2), index)
            attended, _ = padding_free_attention(attention, query, key, value, mask, attention.scaling)
            states = states + attention.o_proj(attended.flatten(2))
            states = states + layer.module.mlp(layer.module.post_attention_layernorm(states))
        return self.model.get_output_embeddings()(self.network.norm(states))[:, -1].float()


def _layer(module: Any) -> _Layer:
    attention = module.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    heads, key_heads, _ = (projection.out_features // attention.head_dim for projection in projections)
    biases = [projection.bias for projection in projections if projection.bias is not None]
    gain = None
    if hasattr(attention, "q_norm"):
        gain = torch.cat([attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(key_heads, -1)])
    return _Layer(
        module,
        weight=torch.cat([projection.weight for projection in projections]),
        bias=torch.cat(biases) if biases else None,
        gain=gain,
        heads=heads,
        key_heads=key_heads,
    )


def _probe(policy: SamplingWeights | SingleTokenDecoder) -> Tensor:
    """Logits [2, V] after two prompts of different length and two more tokens."""
    config = policy.model.config
    tokens = torch.arange(10).remainder(config.get_text_config().vocab_size).view(2, 5)
    present = torch.ones(2, 5, dtype=torch.bool)
    present[1, 0] = False
    positions = (present.cumsum(1) - 1).clamp(min=0)
    cache, logits = build_cache(config, rows=2, columns=5), torch.empty(0)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        mask = decoding_mask(present[:, :end]) if start else each_sees_one(present[:, :end])
        logits = policy(
            input_ids=tokens[:, start:end],
            attention_mask=mask,
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return logits
