"""Forward passes without padding: the tokens of a batch one behind the other in a single row.

The prompt of several completions stands there once: whatever it is computed from is the same for all of them. Only
attention sets tokens in rows, each completion behind its prompt.

Where tokens are is worked out in host memory and then sent to the device, so that nobody waits for it to say.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from harness.policy.attention import PADDING_FREE, is_padding_free
from harness.rollout.batch import Batch, join, send


class Packing:
    """Where the N tokens of a batch's rows, and M completion tokens among them, are in the input of a network.

    Networks that cannot do without padding see all B x L positions; the others see the real ones alone, prompts first,
    each once for the completions that it has in the batch.

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
        places = _packed(batch, columns) if padding_free else _all(columns)
        own = places.own.index
        self.completion = send(places.rows.index.view(self.shape)[batch.positions()], device)
        self._sampled = send(batch.mask.flatten().nonzero().squeeze(1), device)
        self._places = places.to(device)
        self.inputs: dict[str, Any]
        if not padding_free:
            self.inputs = {"input_ids": send(batch.input_ids, device)}
        else:
            self.inputs = {
                "input_ids": send(batch.input_ids.flatten()[own].unsqueeze(0), device),
                "position_ids": send(columns.flatten()[own].unsqueeze(0), device),
                # Without one transformers would look in the positions for sequences, and wait for the device.
                "attention_mask": send(torch.ones(1, 1, 1, 1, dtype=torch.bool), device),
                "packing": self,
            }

    def in_one(self, rows: Tensor) -> Tensor:
        """[N, ...] from [B, L, ...]: of a prompt's copies the first."""
        return _Take.apply(rows.flatten(0, 1), self._places.own, self._places.owner)

    def in_rows(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """[B, L, ...] from [N, ...]; 0 where no token is, or ``padding`` [1, ...]."""
        places = self._places
        if padding is None:
            return _Take.apply(tokens, places.rows, places.own, places.copies).unflatten(0, self.shape)
        return torch.cat([tokens, padding]).index_select(0, places.rows.index).unflatten(0, self.shape)

    def of_completions(self, values: Tensor) -> Tensor:
        """[B, T] from those of the M completion tokens, 0 where masked."""
        zeros = values.new_zeros(self._completions_shape.numel())
        return zeros.index_copy(0, self._sampled, values).unflatten(0, self._completions_shape)


@dataclass
class _Places:
    """Where elements are along a first dimension."""

    index: Tensor  # [n]
    past: bool = False  # whether some are one past the last, where 0 stands

    def take(self, elements: Tensor) -> Tensor:
        """The elements there."""
        if self.past:
            elements = torch.cat([elements, elements.new_zeros(1, *elements.shape[1:])])
        return elements.index_select(0, self.index)


@dataclass
class _Layout:
    """Which of the N tokens are where in B x L rows."""

    rows: _Places  # [B x L] of each position the token
    own: _Places  # [N] of each token the position, of a prompt's the first that it has
    owner: _Places  # [B x L] of each position the token whose first it is, N elsewhere
    copies: tuple[Tensor, ...]  # of the first so many tokens, those of prompts, a second position, a third and so on

    def to(self, device: torch.device) -> "_Layout":
        """On another device."""
        rows, own, owner = (_Places(send(each.index, device), each.past) for each in (self.rows, self.own, self.owner))
        return _Layout(rows, own, owner, tuple(send(places, device) for places in self.copies))


def _packed(batch: Batch, columns: Tensor) -> _Layout:
    """Tokens alone, prompts first, each once for the rows of its group, those with most rows first.

    Args:
        batch: in host memory.
        columns: [B, L] of each position.
    """
    count, length = columns.shape
    same = batch.group_ids.unsqueeze(1) == batch.group_ids
    first, rank, size = batch.first_of_group, same.tril(-1).sum(1), same.sum(1)
    members = torch.zeros(count, int(size.max()), dtype=torch.long)  # in a group's first row all of its rows
    members[first, rank] = torch.arange(count)
    prompt = columns < batch.prompt_lengths.unsqueeze(1)
    readers = (rank == 0).nonzero().squeeze(1)
    readers = readers[size[readers].argsort(descending=True, stable=True)]
    index, column = prompt[readers].nonzero(as_tuple=True)
    reader = readers[index]
    completions = (~prompt & (columns < batch.lengths.unsqueeze(1))).flatten().nonzero().squeeze(1)
    own = torch.cat([reader * length + column, completions])
    owner = torch.full((count * length,), len(own))
    owner[own] = torch.arange(len(own))
    rows = torch.where(prompt, owner.view(count, length)[first], owner.view(count, length)).flatten()
    copies = []
    for copy in range(1, members.shape[1]):
        held = int((size[reader] > copy).sum())
        copies.append(members[reader[:held], copy] * length + column[:held])
    return _Layout(
        rows=_Places(rows, past=bool((rows == len(own)).any())),
        own=_Places(own),
        owner=_Places(owner, past=len(own) < len(owner)),
        copies=tuple(copies),
    )


def _all(columns: Tensor) -> _Layout:
    """All positions, as they are."""
    every = _Places(torch.arange(columns.numel()))
    return _Layout(every, every, every, ())


class _Take(torch.autograd.Function):
    """Elements along the first dimension, by their places; ``copies`` are further places of the first of them.

    Both directions gather, where torch would scatter the gradient: with deterministic kernels by sorting the indices.
    """

    @staticmethod
    def forward(
        ctx: Any, elements: Tensor, places: _Places, inverse: _Places, copies: tuple[Tensor, ...] = ()
    ) -> Tensor:
        ctx.inverse, ctx.copies = inverse, copies
        return places.take(elements)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        result = ctx.inverse.take(gradient)
        for places in ctx.copies:
            result[: len(places)] += gradient.index_select(0, places)
        return result, None, None, None


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
