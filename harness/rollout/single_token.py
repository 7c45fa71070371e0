"""A decoded token's way through a model on a CPU, without what it costs to call transformers' modules.

With a few sequences the calls take longer than the arithmetic. So what most models share is gone through here, and what
they differ in is left to their modules: embeddings, attention, feed-forward layers or experts, normalisation.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.policy.attention import decoding_mask
from harness.policy.loading import decoder
from harness.policy.projections import Joint, JointAttention, half_turned
from harness.rollout.cache import SlotCache
from harness.rollout.decoding import each_sees_one
from harness.rollout.weights import SamplingWeights

# What was found out about models that are still there: every evaluation asks again.
_SUITED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class SingleTokenDecoder(SamplingWeights):
    """The policy as rollouts see it, where :meth:`suits` says that this gives the same."""

    def refresh(self) -> None:
        """Take over the policy's weights as they are now."""
        super().refresh()
        network: Any = decoder(self.model)
        self.joint: list[Joint] = [layer.self_attn.joint() for layer in network.layers]

    @classmethod
    def suits(cls, model: PreTrainedModel) -> bool:
        """Whether the model has the layers that are gone through here, which is tried once."""
        if model not in _SUITED:
            _SUITED[model] = cls._gives_the_same(model)
        return _SUITED[model]

    @classmethod
    @torch.no_grad()
    def _gives_the_same(cls, model: PreTrainedModel) -> bool:
        if not any(isinstance(module, JointAttention) for module in model.modules()):
            return False
        try:
            return torch.allclose(_probe(cls(model)), _probe(SamplingWeights(model)), rtol=1e-3, atol=1e-3)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # layers of other parts
            return False

    def __call__(self, **inputs: Any) -> Tensor:
        """Float32 logits [n, V] of each row's next token."""
        if inputs["input_ids"].shape[1] > 1:
            return super().__call__(**inputs)
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        return self._decode(*(inputs[name] for name in names))

    def _decode(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Float32 logits [n, V] after tokens [n, 1] at positions [n, 1], which see what the mask says."""
        network: Any = decoder(self.model)
        states = network.embed_tokens(tokens)
        rotation = half_turned(*network.rotary_emb(states, positions))
        for layer, joint in zip(network.layers, self.joint, strict=True):
            normalized = layer.input_layernorm(states)
            states = states + layer.self_attn.attend(normalized, joint, rotation, mask, cache)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.model.get_output_embeddings()(network.norm(states))[:, -1].float()


def _probe(policy: SamplingWeights) -> Tensor:
    """Logits [2, V] after two prompts of different length and two more tokens."""
    policy.refresh()
    config = policy.model.config
    tokens = torch.arange(10).remainder(config.get_text_config().vocab_size).view(2, 5)
    present = torch.ones(2, 5, dtype=torch.bool)
    present[1, 0] = False
    positions = (present.cumsum(1) - 1).clamp(min=0)
    cache, logits = SlotCache(config, rows=2, columns=5), torch.empty(0)
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
