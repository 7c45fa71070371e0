"""Whether a shorter way through a model gives what the model gives: it is tried out once for each model."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.policy.attention import decoding_mask
from harness.policy.projections import JointAttention
from harness.rollout.cache import SlotCache
from harness.rollout.decoding import each_sees_one
from harness.rollout.weights import SamplingWeights

# What was found out about models that are still there: every evaluation asks again.
_FOUND: WeakKeyDictionary[PreTrainedModel, dict[type, bool]] = WeakKeyDictionary()


def gives_the_same(kind: type[SamplingWeights], model: PreTrainedModel) -> bool:
    """Whether a few tokens get the logits that the model itself gives them."""
    known = _FOUND.setdefault(model, {})
    if kind not in known:
        known[kind] = _gives_the_same(kind, model)
    return known[kind]


@torch.no_grad()
def _gives_the_same(kind: type[SamplingWeights], model: PreTrainedModel) -> bool:
    if not any(isinstance(module, JointAttention) for module in model.modules()):
        return False
    try:
        return torch.allclose(_probe(kind(model)), _probe(SamplingWeights(model)), rtol=1e-3, atol=1e-3)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # layers of other parts
        return False


def _probe(policy: SamplingWeights) -> Tensor:
    """Logits [2, V] after two prompts of different length and two more tokens."""
    policy.refresh()
    config, device = policy.model.config, policy.model.device
    tokens = torch.arange(10, device=device).remainder(config.get_text_config().vocab_size).view(2, 5)
    present = torch.ones(2, 5, dtype=torch.bool, device=device)
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
