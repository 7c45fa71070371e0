"""Log-probabilities and entropy of completion tokens, without logits of prompts or of the whole batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from harness.policy import one_core
from harness.policy.fusion import fused
from harness.policy.kernels import takes_vocabulary
from harness.policy.loading import autocast, decoder
from harness.policy.packing import Packing
from harness.policy.products import product
from harness.rollout.batch import Batch, send

# Logits that are held for the backward pass at most: 2^25 float32 are 128 MiB.
HELD_ELEMENTS = 2**25
# Logits in a block where there are more: on a CPU as many as its allocator and its cache can use again.
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


def completion_states(network: PreTrainedModel, packing: Packing) -> Tensor:
    """Hidden states [N, H] from which a batch's N valid completion tokens are predicted, row by row."""
    with autocast(network.device):
        states = network(**packing.inputs, use_cache=False).last_hidden_state
    # Of a prompt's last token, which completions have in common, gradients are added up in float32.
    return states.flatten(0, 1).float().index_select(0, packing.completion).to(states.dtype)


def completion_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    entropy_gradient: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens and the entropy where each was drawn.

    Args:
        model: the policy; gradients flow if they are enabled.
        batch: B completions of up to T tokens, in host memory.
        temperature: logits are divided by it first.
        entropy_gradient: whether the entropy carries a gradient (for an entropy bonus).
        packing: the batch's, where it is there already.

    Returns:
        logprobs [B, T] and entropy [B, T], in nats, float32, 0 where masked, on the policy's device.
    """
    packing = packing or Packing(decoder(model), batch)
    states = completion_states(decoder(model), packing)
    tokens = send(batch.completions[batch.mask.bool()], model.device)
    logprobs, entropy = token_logprobs(states, model.get_output_embeddings(), tokens, temperature, entropy_gradient)
    return packing.of_completions(logprobs), packing.of_completions(entropy)


def token_logprobs(
    states: Tensor, head: nn.Linear, tokens: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of ``tokens`` [N] and entropies [N], from hidden states [N, H].

    Where there are more than :data:`HELD_ELEMENTS` logits, blocks of them are computed one at a time, and again in the
    backward pass, instead of being held.
    """
    given = states, head.weight, head.bias, tokens, temperature, entropy_gradient
    if recomputes(head, len(states)):
        return _Recomputed.apply(*given)
    if takes_vocabulary(states, head.weight) and states.shape[-1] == head.weight.shape[1]:
        return one_core.Scores.apply(*given)
    return _held(states, head, tokens, temperature, entropy_gradient)


def compile_blocks(head: nn.Linear, temperature: float, entropy_gradient: bool = False) -> None:
    """Have what blocks of logits need on a GPU compiled, however few tokens come first; leaves gradients behind."""
    if head.weight.is_cuda:
        states = head.weight.new_zeros(2, head.weight.shape[1], requires_grad=True)
        tokens = torch.zeros(2, dtype=torch.long, device=states.device)
        logprobs, entropy = _Recomputed.apply(states, head.weight, head.bias, tokens, temperature, entropy_gradient)
        (logprobs + entropy).sum().backward()


def recomputes(head: nn.Linear, tokens: int) -> bool:
    """Whether the backward pass over this many tokens computes their logits once more, which costs another forward."""
    return tokens * head.weight.shape[0] > HELD_ELEMENTS


def _held(
    states: Tensor, head: nn.Linear, tokens: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    with autocast(states.device):
        logits = head(states)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy


class _Recomputed(torch.autograd.Function):
    """Log-probabilities and entropies in blocks of the vocabulary; only [N] tensors are kept for the backward pass.

    Blocks of the vocabulary rather than of the tokens: each row of the head and of its gradient is then touched once,
    and what is added up over blocks is the much smaller gradient of the states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(torch.float32).min
        largest = torch.full_like(tokens, lowest, dtype=torch.float32)  # logit x so far, m below
        total = torch.zeros_like(largest)  # of exp(x - m)
        moment = torch.zeros_like(largest)  # of exp(x - m) (x - m)
        chosen = torch.zeros_like(largest)  # the token's x
        for block in _blocks(states, weight):
            logits = _logits(states, weight, bias, block)
            sums = (largest, total, moment, chosen)
            largest, total, moment, chosen = _ADD[states.device.type](
                logits, *_locate(tokens, block), *sums, temperature
            )
            del logits  # before the next block's are made
        logprobs = chosen - largest - total.log()
        entropy = total.log() - moment / total
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(states, weight, bias, tokens, largest + total.log(), entropy)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, tokens, normalizer, entropy = ctx.saved_tensors
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        by_logprob = grad_logprobs.unsqueeze(1) / ctx.temperature  # the temperature's share of the chain rule
        by_entropy = grad_entropy.unsqueeze(1) / ctx.temperature
        for block in _blocks(states, weight):
            logits = _logits(states, weight, bias, block)
            index, inside = _locate(tokens, block)
            gradient = _DIFFERENTIATE[states.device.type](
                logits,
                index,
                inside,
                normalizer,
                by_logprob,
                entropy,
                by_entropy,
                ctx.temperature,
                ctx.entropy_gradient,
            )
            del logits
            if grad_bias is not None:
                grad_bias[block] = gradient.sum(0, dtype=torch.float32)
            with autocast(states.device):
                if grad_weight is not None:
                    grad_weight[block] = product(gradient.T, states.T)
                if grad_states is not None:
                    grad_states += product(gradient, weight[block].T)
            del gradient
        return grad_states, grad_weight, grad_bias, None, None, None  # autograd casts them to their tensors' types


def _add_block(
    logits: Tensor,
    index: Tensor,
    inside: Tensor,
    largest: Tensor,
    total: Tensor,
    moment: Tensor,
    chosen: Tensor,
    temperature: float,
) -> tuple[Tensor, ...]:
    """The sums [N] over the vocabulary's blocks, with one more block of logits [N, V']."""
    logits = logits.float().div_(temperature)
    chosen = torch.where(inside, logits.gather(1, index).squeeze(1), chosen)
    previous, largest = largest, torch.maximum(largest, logits.amax(1))
    shift = previous - largest
    logits.sub_(largest.unsqueeze(1))
    exponentials = logits.exp()
    moment = (moment + total * shift) * shift.exp() + torch.linalg.vecdot(exponentials, logits)
    total = total * shift.exp() + exponentials.sum(1)
    return largest, total, moment, chosen


@fused(rows=7, columns=1)
def _add_block_fused(
    logits: Tensor,
    index: Tensor,
    inside: Tensor,
    largest: Tensor,
    total: Tensor,
    moment: Tensor,
    chosen: Tensor,
    temperature: float,
) -> tuple[Tensor, ...]:
    """As above, without in-between results in memory."""
    chosen = torch.where(inside, logits.gather(1, index).squeeze(1).float() / temperature, chosen)
    logits = logits.float() / temperature
    previous, largest = largest, torch.maximum(largest, logits.amax(1))
    shift = previous - largest
    below = logits - largest.unsqueeze(1)
    exponentials = below.exp()
    moment = (moment + total * shift) * shift.exp() + (exponentials * below).sum(1)
    total = total * shift.exp() + exponentials.sum(1)
    return largest, total, moment, chosen


def _differentiate_block(
    logits: Tensor,
    index: Tensor,
    inside: Tensor,
    normalizer: Tensor,
    by_logprob: Tensor,
    entropy: Tensor,
    by_entropy: Tensor,
    temperature: float,
    entropy_gradient: bool,
) -> Tensor:
    """The gradient [N, V'] of a block's logits.

    d logprob_t / d x_j = [j = t] - p_j and d entropy / d x_j = -p_j (log p_j + entropy).
    """
    gradient = logits.float().div_(temperature).sub_(normalizer.unsqueeze(1))
    if entropy_gradient:
        probabilities = gradient.exp()
        gradient.add_(entropy.unsqueeze(1)).mul_(-by_entropy).sub_(by_logprob).mul_(probabilities)
        del probabilities
    else:
        gradient.exp_().mul_(-by_logprob)
    gradient.scatter_add_(1, index, by_logprob * inside.unsqueeze(1))
    return gradient.to(logits.dtype)


@fused(rows=7, columns=1)
def _differentiate_block_fused(
    logits: Tensor,
    index: Tensor,
    inside: Tensor,
    normalizer: Tensor,
    by_logprob: Tensor,
    entropy: Tensor,
    by_entropy: Tensor,
    temperature: float,
    entropy_gradient: bool,
) -> Tensor:
    """As above, without in-between results in memory."""
    log_probabilities = logits.float() / temperature - normalizer.unsqueeze(1)
    gradient = -by_logprob
    if entropy_gradient:
        gradient = gradient - by_entropy * (log_probabilities + entropy.unsqueeze(1))
    gradient = gradient * log_probabilities.exp()
    here = (torch.arange(logits.shape[1], device=logits.device) == index) & inside.unsqueeze(1)
    return torch.where(here, gradient + by_logprob, gradient).to(logits.dtype)


# By device. A CPU works in place, since memory that is new is slow there.
_ADD = {"cpu": _add_block, "cuda": _add_block_fused}
_DIFFERENTIATE = {"cpu": _differentiate_block, "cuda": _differentiate_block_fused}


def _blocks(states: Tensor, weight: Tensor) -> Iterator[slice]:
    """Parts of the vocabulary with at most :data:`BLOCK_ELEMENTS` logits each."""
    size = max(1, BLOCK_ELEMENTS[states.device.type] // len(states))
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, block: slice) -> Tensor:
    with autocast(states.device):
        return product(states, weight[block], None if bias is None else bias[block])


def _locate(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Columns [N, 1] of the tokens in the block (any column for those outside of it), and which are inside [N]."""
    columns = tokens - block.start
    width = block.stop - block.start
    return columns.clamp(0, width - 1).unsqueeze(1), (columns >= 0) & (columns < width)
