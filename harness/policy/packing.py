"""Forward passes without padding: the tokens of a batch one behind the other in a single row.

The prompt of several completions stands there once: whatever it is computed from is the same for all of them. Only
attention sets tokens in rows, each completion behind its prompt.

Where tokens are is worked out in host memory and then sent to the device, so that nobody waits for it to say.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from harness.policy.attention import PADDING_FREE, is_padding_free
from harness.policy.products import MULTIPLE
from harness.rollout.batch import Batch, join, send


class Packing:
    """Where the N tokens of a batch's rows, and M completion tokens among them, are in the input of a network.

    Networks that cannot do without padding see all B x L positions; the others see the real ones, prompts first, each
    once for the completions that it has in the batch, and a few tokens that fill up their number.

    Attributes:
        inputs: what the network is called with.
        completion: [M] the places, among the N tokens, from which the completion tokens are predicted.
    """

    def __init__(self, network: PreTrainedModel, batch: Batch) -> None:
        """
        Args:
            network: says whether it does without padding, and on which device the places are to be.
            batch: in host memory.
        """
        self.shape, self._completions_shape = batch.input_ids.shape, batch.mask.shape
        device, padding_free = network.device, is_padding_free(network)
        columns = torch.arange(self.shape[1]).expand(self.shape)
        layout = _packed(batch, columns) if padding_free else _all(columns)
        self.completion = send(layout.rows.view(self.shape)[batch.positions()], device)
        self._sampled = send(batch.mask.flatten().nonzero().squeeze(1), device)
        self._layout = layout.to(device)
        self.inputs: dict[str, Any]
        if not padding_free:
            self.inputs = {"input_ids": send(batch.input_ids, device)}
        else:
            self.inputs = {
                "input_ids": send(batch.input_ids.flatten()[layout.own].unsqueeze(0), device),
                "position_ids": send(columns.flatten()[layout.own].unsqueeze(0), device),
                # Without one transformers would look in the positions for sequences, and wait for the device.
                "attention_mask": send(torch.ones(1, 1, 1, 1, dtype=torch.bool), device),
                "packing": self,
            }

    def in_one(self, rows: Tensor) -> Tensor:
        """[N, ...] from [B, L, ...]: of a prompt's copies the first."""
        return _InOne.apply(rows.flatten(0, 1), self._layout)

    def in_rows(self, tokens: Tensor) -> Tensor:
        """[B, L, ...] from [N, ...]; where no token is, a filling one."""
        return _InRows.apply(tokens, self._layout).unflatten(0, self.shape)

    def of_completions(self, values: Tensor) -> Tensor:
        """[B, T] from those of the M completion tokens, 0 where masked."""
        zeros = values.new_zeros(self._completions_shape.numel())
        return zeros.index_copy(0, self._sampled, values).unflatten(0, self._completions_shape)


@dataclass
class _Layout:
    """Which of the N tokens are where in B x L rows.

    Two completions xyz and uv of one prompt pq make the rows "p q x y" and "p q u .". With the first filling token:

        tokens     p q x y u .
        own        0 1 2 3 6 0
        rows       0 1 2 3   0 1 4 5
        owner      0 1 2 3   5 5 4 5
        positions  0 4   1 5   2   3   6
        starts     0 2 4 5 6 7
    """

    rows: Tensor  # [B x L] of each position the token, the first filling one where there is none
    own: Tensor  # [N] of each token the position, of a prompt's the first that it has; of filling ones any
    owner: Tensor  # [B x L] of each position the token whose first it is, otherwise the first filling one
    positions: Tensor  # of the first token all positions, then of the second and so on; of filling ones none
    starts: Tensor  # [N] where in ``positions`` those of each token begin

    def to(self, device: torch.device) -> "_Layout":
        """On another device."""
        return _Layout(*(send(getattr(self, field.name), device) for field in fields(self)))


def _packed(batch: Batch, columns: Tensor) -> _Layout:
    """Tokens alone, prompts first, each once for the rows of its group.

    At least one more fills up their number. What is computed from it reaches no completion, so that its gradients are
    0: it stands wherever there is no token.

    Args:
        batch: in host memory.
        columns: [B, L] of each position.
    """
    first = batch.first_of_group
    reads = first == torch.arange(len(first))
    prompt = columns < batch.prompt_lengths.unsqueeze(1)
    completion = ~prompt & (columns < batch.lengths.unsqueeze(1))
    own = torch.cat([mask.flatten().nonzero().squeeze(1) for mask in (prompt & reads.unsqueeze(1), completion)])
    owner = torch.full((columns.numel(),), len(own))
    owner[own] = torch.arange(len(own))
    rows = torch.where(prompt, owner.view(columns.shape)[first], owner.view(columns.shape)).flatten()
    positions = rows.argsort(stable=True)[: int((rows < len(own)).sum())]
    counts = rows.bincount(minlength=len(own))[: len(own)]
    filling = MULTIPLE - len(own) % MULTIPLE
    return _Layout(
        rows=rows,
        own=functional.pad(own, (0, filling)),
        owner=owner,
        positions=positions,
        starts=functional.pad(counts.cumsum(0) - counts, (0, filling), value=len(positions)),
    )


def _all(columns: Tensor) -> _Layout:
    """All positions, as they are."""
    every = torch.arange(columns.numel())
    return _Layout(every, every, every, every, every)


class _InOne(torch.autograd.Function):
    """[N, ...] from [B x L, ...].

    Here as there both directions gather, where torch would scatter the gradient: with deterministic kernels by sorting
    the indices.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.layout.owner), None


class _InRows(torch.autograd.Function):
    """[B x L, ...] from [N, ...]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        summed = functional.embedding_bag(layout.positions, gradient.flatten(1), layout.starts, mode="sum")
        return summed.view(-1, *gradient.shape[1:]), None


@torch.no_grad()
def drop_padding(model: PreTrainedModel) -> None:
    """Let the passes of a model do without padding, if it can.

    It must attend to all that came before in each of its layers (no window, no recurrence) through transformers'
    attention interface, and give what it gave with padding.
    """
    text = model.config.get_text_config()
    whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    if text._attn_implementation != "sdpa" or not whole:
        return
    batch = _probe(text.vocab_size)
    network: Any = model.base_model
    packing = Packing(network, batch)
    padded = network(**packing.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[packing.completion]
    model.set_attn_implementation(PADDING_FREE)
    try:
        packing = Packing(network, batch)
        packed = network(**packing.inputs, use_cache=False).last_hidden_state[0, packing.completion]
        same = torch.allclose(packed, padded, rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError):  # it does not pass settings on to its attention
        same = False
    if not same:
        model.set_attn_implementation("sdpa")


def _probe(vocabulary: int) -> Batch:
    """Sequences of different length, two of which share their prompt."""
    prompts, groups = [[0, 1, 2], [3, 4], [0, 1, 2]], torch.tensor([0, 1, 0])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    completions = torch.arange(5, 17).view(3, 4)
    batch = join(prompts, completions, mask, torch.zeros_like(mask), groups, 0)
    return replace(batch, input_ids=batch.input_ids.remainder(vocabulary))
