"""Floating-point operations counted from the architecture, as model FLOPs: padding costs none.

A multiply and an add are two operations. Every weight matrix costs two operations a token and entry, an expert's as
often as the router chooses it; attention costs the full square of a sequence's length, as it does in the usual counts
(a triangular kernel would save up to half). The backward pass costs twice the forward. In the trainer's passes each
completion counts with its prompt, although those of a group that share a micro-batch share its reading. What is
computed again in a backward pass, activations or the logits of a large vocabulary, the trainer charges on top.

Approximated, the same for every algorithm: of linear attention and state spaces the matrices count, but not the updates
of their states. All layers that attend count once and with heads of one size, although DiffLlama's attend twice, those
with a window may have heads of their own, and DeepSeek-V3.2's attend to a part of what came before.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from harness.errors import ConfigError
from harness.policy.critic import Critic
from harness.policy.loading import decoder
from harness.policy.routing import is_experts
from harness.rollout.batch import Batch

BACKWARD = 2
# Kinds of layers that do not attend, since they convolve, keep a state or do neither; all others do.
_APART = ("conv", "linear_attention", "mamba", "mlp", "moe")


@dataclass(frozen=True)
class ForwardCost:
    """What a forward pass of a network costs."""

    linear: float  # operations a token, in weight matrices
    attention: float  # operations a pair of query and key
    head: float  # operations an output position

    def full(self, lengths: Tensor, outputs: Tensor | int) -> float:
        """Whole sequences at once: ``lengths`` [B] tokens each, in host memory, and how many outputs need the head."""
        each = lengths.tolist()  # a few hundred numbers, which Python adds up before another library's code is at hand
        pairs = sum(length * length for length in each)
        return self.linear * sum(each) + self.attention * pairs + self.head * float(outputs)

    def batch(self, batch: Batch) -> float:
        """One forward pass over a rollout batch, the head at completion positions alone."""
        return self.full(batch.lengths, batch.completion_lengths.sum())

    def sampling(self, prompt_lengths: Tensor, completion_lengths: Tensor, group_size: int) -> float:
        """Rollout with a key-value cache: each prompt once, then one token at a time.

        Args:
            prompt_lengths: [B], one a completion; equal within a group.
            completion_lengths: [B]; the last sampled token of each is not fed back.
            group_size: completions that share a prompt's reading.
        """
        prompts = prompt_lengths[::group_size]
        fed = [length - 1 for length in completion_lengths.tolist()]
        contexts = sum(n * prompt + n * (n + 1) // 2 for n, prompt in zip(fed, prompt_lengths.tolist(), strict=True))
        decode = (self.linear + self.head) * sum(fed) + self.attention * contexts
        return self.full(prompts, len(prompts)) + decode


def forward_cost(network: PreTrainedModel, head: nn.Linear, config: PretrainedConfig) -> ForwardCost:
    """The cost of a decoder and its head.

    Args:
        network: the decoder, without the head.
        head: a linear layer applied at output positions.
        config: the transformers configuration of the model.
    """
    text = config.get_text_config()
    weights = sum(active for _, active in _matrices(network, text))
    return ForwardCost(
        linear=2 * weights,
        attention=_attention(text),
        head=2 * head.weight.numel(),
    )


def policy_cost(model: PreTrainedModel) -> ForwardCost:
    """The cost of a policy's forward pass."""
    return forward_cost(decoder(model), model.get_output_embeddings(), model.config)


def critic_cost(critic: Critic, config: PretrainedConfig) -> ForwardCost:
    """The cost of a critic's forward pass."""
    return forward_cost(critic.network, critic.head, config)


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in one text token's forward pass: experts count as often as they are chosen."""
    network = decoder(model)
    idle = sum(full - active for full, active in _matrices(network, model.config.get_text_config()))
    beside = _size(network) - _size(network.get_decoder())
    return round(_size(model) - beside - idle)


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _attention(config: PretrainedConfig) -> float:
    """Operations a pair of query and key in all layers that attend: the scores, and the sum of values."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = sum(kind not in _APART for kind in kinds) if kinds else config.num_hidden_layers
    heads = config.num_attention_heads
    keys = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):  # latent attention: keys have a part with positions and one without
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
    values = getattr(config, "v_head_dim", None) or keys
    return 2 * layers * heads * (keys + values)


def _chosen(config: PretrainedConfig) -> int:
    """Experts that are chosen for a token."""
    for name in ("num_experts_per_tok", "top_k_experts", "moe_k"):
        if count := getattr(config, name, None):
            return count
    raise ConfigError(
        f"model: {type(config).__name__} does not say how many experts are chosen for a token "
        "(num_experts_per_tok), by which FLOPs are counted; choose a model of another architecture"
    )


def _matrices(network: PreTrainedModel, config: PretrainedConfig) -> list[tuple[int, float]]:
    """Entries of each weight matrix, and how many of them one token uses; those of a tower for images see no text."""
    modules = list(network.get_decoder().modules())
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    found: list[tuple[int, float]] = []
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        if is_experts(module):
            # Expert weights are stacked as [experts, out, in]; 2-D ones beside them are their biases.
            experts = [parameter for parameter in own.values() if parameter.ndim == 3]
            share = _chosen(config) / experts[0].shape[0]
            found += [(parameter.numel(), parameter.numel() * share) for parameter in experts]
            continue
        matrices = [p for p in own.values() if p.ndim in (2, 3) and id(p) not in embeddings]  # 3: a convolution's
        found += [(parameter.numel(), parameter.numel()) for parameter in matrices]
    return found
