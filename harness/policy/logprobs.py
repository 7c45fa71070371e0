"""Log-probabilities and entropy of completion tokens, without logits of prompts or of the whole batch."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from harness.policy.loading import autocast, decoder
from harness.rollout.batch import Batch

# Logits held at once: 2^25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


def completion_states(network: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [N, H] from which the batch's N valid completion tokens are predicted, row by row."""
    with autocast(batch.input_ids.device):
        states = network(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return states[batch.positions()]


def completion_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens and the entropy where each was drawn.

    Args:
        model: the policy; gradients flow if they are enabled.
        batch: B completions of up to T tokens.
        temperature: logits are divided by it first.
        entropy_gradient: whether the entropy carries a gradient (for an entropy bonus).

    Returns:
        logprobs [B, T] and entropy [B, T], in nats, float32, 0 where masked.
    """
    states = completion_states(decoder(model), batch)
    valid = batch.mask.bool()
    logprobs, entropy = token_logprobs(
        states, model.get_output_embeddings(), batch.completions[valid], temperature, entropy_gradient
    )
    zeros = torch.zeros_like(batch.mask)
    return zeros.masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


def token_logprobs(
    states: Tensor, head: nn.Linear, tokens: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of ``tokens`` [N] and entropies [N], from hidden states [N, H].

    At most :data:`CHUNK_ELEMENTS` logits exist at a time: where there are more, chunks are computed again in the
    backward pass instead of being held.
    """
    size = _chunk_size(head)
    if not recomputes(head, len(states)):
        return _chunk(states, head, tokens, temperature, entropy_gradient)
    parts = [
        checkpoint(
            _chunk, states[i : i + size], head, tokens[i : i + size], temperature, entropy_gradient, use_reentrant=False
        )
        for i in range(0, len(states), size)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def recomputes(head: nn.Linear, tokens: int) -> bool:
    """Whether the backward pass over this many tokens computes their logits once more, which costs another forward."""
    return tokens > _chunk_size(head)


def _chunk_size(head: nn.Linear) -> int:
    return max(1, CHUNK_ELEMENTS // head.weight.shape[0])


def _chunk(
    states: Tensor, head: nn.Linear, tokens: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    with autocast(states.device):
        logits = head(states)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy
